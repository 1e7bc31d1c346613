"""Signals, errors, log, files."""
