"""The synchronous engine: one base model, the adapters on it, and what is done with them.

It knows tokens, weights and gradients; messages, renderers and configs are none of its
business. Every call runs to its end on the calling thread: `worker` owns that thread.
"""
