"""Learn Before Represent: turn a causal LLM into the embedding model of a domain, on a cluster."""

__version__ = "0.1.0"
