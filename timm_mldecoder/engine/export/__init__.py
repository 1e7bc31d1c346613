"""Exported models: their formats, and how they are compared with PyTorch."""
