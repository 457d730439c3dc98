"""Talking with a model: conversations, and a terminal to hold them in."""
