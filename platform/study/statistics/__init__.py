"""What judgements amount to: votes, agreement, strengths, and who seems to have guessed. Values in, values out."""
