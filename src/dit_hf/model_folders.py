"""
Folders of models and pipelines, checked before diffusers loads them. It allocates what a configuration asks for, takes
missing weights from whatever is in memory, and has many kinds of errors for a damaged file.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from types import MappingProxyType
from typing import Any
from zipfile import is_zipfile

import diffusers
import torch
from diffusers import BaseGuidance
from diffusers.models.modeling_utils import ModelMixin
from diffusers.quantizers import DiffusersAutoQuantizer
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from safetensors import safe_open

from .files import check_file, read_json, reading
from .pipeline_dit_class_cond import OPTIONAL_COMPONENTS, check_id2label, check_train_timesteps, shown
from .schedulers import try_scheduler
from .scheduling_flow_match_sde import FlowMatchSDEScheduler
from .scheduling_flow_match_truncated_euler import FlowMatchTruncatedEulerScheduler
from .transformer_dit import MAX_PARAMETERS, SIZES


MODEL_CONFIG = "config.json"
SCHEDULER_CONFIG = "scheduler_config.json"
LIBRARIES = ("diffusers", "dit_hf")
# Schedulers of this package, whose code a folder carries as well.
OWN_SCHEDULERS = {
    "scheduling_flow_match_sde": FlowMatchSDEScheduler,
    "scheduling_flow_match_truncated_euler": FlowMatchTruncatedEulerScheduler,
}
WEIGHTS = "diffusion_pytorch_model"
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# Bounds of the whole numbers in another library's configuration, beyond every published one.
MAX_NUMBER = 2**20
MAX_LAYERS = 64
MAX_ENTRIES = 2**17
MAX_COMPONENTS = 1000
# In a configuration, what can't be an argument of a class.
RESERVED = ("self", "dtype")
VARIANT = re.compile(r"\w[\w.-]*")
# In RAE's encoders of transformers before 5, which diffusers does not read, in the order of their replacement.
OLD_ENCODER_NAMES = {
    ".attention.attention.query.": ".attention.q_proj.",
    ".attention.attention.key.": ".attention.k_proj.",
    ".attention.attention.value.": ".attention.v_proj.",
    ".attention.output.dense.": ".attention.o_proj.",
    "encoder.encoder.layer.": "encoder.layers.",
    ".intermediate.dense.": ".mlp.fc1.",
    ".output.dense.": ".mlp.fc2.",
}
# Attention in the autoencoders of diffusers before 0.16, which it still reads.
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def read_index(path: str | Path, transformers: Mapping[str, Sequence[str]] = MappingProxyType({})) -> dict[str, Any]:
    """
    Reads a `model_index.json`.

    Args:
        path (`str` or `Path`): The file.
        transformers (`Mapping[str, Sequence[str]]`):
            Names of classes that its transformer and its guide may have; any if not given.

    Returns:
        `dict`: whose `transformer` and `scheduler`, and if there are any `vae`, `guide` and `guider`, are a library
        and a class.

    Raises:
        ValueError: naming the file and the key that holds something else.
    """
    index = read_config(path)
    if len(index) > MAX_COMPONENTS:
        raise ValueError(f"{path} has {len(index):,} entries; at most {MAX_COMPONENTS} are read.")
    for name in ("transformer", "scheduler", *OPTIONAL_COMPONENTS):
        entry = index.get(name, [None, None] if name in OPTIONAL_COMPONENTS else None)
        pair = entry if isinstance(entry, list) and len(entry) == 2 else []
        none = name in OPTIONAL_COMPONENTS and pair == [None, None]
        if not none and not (pair and all(isinstance(word, str) and word.isidentifier() for word in pair)):
            raise ValueError(f'{path} has {name}: {entry!r}; it must be a library and a class, ["diffusers", "…"].')
        if name in transformers and not none and pair[1] not in transformers[name]:
            raise ValueError(
                f"{path}: its {name} is a {pair[1]}, not a {transformers[name][0]}. To use your own, load it "
                f"and pass it as `{name}=`."
            )
    if index["scheduler"][0] in OWN_SCHEDULERS:
        index["scheduler"] = ["dit_hf", index["scheduler"][1]]
    call = index.get("recommended_call")
    if call is not None and not isinstance(call, dict):
        raise ValueError(f"{path} has recommended_call: {call!r}; it must be an object.")
    try:
        check_id2label(index.get("id2label"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return index


def read_config(path: str | Path) -> dict[str, Any]:
    """
    Reads a configuration of diffusers.

    Args:
        path (`str` or `Path`): The file.

    Returns:
        `dict`

    Raises:
        ValueError: naming the file and the key that diffusers would stumble over.
    """
    config = read_json(path)
    for name in ("_use_default_values", "_ignore_files"):
        value = config.get(name, [])
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise ValueError(f"{path} has {name}: {value!r}; it must be a list of names.")
    for name in RESERVED:
        if name in config:
            raise ValueError(f"{path} has {name}: {shown(config[name])}, which is not an option; remove it.")
    if config.get("quantization_config") is None:
        config.pop("quantization_config", None)
    elif not isinstance(config["quantization_config"], dict):
        raise ValueError(f"{path} has quantization_config: {config['quantization_config']!r}; it must be an object.")
    return config


def check_options(**options: Any) -> None:
    """Raises `ValueError` for arguments of `from_pretrained` or `save_pretrained` of another type."""
    for name in ("variant", "subfolder", "revision", "custom_pipeline"):
        value = options.get(name)
        fits = isinstance(value, str) and (name != "variant" or VARIANT.fullmatch(value))
        if value is not None and not fits:
            raise ValueError(f"`{name}` is {shown(value)}; it must be a name, such as 'fp16' or 'main'.")
    size = options.get("max_shard_size")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int | str)):
        raise ValueError(f"`max_shard_size` is {shown(size)}; it must be a number of bytes, or a text such as '10GB'.")


def check_pipeline_folder(
    folder: str | Path,
    index: Mapping[str, Any],
    given: Collection[str] = (),
    variant: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """
    Checks scheduler, autoencoder and guider of a pipeline; transformer and guide are checked where they are loaded.

    Args:
        folder (`str` or `Path`): The folder of the pipeline.
        index (`Mapping`): From `read_index`.
        given (`Collection[str]`): Components that are not loaded from the folder.
        variant (`str`, *optional*): Of the weights.
        trust_remote_code (`bool`, defaults to `False`): Whether components of other libraries are left to diffusers.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    folder = Path(folder)
    for name, kind in (("scheduler", "scheduler"), ("vae", "autoencoder"), ("guider", "guider")):
        library = index.get(name, [None, None])[0]
        if name in given or library is None or (trust_remote_code and library not in LIBRARIES):
            continue
        if (found := find_class(index, name)) is None:
            raise ValueError(
                f"{folder / 'model_index.json'} has {name}: {index[name]!r}, and diffusers {diffusers.__version__} "
                f"has no such {kind}. To use your own, load it and pass it as `{name}=`."
            )
        if name == "scheduler":
            check_scheduler(folder / name / SCHEDULER_CONFIG, found)
        elif name == "guider":
            check_guider(folder / name / found.config_name, found)
        else:
            accept_old_encoders(found)
            check_autoencoder(folder / name / MODEL_CONFIG, found, variant)


