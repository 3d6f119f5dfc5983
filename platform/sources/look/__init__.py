"""A look at a location before anything is curated: `look.look`, and `guess`, what it seems to be."""
