"""Runnable recipes: `python -m recipes.<name> key=value ...`."""
