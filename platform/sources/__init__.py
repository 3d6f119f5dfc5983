"""Sources: files in the formats people have, read into documents.

`registry` says how a format is added, `reading` reads a file, `dataset` reads a source with Ray Data for pipelines of
one's own.
"""
