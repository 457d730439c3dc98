"""Supervised fine-tuning: datasets and the training loop."""
