"""Images and latents for training."""
