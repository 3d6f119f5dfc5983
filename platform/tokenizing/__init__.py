"""Curated documents to packed token shards, and the training of the text tokenizer.

Start reading at `tokenize`; `actor` is what its workers do.
"""
