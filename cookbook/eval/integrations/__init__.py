"""Evaluation packages that run their tasks on the model in training."""
