"""Curation: which documents of a source are worth training on, and what of them is taken out or repeated.

Start reading at `curate`; what its tasks do is `tasks`, what a document goes through is `steps/chain`.
"""
