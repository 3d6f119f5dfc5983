"""A suite: many benchmarks asked of one system, one page of figures, resumable at every task. Start at `running`."""
