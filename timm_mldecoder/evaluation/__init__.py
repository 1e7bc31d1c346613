"""One evaluation pass over a split, shared by training and validation."""
