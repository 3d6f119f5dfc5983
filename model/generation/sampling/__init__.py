"""From logits to ids: masks, penalties, filters, draws, and speculative decoding."""
