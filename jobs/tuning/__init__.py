"""Fine-tuning in one command: a model and a file of examples to a registered model, by way of the jobs there are.

Start reading at `steps`.
"""
