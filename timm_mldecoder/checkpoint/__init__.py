"""Checkpoints: what is in a file, reading, writing, ranking, resuming, published layouts, model folders."""
