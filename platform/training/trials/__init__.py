"""Trials: small trainings in plain PyTorch, many side by side, that answer a question: what a stabilizer bounds
(`ablation`), what a larger model would reach (`ladder`).

Start reading at `trial`, one of them, and `running`, all of them.
"""
