"""The report of a study: what its judgements amount to, as values, as a page and as JSON."""
