"""Studies in the formats of other tools, out and in again, and preferences as pairs for training."""
