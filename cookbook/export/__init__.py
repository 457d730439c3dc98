"""Exports a fine-tuned model: adapters, merged weights, GGUF, Ollama, the hub."""
