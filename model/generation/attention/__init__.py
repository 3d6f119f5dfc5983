"""Attention of a pass over the paged cache: what reads it on which device."""
