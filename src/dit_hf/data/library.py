"""The `datasets` library, imported when it is used first: cached latents are trained on without it."""

from typing import TYPE_CHECKING, Any


class _Datasets:
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of introspection
            raise AttributeError(name)
        try:
            import datasets as library
        except ModuleNotFoundError as error:
            raise ImportError(f"dit_hf.data needs {error.name}: pip install 'dit_hf[train]'.") from error
        return getattr(library, name)


if TYPE_CHECKING:
    import datasets
else:
    datasets = _Datasets()

__all__ = ["datasets"]
