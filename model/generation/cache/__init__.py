"""Keys and values of past tokens in blocks, and who owns which block (PagedAttention, arXiv 2309.06180)."""
