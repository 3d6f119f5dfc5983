"""Learning from preferences: the losses of pairs, and what the reference model says of each answer, kept."""
