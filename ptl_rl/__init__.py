"""Gradual compaction of reasoning language models: prune a little, recover, check, repeat."""

__version__ = "0.1.0"
