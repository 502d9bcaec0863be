"""Opening checkpoint files safely: nothing in them is executed."""

import argparse
import re
import struct
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from ..files import check_file, first_line


# What `DistributedDataParallel` and `torch.compile` put before every key.
WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")
# Entries that training scripts keep their weights under, by what `weights` asks for.
ENTRIES = {"ema": ("ema", "model_ema", "ema_model", "model_ema1"), "model": ("model", "module", "state_dict")}
# Family of autoencoders -> keys that all of its files have, and no others.
AUTOENCODER_MARKS = {
    "vavae": {"encoder.conv_in.weight", "decoder.conv_in.weight"},
    "rae": {"decoder_embed.weight", "decoder_pred.weight"},
}
# What the keys of RAE's decoder begin with in a checkpoint of its training.
AUTOENCODER_PREFIX = "decoder."
# The pickle of a zip archive has names, shapes and plain values; the tensors are beside it.
MAX_PICKLE_BYTES = 32 * 2**20
ENCRYPTED = 1
# What the opcodes of a file that is no pickle end in.
UNREADABLE = (EOFError, KeyError, IndexError, struct.error)
# The one integer in a state dict: batches that a batch norm has seen.
COUNTER = ".num_batches_tracked"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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

    The checksums of a `.pt` or `.bin` file of torch 1.6 or newer are verified. Older files and `.safetensors` have
    none: there only missing bytes are noticed.

    Args:
        path (`str` or `Path`): The file. In a pickle, tensors, plain values and `argparse.Namespace` are allowed.

    Returns:
        `dict`: what was saved.

    Raises:
        ValueError: if the file is missing, damaged, or holds anything else; the message names the file.
    """
    try:
        path = check_file(path)
    except ValueError as error:
        raise ValueError(f"Can't read checkpoint {path}: {error}") from None
    sizes: list[int] = []
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        mapped = zipfile.is_zipfile(path)  # files from before torch 1.6 are not
        records = check_archive(path) if mapped else []

        def measure(storage, location):
            sizes.append(storage.nbytes())
            return storage

        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location=measure, weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged file fails in many ways inside of torch, zip and pickle
        raise ValueError(f"Can't read checkpoint {path}: {_explain(error)}") from error
    # A tensor that is longer than its record would be filled with the bytes behind it.
    if mapped and sorted(sizes) != sorted(records):
        raise ValueError(
            f"Can't read checkpoint {path}: its tensors need {sum(sizes):,} bytes in {len(sizes)} records and it has "
            f"{sum(records):,} in {len(records)}; the file is damaged."
        )
    if not isinstance(content, dict):
        raise ValueError(
            f"Checkpoint {path} holds a {type(content).__name__}, not a dictionary of weights; save the model's "
            "state_dict."
        )
    return content


def check_archive(path: Path) -> list[int]:
    """
    Verifies the zip archive that `torch.save` writes, against its own checksums.

    Args:
        path (`Path`): The file.

    Returns:
        `list[int]`: bytes of each record of a tensor.

    Raises:
        ValueError: if it is compressed, holds code, or its bytes are not those that were written.
    """
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        for record in records:
            if "/code/" in record.filename:
                raise ValueError("it is a TorchScript archive, which holds code; save the model's state_dict instead.")
            if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & ENCRYPTED:
                raise ValueError(f"its {record.filename!r} is compressed or encrypted; pack it again without that.")
            if record.filename.endswith("/data.pkl") and record.file_size > MAX_PICKLE_BYTES:
                raise ValueError(
                    f"its index has {record.file_size:,} bytes; at most {MAX_PICKLE_BYTES:,} are read. Save the "
                    "state_dict alone."
                )
        if any(record.CRC for record in records):  # or it was written without, by `set_crc32_options(False)`
            for record in records:
                with archive.open(record) as stream:
                    while stream.read(2**20):
                        pass
    return [record.file_size for record in records if re.fullmatch(r"[^/]*/data/[^/]+", record.filename)]


def _explain(error):
    """Why a file can't be read, without the advice of torch to execute what is in it."""
    text = str(error)
    if refused := re.search(r"GLOBAL (\S+)|Unsupported (?:class|global) (\S+)", text):
        return f"it holds {refused[1] or refused[2]}, which is neither a tensor nor a plain value"
    if "legacy .tar format" in text:
        return "it is a tar archive of torch before 0.1.10, which can't be read without executing it"
    if "Bad CRC-32" in text:
        return f"{first_line(error)}: its bytes are not those that were written; get the file again"
    if "failed finding central directory" in text:
        return "the end of its zip archive is missing; get the file again"
    if isinstance(error, UNREADABLE) or type(error).__name__ == "UnpicklingError" or " " not in text:
        return f"`torch.save` did not write it, or it is damaged ({type(error).__name__})"
    return first_line(error)


