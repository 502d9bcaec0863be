"""Images, their classes and their latents for training and evaluation."""
