"""Continuations of prompts: many at once, one token of each at a time."""
