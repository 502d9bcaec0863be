"""Opening checkpoint files safely: nothing in them is executed."""

import argparse
import re
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file


# What `DistributedDataParallel` and `torch.compile` put before every key.
WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")
# Entries that training scripts keep their weights under, by what `weights` asks for.
ENTRIES = {"ema": ("ema", "model_ema", "ema_model"), "model": ("model", "module", "state_dict")}


def find_file(path: Path) -> Path:
    """
    The file of weights of a diffusers model's or pipeline's folder.

    Args:
        path (`Path`): A folder; a file is returned as it is.

    Returns:
        `Path`

    Raises:
        ValueError: if there is none in the folder.
    """
    if not path.is_dir():
        return path
    names = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
    found = [folder / name for folder in (path, path / "transformer") for name in names if (folder / name).is_file()]
    if not found:
        raise ValueError(f"There is no {names[0]} in {path} or in {path / 'transformer'}.")
    return found[0]


def read_checkpoint(path: str | Path) -> dict:
    """
    Opens a `.pt`, `.bin` or `.safetensors` file without executing anything in it, its tensors mapped, not copied.

    Args:
        path (`str` or `Path`): The file. In a pickle, tensors, plain values and `argparse.Namespace` are allowed.

    Returns:
        `dict`: what was saved.

    Raises:
        ValueError: if the file is missing, damaged, or holds anything else; the message names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no checkpoint file {path}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            mapped = zipfile.is_zipfile(path)  # files from before torch 1.6 are not
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged file fails in many ways inside of torch and pickle
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if " " not in reason:
            reason = f"it is no checkpoint ({type(error).__name__})"
        refused = re.search(r"GLOBAL (\S+)|Unsupported (?:class|global|operand) \S+", str(error))
        if refused:
            reason = f"it holds {refused.group(1) or refused.group(0)}, which is neither a tensor nor a plain value"
        raise ValueError(f"Can't read checkpoint {path}: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"Checkpoint {path} holds a {type(content).__name__}, not a dictionary of weights.")
    return content


def select_weights(content: dict, weights: str, path: str | Path) -> dict[str, torch.Tensor]:
    """
    The state dict inside a checkpoint: the file itself, or the entry that training scripts keep it under.

    Prefixes that `DistributedDataParallel` and `torch.compile` put before every key are removed.

    Args:
        content (`dict`): From [`read_checkpoint`].
        weights (`str`):
            `"ema"` (entries `ema`, `model_ema`, `ema_model`) or `"model"` (`model`, `module`, `state_dict`); ignored
            if the file is a state dict itself, or wraps its only one as `module` or `state_dict`.
        path (`str` or `Path`): Named in errors.

    Returns:
        `dict[str, torch.Tensor]`

    Raises:
        ValueError: if there are no such weights.
    """
    if weights not in ENTRIES:
        raise ValueError(f"`weights` is {weights!r}; it must be 'ema' or 'model'.")
    found = {kind: [name for name in names if name in content] for kind, names in ENTRIES.items()}
    present = found["ema"] + found["model"]
    if found[weights]:
        content = content[found[weights][0]]
    elif present and "model" not in content and not found["ema"]:
        content = content[present[0]]  # a wrapper, not a training checkpoint
    elif present:
        (other,) = ENTRIES.keys() - {weights}
        raise ValueError(
            f"Checkpoint {path} has no {weights!r} weights; it holds {', '.join(sorted(map(str, content)))}. Pass "
            f"weights={other!r} (`--weights {other}`) for those of {present[0]!r}."
        )
    if not isinstance(content, dict):
        raise ValueError(f"Checkpoint {path}: its weights are a {type(content).__name__}, not a dictionary.")
    stray = [key for key, value in content.items() if not isinstance(key, str) or not isinstance(value, torch.Tensor)]
    if stray:
        raise ValueError(f"Checkpoint {path}: {stray[0]!r} is not a tensor.")
    return {WRAPPERS.sub("", key): value for key, value in content.items()}


def training_arguments(content: dict) -> dict:
    """
    The training script's arguments that a checkpoint carries.

    Args:
        content (`dict`): From [`read_checkpoint`].

    Returns:
        `dict`: empty if there are none.
    """
    arguments = content.get("args")
    if isinstance(arguments, argparse.Namespace):
        return vars(arguments)
    return arguments if isinstance(arguments, dict) else {}
