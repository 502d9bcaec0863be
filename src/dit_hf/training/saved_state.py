"""What a checkpoint holds, read as data: nothing in it can run code, and a file that does not belong there is refused.

A checkpoint has accelerate's files (models, optimizer, random states), our own states as `states.json` and
`states.safetensors`, and `checkpoint.json`, which lists size and checksum of every file.
"""

import hashlib
import json
import os
import pickle
import re
import stat
import tempfile
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import load as load_data
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .._version import __version__
from ..files import check_file, read_json, reading


MANIFEST = "checkpoint.json"
STATES, TENSORS = "states.json", "states.safetensors"
# What accelerate writes: alone or with DDP, with FSDP, with DeepSpeed.
ACCELERATE = re.compile(
    r"model(_\d+)?\.safetensors|optimizer(_\d+)?\.bin|scaler\.pt|random_states_\d+\.pkl"
    r"|pytorch_model_fsdp(_\d+)?(_rank\d+)?\.bin|optimizer(_\d+)?_rank\d+\.bin"
    r"|(pytorch_model_fsdp|optimizer)_\d+/(\.metadata|__\d+_\d+\.distcp)"
    r"|latest|zero_to_\w+\.py|pytorch_model(_\d+)?/\w+\.pt"
)
# What file browsers and NFS leave in a folder.
NOT_OURS = re.compile(r"(.*/)?(\.DS_Store|Thumbs\.db|desktop\.ini|\.nfs[^/]*)")
# Version 0.2 had accelerate pickle our states, in the order in which they were registered, and had no manifest.
PICKLED = re.compile(r"custom_checkpoint_\d+\.pkl|scheduler\.bin")
# What states consist of; anything else of an object, such as a method, is none.
PLAIN = (int, float, list, dict, deque, type(None))
# What the index of an FSDP checkpoint consists of. It is a plain pickle, which torch reads without restrictions.
INDEX_GLOBALS = re.compile(
    r"torch\.distributed\.checkpoint\.(metadata\.(Metadata|MetadataIndex|StorageMeta|TensorStorageMetadata"
    r"|BytesStorageMetadata|ChunkStorageMetadata|TensorProperties|_MEM_FORMAT_ENCODING)|filesystem\._StorageInfo)"
    r"|torch\.serialization\._get_layout|torch\.(Size|strided|(b?float|u?int|complex)\d+\w*|bool)"
    r"|pathlib(\._local)?\.(Posix|Windows)Path|collections\.OrderedDict|builtins\.set"
)


@contextmanager
def weights_only(folder: str | Path | None = None) -> Iterator[None]:
    """
    Whatever a library asks for in this block, torch unpickles tensors and numbers alone.

    Args:
        folder (`str` or `Path`, *optional*): The checkpoint that is read; DeepSpeed's have a few more classes.
    """
    force, never = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name, None) for name in (force, never)}
    os.environ[force] = "1"
    try:
        with torch.serialization.safe_globals(_deepspeed_classes(folder)):
            yield
    finally:
        del os.environ[force]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _deepspeed_classes(folder):
    """What DeepSpeed saves beside tensors: classes that hold settings and counters."""
    if folder is None or not (Path(folder) / "pytorch_model").is_dir():
        return []
    try:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address
    except ImportError:  # what reads its checkpoints is missing, too
        return []
    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def write_states(folder: str | Path, states: Mapping[str, dict], is_main_process: bool = True) -> None:
    """
    Writes states as JSON, their tensors as safetensors.

    Args:
        folder (`str` or `Path`): The checkpoint.
        states (`Mapping[str, dict]`): Nested dictionaries and lists of numbers, text and tensors, by name.
        is_main_process (`bool`, defaults to `True`): Whether to write.
    """
    if not is_main_process:
        return
    tensors: dict[str, torch.Tensor] = {}
    plain = _without_tensors(states, "", tensors)
    (Path(folder) / STATES).write_text(json.dumps(plain), encoding="utf-8")
    save_file(tensors, Path(folder) / TENSORS)


