"""The model that flags, a checkpoint or a folder describe."""
