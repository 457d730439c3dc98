"""Evaluators: what is measured while a model trains, and the builders that configs name."""
