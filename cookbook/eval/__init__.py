"""What to measure while a model trains."""
