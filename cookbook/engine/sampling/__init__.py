"""Sampling by continuous batching: many sequences at once, one token of each at a time."""
