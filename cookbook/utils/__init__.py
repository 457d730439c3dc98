"""Helpers below every room: one way to write files, JSON with known types, text that is safe to print.

They know nothing of runs, configs or messages.
"""
