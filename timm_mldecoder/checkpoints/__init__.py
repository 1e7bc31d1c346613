"""Checkpoint files: the layout of ours, and published layouts converted to it."""