def _without_tensors(value, name, tensors):
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {str(key): _without_tensors(item, f"{name}.{key}".strip("."), tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tensors(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
    return value


def _with_tensors(value, tensors):
    if isinstance(value, dict) and value.keys() == {"tensor"}:
        return tensors[value["tensor"]]
    if isinstance(value, dict):
        return {key: _with_tensors(item, tensors) for key, item in value.items()}
    return [_with_tensors(item, tensors) for item in value] if isinstance(value, list) else value


def load_states(folder: str | Path, states: Mapping[str, Any]) -> None:
    """
    Restores objects from a checkpoint, also from one of version 0.2.

    Args:
        folder (`str` or `Path`): The checkpoint, checked by [`check_checkpoint`].
        states (`Mapping[str, Any]`): Objects with `load_state_dict`, by name, in the order of version 0.2.

    Raises:
        ValueError: if a state is missing, or does not fit its object; the message names the file.
    """
    folder = Path(folder)
    if (folder / MANIFEST).exists():
        plain = read_json(folder / STATES)
        with reading(folder / TENSORS, "states of a training"):
            tensors = load_file(folder / TENSORS)
        sources = dict.fromkeys(states, folder / STATES)
    else:
        scheduler = folder / "scheduler.bin"
        pickled = iter(sorted(folder.glob("custom_checkpoint_*.pkl"), key=lambda path: int(path.stem.split("_")[-1])))
        sources = {
            name: scheduler if name == "schedule" and scheduler.exists() else next(pickled, folder) for name in states
        }
        if folder in sources.values() or next(pickled, None) is not None:
            what = "fewer" if folder in sources.values() else "more"
            raise ValueError(f"{folder} holds {what} states than this run has; it is of a run with other settings.")
        tensors, plain = {}, {}
        for name, source in sources.items():
            with weights_only(), reading(source, "state of a training"):
                plain[name] = load_data(source, map_location="cpu")
    for name, stateful in states.items():
        try:
            stateful.load_state_dict(_with_tensors(_known_state(plain[name], _attributes(stateful)), tensors))
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise ValueError(f"{sources[name]} does not hold the state {name!r} of this run: {error!r}") from error


def _attributes(stateful):
    """Those of an object, and its properties."""
    properties = [name for name, value in vars(type(stateful)).items() if isinstance(value, property)]
    return vars(stateful) | {name: getattr(stateful, name) for name in properties}


def _known_state(state, attributes):
    """The keys of a state that an object has as plain data; `ValueError` for a value of another type."""
    state = {key: value for key, value in state.items() if key in attributes and isinstance(attributes[key], PLAIN)}
    for key, value in state.items():
        kind = int | float if isinstance(attributes[key], float) else type(attributes[key])
        if isinstance(attributes[key], list | int | float) and not isinstance(value, kind):
            raise ValueError(f"{key} is {value!r}, where {attributes[key]!r} is usual.")
    return state


def write_manifest(folder: str | Path, step: int, names: Collection[str] = ()) -> None:
    """
    Lists the files of a checkpoint, to see damage and files that were added.

    Args:
        folder (`str` or `Path`): The checkpoint, complete.
        step (`int`): Its step.
        names (`Collection[str]`): Files that other processes see in it; those that are not there do not count.
    """
    folder = Path(folder)
    found = {*files_of(folder), *(name for name in names if (folder / name).is_file())}
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in sorted(found)
    }
    text = json.dumps({"dit_hf": __version__, "step": step, "files": files}, indent=2)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_of(folder: Path) -> list[str]:
    """Names of all files below a folder, its links and special files too, but for what NFS and file browsers leave."""
    names = (
        Path(parent, name).relative_to(folder).as_posix()
        for parent, folders, files in os.walk(folder)
        for name in (*files, *(name for name in folders if os.path.islink(os.path.join(parent, name))))
    )
    return sorted(name for name in names if not NOT_OURS.fullmatch(name))


def check_checkpoint(folder: str | Path) -> None:
    """
    Checks that a checkpoint is complete, has no file that does not belong there, and can't run code. Reads names,
    sizes and headers, not the weights.

    Args:
        folder (`str` or `Path`): The checkpoint.

    Raises:
        ValueError: naming the file.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder) if os.path.lexists(folder / MANIFEST) else None
    listed = None if manifest is None else manifest["files"]
    found = [name for name in files_of(folder) if name != MANIFEST]
    for name in found:
        mode = os.lstat(folder / name).st_mode
        if not stat.S_ISREG(mode):
            raise ValueError(f"{folder / name} is a {'link' if stat.S_ISLNK(mode) else 'pipe, socket or device'}.")
        known = ACCELERATE.fullmatch(name) or (
            PICKLED.fullmatch(name) if listed is None else name in (STATES, TENSORS)
        )
        if not known or (listed is not None and name not in listed):
            raise ValueError(f"{folder / name} does not belong to a checkpoint of this package; remove it.")
    sharded = any(name.startswith("pytorch_model") for name in found)
    needed = listed or (() if sharded else ("model.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl"))
    if missing := [name for name in needed if name not in found]:
        raise ValueError(f"{folder} lacks {', '.join(missing)}; it is incomplete.")
    for name in found:
        if listed is not None and (size := (folder / name).stat().st_size) != listed[name]["bytes"]:
            raise ValueError(f"{folder / name} is damaged: it has {size:,} bytes of {listed[name]['bytes']:,}.")
    with weights_only(folder):
        for name in found:
            _check_content(folder / name)


def _read_manifest(folder):
    if not stat.S_ISREG(os.lstat(folder / MANIFEST).st_mode):
        raise ValueError(f"{folder / MANIFEST} is not a regular file.")
    manifest = read_json(folder / MANIFEST)
    files = manifest.get("files")
    well_formed = isinstance(files, dict) and all(
        isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)
        for entry in files.values()
    )
    if not well_formed or STATES not in files or TENSORS not in files:
        raise ValueError(f"{folder / MANIFEST} is not the list of a checkpoint's files.")
    if f"checkpoint-{manifest.get('step')}" != folder.name:
        step = manifest.get("step")
        raise ValueError(f"{folder} holds the checkpoint of step {step}; rename the folder to checkpoint-{step}.")
    return manifest


def _check_content(path):
    """Refuses a file whose header is damaged, or that holds more than data."""
    check_file(path)
    if path.suffix == ".safetensors":
        with reading(path, "safetensors"), safe_open(path, "pt"):
            pass
    elif path.name == ".metadata":
        _check_index(path)
    elif path.suffix in (".bin", ".pkl", ".pt"):
        with reading(path, "state of a training"):
            try:
                load_data(path, map_location="cpu", mmap=True)
            except pickle.UnpicklingError as error:
                found = re.search(r"(?:GLOBAL|global) (\S+)", str(error))
                what = f"({found[1]}) " if found else ""
                raise ValueError(
                    f"{path} holds more than tensors and numbers {what}and is not opened, as that can run code."
                ) from None


class _IndexUnpickler(pickle.Unpickler):
    """Reads the index of an FSDP checkpoint, which consists of a few classes without code."""

    def find_class(self, module, name):
        if not INDEX_GLOBALS.fullmatch(f"{module}.{name}"):
            raise ValueError(f"it names {module}.{name}, which can run code")
        return super().find_class(module, name)


def _check_index(path):
    with open(path, "rb") as file, reading(path, "index of a checkpoint"):
        _IndexUnpickler(file).load()


def verify_checkpoint(folder: str | Path) -> None:
    """
    Compares the checksums of a checkpoint; one of version 0.2 has none.

    Args:
        folder (`str` or `Path`): The checkpoint, checked by [`check_checkpoint`].

    Raises:
        ValueError: naming the file that has changed.
    """
    folder = Path(folder)
    if (folder / MANIFEST).exists():
        for name, entry in read_json(folder / MANIFEST)["files"].items():
            if _sha256(folder / name) != entry["sha256"]:
                raise ValueError(f"{folder / name} is damaged: its checksum is not that of {MANIFEST}.")


@contextmanager
def accelerate_files(folder: str | Path) -> Iterator[Path]:
    """
    The folder that accelerate loads. A checkpoint of version 0.2 is linked without the pickles of our states, which
    accelerate would load as code.

    Args:
        folder (`str` or `Path`): The checkpoint.

    Yields:
        `Path`
    """
    folder = Path(folder).absolute()
    if (folder / MANIFEST).exists():
        yield folder
        return
    with tempfile.TemporaryDirectory() as view:
        for path in folder.iterdir():
            if not PICKLED.fullmatch(path.name):
                os.symlink(path, Path(view, path.name), target_is_directory=path.is_dir())
        yield Path(view)
