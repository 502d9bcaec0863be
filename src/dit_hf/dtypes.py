"""The type of weights, as every supported diffusers takes it."""

from typing import Any

import diffusers
import torch


# Before diffusers 0.40 it was `torch_dtype`, which is deprecated since.
DTYPE_ARGUMENT = "torch_dtype" if diffusers.__version__.startswith(("0.38.", "0.39.")) else "dtype"

# Types that a model computes in; float8 weights are for diffusers' `enable_layerwise_casting`.
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def parse_dtype(arguments: dict[str, Any]) -> dict[str, Any]:
    """
    Arguments of a `from_pretrained` with a type that every supported diffusers understands.

    Args:
        arguments (`dict`):
            With `dtype` or `torch_dtype`, a `torch.dtype` or its name, or for a pipeline a dictionary of these by
            component; or neither.

    Returns:
        `dict`: with the type, if there is one, as a `torch.dtype` or a dictionary of these, under the argument's name
        of this diffusers.

    Raises:
        ValueError: if there is no such floating-point type.
    """
    arguments = dict(arguments)
    given = [arguments.pop(name, None) for name in ("dtype", "torch_dtype")]
    dtype = given[1] if given[0] is None else given[0]
    if dtype is None:
        return arguments
    parsed = {name: _named(each) for name, each in dtype.items()} if isinstance(dtype, dict) else _named(dtype)
    return arguments | {DTYPE_ARGUMENT: parsed}


def _named(dtype):
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(named, torch.dtype) or named not in FLOATS:
        raise ValueError(
            f"`dtype` is {dtype!r}; it must be a torch.dtype or its name, one of {', '.join(map(str, FLOATS))}."
        )
    return named
