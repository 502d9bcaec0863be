"""The commands of `dit-hf`, one module each; the scripts under `conversion/` and `examples/` call the same `main`."""
