"""A dozen items of every benchmark in its publisher's own form, in our words and pictures: for tests and first runs.

They say nothing of a model but that it can be asked.
"""
