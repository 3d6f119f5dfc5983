"""Curation: which documents of a source are worth training on, and what of them is taken out or repeated."""
