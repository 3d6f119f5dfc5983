"""Evaluation of a model: cases from held-out conversations, the model's answers, grades by an independent judge.

Start reading at `evaluate`.
"""
