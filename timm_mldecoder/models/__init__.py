"""ML-Decoder heads, cosine classifiers and attention maps on timm models."""