def check_scheduler(path: Path, scheduler_class: Any) -> None:
    """Raises `ValueError` for a scheduler's config that can't be used."""
    config = read_config(path)
    check_numbers(config, path)
    check_train_timesteps(path, config)
    with reading(path, f"the config of a {scheduler_class.__name__}"):
        try_scheduler(scheduler_class, config)


def check_guider(path: Path, guider_class: Any) -> None:
    """Raises `ValueError` for a guider's config that can't be used."""
    config = read_config(path)
    check_numbers(config, path)
    with reading(path, f"the config of a {guider_class.__name__}"):
        guider_class.from_config(config)


def check_autoencoder(path: Path, vae_class: Any, variant: str | None = None) -> None:
    """Raises `ValueError` for an autoencoder's config that can't be used, or weights that are not of it."""
    config = read_config(path)
    check_numbers(config, path)
    with reading(path, f"the config of an {vae_class.__name__}"), torch.device("meta"):
        vae = vae_class.from_config(config)
    if sum(parameter.numel() for parameter in vae.parameters()) > MAX_PARAMETERS:
        raise ValueError(f"{path} describes more than {MAX_PARAMETERS:,} parameters.")
    if isinstance(channels := vae.config.get("latent_channels"), int):
        with reading(path, f"the config of an {vae_class.__name__}"), torch.no_grad():
            try:
                vae.decode(torch.empty(1, channels, 8, 8, device="meta"), return_dict=False)
            except RuntimeError as error:
                if "meta" not in str(error):  # some decoders ask for values, which there are none of
                    raise
    if "quantization_config" in config:
        check_quantization(path, config["quantization_config"])
    else:
        check_weights(path.parent, vae, variant, all_known=False)


