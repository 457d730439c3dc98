"""The synchronous engine: one base model, the adapters on it, and what is done with them.

It knows tokens, weights and gradients, and nothing of messages, renderers or configs. Every call runs on the
calling thread, which `worker` owns.
"""
