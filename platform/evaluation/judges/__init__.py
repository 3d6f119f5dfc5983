"""Judges of answers, each a specification: a policy of words, a local classifier, a model at an endpoint or of ours.

Two things are asked of them: whether an answer is safe, and whether a picture shows what a question says.
"""