def check_quantization(path: str | Path, config: Mapping) -> None:
    """Raises `ValueError` for quantized weights that diffusers does not know, or can't read on this machine."""
    with reading(path, "the config of quantized weights"):
        DiffusersAutoQuantizer.from_config(dict(config), pre_quantized=True).validate_environment()


def find_class(index: Mapping[str, Any], name: str) -> Any:
    """The class of diffusers that an index names for a component, or None if there is none of its kind."""
    library, class_name = index[name]
    own = {scheduler.__name__: scheduler for scheduler in OWN_SCHEDULERS.values()}
    found = own.get(class_name) or getattr(diffusers, class_name, None) if library in LIBRARIES else None
    kind = {"scheduler": SchedulerMixin, "guider": BaseGuidance}.get(name, ModelMixin)
    fits = isinstance(found, type) and issubclass(found, kind) and (name != "vae" or hasattr(found, "decode"))
    return found if fits else None


def check_numbers(value: Any, path: str | Path, key: str = "", depth: int = 0) -> None:
    """Raises `ValueError` for a whole number so large that what is built from it would fill the memory."""
    if isinstance(value, (dict, list)):
        entries = value.items() if isinstance(value, dict) else ((key, entry) for entry in value)
        if len(value) > (MAX_LAYERS if "block" in key else MAX_ENTRIES) or depth > 8:
            raise ValueError(f"{path} has {key}: {str(value)[:100]}…, which is too large.")
        for name, entry in entries:
            check_numbers(entry, path, f"{key}.{name}" if isinstance(value, dict) and key else name, depth + 1)
    elif isinstance(value, int):
        largest = MAX_LAYERS if "layers" in key else MAX_NUMBER
        if abs(value) > largest:
            raise ValueError(f"{path} has {key}: {str(value)[:100]}; it must be a number of at most {largest:,}.")


def check_weights(folder: Path, model: torch.nn.Module, variant: str | None = None, all_known: bool = True) -> None:
    """
    Compares names, shapes and types of the tensors in a folder's weights with a model's.

    Args:
        folder (`Path`): The folder; without weights in it nothing is checked.
        model (`torch.nn.Module`): Of the folder's configuration, on any device.
        variant (`str`, *optional*): Of the weights, if there are files of it.
        all_known (`bool`, defaults to `True`): Whether tensors are refused that the model has not.

    Raises:
        ValueError: naming the file and the first tensor that is missing, unknown, or of another shape or type.
    """
    chosen = weight_files(folder, variant)
    if not chosen:
        return
    expected = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()}
    found = set()
    for file, listed in chosen.items():
        header = read_header(file)
        if listed is not None and (stray := sorted(listed ^ header.keys())):
            raise ValueError(f"{file}: {stray[0]!r} is only in it, or only in the weight_map of its index.")
        for key, (shape, dtype) in header.items():
            key = present_name(key, expected, OLD_NAMES if listed else OLD_ENCODER_NAMES | OLD_NAMES)
            found.add(key)
            if key not in expected:
                if all_known:
                    raise ValueError(f"{file}: {key!r} is not a weight of the model that the config describes.")
                continue
            wanted, wanted_dtype = expected[key]
            if wanted_dtype.is_floating_point and dtype not in FLOATS:
                raise ValueError(f"{file}: {key!r} has type {dtype}; weights are floating-point numbers.")
            # Old attention layers were convolutions of one pixel, or the other way round.
            if [side for side in shape if side > 1] != [side for side in wanted if side > 1]:
                raise ValueError(f"{file}: {key!r} has shape {shape}; the config needs {wanted}.")
    if missing := sorted(expected.keys() - found):
        raise ValueError(f"{next(iter(chosen))}: {missing[0]!r} is missing, as are {len(missing) - 1} other weights.")


