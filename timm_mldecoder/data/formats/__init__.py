"""Readers of multi-label datasets in their published formats, one file per format."""
