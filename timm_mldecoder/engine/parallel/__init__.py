"""Models whose weights, gradients and optimizer state are divided over ranks."""
