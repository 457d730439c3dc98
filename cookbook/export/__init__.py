"""Takes a fine-tuned model away: adapters, merged weights, GGUF, Ollama, the hub."""
