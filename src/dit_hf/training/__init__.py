"""Losses, checkpoints and seeded batches for training."""
