"""One optimizer step and what belongs to it: the DeepSpeed engine, learning rates, bad steps, held-out loss, meters."""
