"""Forward passes over the paged cache: layout of a batch, decoder, attention, CUDA graphs, what is drawn and scored."""
