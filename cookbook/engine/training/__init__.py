"""A training step on the device: partition, losses, backward, AdamW, and the numbers that come back."""
