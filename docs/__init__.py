"""The documentation: written pages, a generated reference, and what builds and checks the site."""
