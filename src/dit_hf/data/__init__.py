"""Images and latents for training."""

try:
    import datasets  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(f"{__name__} needs {error.name}: pip install 'dit_hf[train]'.") from error
