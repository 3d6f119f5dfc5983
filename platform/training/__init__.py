"""Training of the Transformer in stages, of the image tokenizer, and small trainings that answer questions (`trials`).

Start reading at `stage`, the driver's side, and `loop`, which every worker runs. What both know is `assignment`.
"""
