"""Reference pages as Markdown, and JSON schemas, made from the code.

The pages are written at each build and not committed: their source is the code. The schemas are committed, because
editors read them; `make reference` writes them anew, and a test fails while they are stale.
"""
