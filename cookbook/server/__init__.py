"""A server of the Tinker protocol and of an OpenAI-compatible endpoint, for several clients at a time."""
