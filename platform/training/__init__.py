"""Training of the Transformer in stages, of the image tokenizer, and the ablation.

Start reading at `stage`, the driver's side, and `loop`, which every worker runs. What both know is `assignment`.
"""
