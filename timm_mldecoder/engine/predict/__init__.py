"""Predictions over many images: where they come from, how they are written, and the pass over them."""
