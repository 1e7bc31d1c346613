"""The command `export`."""
