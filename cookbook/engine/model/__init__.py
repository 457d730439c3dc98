"""The network: loading, packed attention, adapters, sharding, and the linear layer onto the vocabulary."""
