"""Checkpoints of the original code bases."""
