"""The `datasets` library, or which extra installs it; modules of this package that need it import it from here."""

try:
    import datasets
except ModuleNotFoundError as error:
    raise ImportError(f"dit_hf.data needs {error.name}: pip install 'dit_hf[train]'.") from error


__all__ = ["datasets"]
