"""What the Transformer is computed with and measured by: attention, the loss, instruments of stability."""
