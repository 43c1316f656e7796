"""Hugging Face checkpoints: read by byte range, written whole or not at all, told apart by hash."""
