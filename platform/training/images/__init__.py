"""Training of the VQ image tokenizer. Start reading at `stage`; one step is `objective`."""
