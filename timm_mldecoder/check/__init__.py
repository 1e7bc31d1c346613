"""Look at a dataset before training on it: the command `timm-mldecoder check`."""