def find_entry(content: dict, weights: str, path: str | Path) -> str | None:
    """
    The entry that a training script keeps the wanted weights under.

    Args:
        content (`dict`): From [`read_checkpoint`].
        weights (`str`):
            `"ema"` (entries `ema`, `model_ema`, `ema_model`, `model_ema1`), `"model"` (`model`, `module`,
            `state_dict`) or `"auto"`, the first of these that is there; ignored if the file is a state dict itself, or
            wraps its only one as `module` or `state_dict`.
        path (`str` or `Path`): Named in errors.

    Returns:
        `str`: None if the file is a state dict itself.

    Raises:
        ValueError: if there are no such weights.
    """
    if not isinstance(weights, str) or weights not in ("auto", *ENTRIES):
        raise ValueError(f"`weights` is {weights!r}; it must be one of auto, {', '.join(ENTRIES)}.")
    # An entry for an average that was not kept may be empty.
    empty = {name for name, value in content.items() if value is None or (isinstance(value, dict) and not value)}
    found = {kind: [name for name in names if name in content.keys() - empty] for kind, names in ENTRIES.items()}
    present = found["ema"] + found["model"]
    if weights == "auto" or not present:
        return present[0] if present else None
    if found[weights]:
        return found[weights][0]
    if "model" not in content and not found["ema"]:
        return present[0]  # a wrapper, not a training checkpoint
    (other,) = ENTRIES.keys() - {weights}
    raise ValueError(
        f"Checkpoint {path} has no {weights!r} weights; it holds {', '.join(sorted(map(str, content)))}. Pass "
        f"weights={other!r} (`--weights {other}`) for those of {present[0]!r}."
    )


def select_weights(
    content: dict, entry: str | None, path: str | Path, beginnings: tuple[str, ...] = ("",)
) -> dict[str, torch.Tensor]:
    """
    The state dict inside a checkpoint.

    Prefixes that `DistributedDataParallel` and `torch.compile` put before every key are removed.

    Args:
        content (`dict`): From [`read_checkpoint`].
        entry (`str`, *optional*): From [`find_entry`].
        path (`str` or `Path`): Named in errors.
        beginnings (`tuple[str, ...]`, *optional*): Of the keys that are taken; all if not given.

    Returns:
        `dict[str, torch.Tensor]`

    Raises:
        ValueError: if it holds anything but weights.
    """
    content = content if entry is None else content[entry]
    if not isinstance(content, dict):
        raise ValueError(f"Checkpoint {path}: its weights are a {type(content).__name__}, not a dictionary.")
    content = {key: value for key, value in content.items() if WRAPPERS.sub("", str(key)).startswith(beginnings)}
    for key, value in content.items():
        if problem := find_problem(key, value) if isinstance(key, str) else "is not the name of a weight":
            raise ValueError(f"Checkpoint {path}: {key!r} {problem}.")
    unwrapped = {WRAPPERS.sub("", key): value for key, value in content.items()}
    if len(unwrapped) < len(content):
        raise ValueError(
            f"Checkpoint {path} holds a weight twice, with and without `module.` or `_orig_mod.`; remove one of them."
        )
    return unwrapped


def find_autoencoder(content: dict) -> str | None:
    """
    The family of autoencoders that a file's weights are of, by their keys.

    Args:
        content (`dict`): From [`read_checkpoint`].

    Returns:
        `str`: a name of [`dit_hf.checkpoints.autoencoders.AUTOENCODERS`]; None if they are no autoencoder's.
    """
    entries = [content, *(content.get(name) for names in ENTRIES.values() for name in names)]
    keys = [{WRAPPERS.sub("", str(key)) for key in entry} for entry in entries if isinstance(entry, dict)]
    keys += [{key.removeprefix(AUTOENCODER_PREFIX) for key in names} for names in keys]
    return next((name for name, marks in AUTOENCODER_MARKS.items() if any(marks <= names for names in keys)), None)


def find_problem(key: str, value) -> str | None:
    """
    What makes a value no weight.

    Args:
        key (`str`): Of a state dict.
        value: Of this key.

    Returns:
        `str`: the end of a sentence that begins with its key; None if it is a plain tensor of floating-point numbers,
        or a batch norm's counter, whose size the file has the bytes for.
    """
    if not isinstance(value, torch.Tensor):
        return "is not a tensor"
    if value.is_nested or value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        return "is a nested, sparse, quantized or meta tensor, not a plain one"
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        return f"is a {type(value).__name__}, not a plain tensor"
    if value.dtype not in FLOATS and not (value.dtype == torch.int64 and key.endswith(COUNTER)):
        return f"holds {value.dtype}, not floating-point numbers of 16 to 64 bits"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"has shape {tuple(value.shape)}, and is a view that repeats its storage"
    return None


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
