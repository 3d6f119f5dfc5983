"""What of a model is trained: all of it, parameters by pattern, the image rows of the output, low-rank adapters."""
