"""The command `train`: build a run and train it."""