def present_name(key: str, expected: Collection[str], old_names: Mapping[str, str]) -> str:
    """The name that a weight of an earlier version has now: parts are replaced until it is expected."""
    for old, new in old_names.items():
        key = key if key in expected else key.replace(old, new)
    return key


def rename_encoder(model: torch.nn.Module, state_dict: dict[str, torch.Tensor]) -> None:
    """Gives the weights of an `AutoencoderRAE` the names that its encoder has in this transformers."""
    expected = model.state_dict()
    for key in list(state_dict):
        state_dict[present_name(key, expected, OLD_ENCODER_NAMES)] = state_dict.pop(key)


def accept_old_encoders(vae_class: Any) -> None:
    """Lets an `AutoencoderRAE` load weights saved with transformers 4, which would leave its encoder random."""
    if vae_class.__name__ == "AutoencoderRAE":  # it calls this before it compares names, except for sharded weights
        vae_class._fix_state_dict_keys_on_load = rename_encoder


def check_num_layers(path: Path, config: Mapping, variant: str | None = None) -> None:
    """Raises `ValueError` for more blocks than the weights beside a config have tensors, before they are built."""
    tensors = sum(len(read_header(file)) for file in weight_files(path.parent, variant))
    layers = config.get("num_layers")
    if tensors and isinstance(layers, int) and tensors < layers <= SIZES["num_layers"][1]:  # others are no size at all
        raise ValueError(f"{path} has num_layers: {layers}; the weights beside it are {tensors} tensors.")


def weight_files(folder: Path, variant: str | None = None) -> dict[Path, set[str] | None]:
    """
    The files of weights that diffusers loads: all that an index names, and their tensors, else the one; those of a
    variant first.
    """
    for mark in dict.fromkeys((f".{variant}" if variant else "", "")):
        for kind in ("safetensors", "bin"):
            for index in (f"{WEIGHTS}.{kind}.index{mark}.json", f"{WEIGHTS}.{kind}{mark}.index.json"):
                if (folder / index).exists():
                    return check_weight_index(folder / index)
            if (folder / f"{WEIGHTS}{mark}.{kind}").exists():
                return {folder / f"{WEIGHTS}{mark}.{kind}": None}
    return {}


def check_weight_index(path: Path) -> dict[Path, set[str] | None]:
    """
    The files that an index of weights names, with the tensors in each; `ValueError` for one outside of its folder, or
    if there are none.
    """
    index = read_json(path)
    if not isinstance(index.get("metadata"), dict):
        raise ValueError(f"{path} has metadata: {shown(index.get('metadata'))}; it must be an object.")
    weight_map = index.get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if stray := [name for name in names or [None] if not (isinstance(name, str) and name and Path(name).name == name)]:
        raise ValueError(f"{path} has the file {stray[0]!r} in its weight_map; it must be one beside it.")
    return {
        path.with_name(file): {key for key, name in weight_map.items() if name == file} for file in sorted(set(names))
    }


def read_header(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shapes and types of a file's tensors, by name; `ValueError` if it is damaged or holds something else."""
    check_file(file)
    if file.suffix == ".bin":
        with reading(file, "weights"):
            try:
                weights = torch.load(file, map_location="meta", weights_only=True, mmap=is_zipfile(file))
            except UnpicklingError:  # torch's own message advises to run the code
                raise ValueError(f"{file} is damaged, or holds code, which is not run; weights are tensors.") from None
        if not isinstance(weights, dict) or not all(isinstance(each, torch.Tensor) for each in weights.values()):
            raise ValueError(f"{file} must hold a dictionary of tensors.")
        return {str(key): (tuple(each.shape), TYPES.get(each.dtype, str(each.dtype))) for key, each in weights.items()}
    with reading(file, "safetensors weights"), safe_open(file, framework="pt") as tensors:
        slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118  it is no dictionary
        return {key: (tuple(each.get_shape()), each.get_dtype()) for key, each in slices.items()}
