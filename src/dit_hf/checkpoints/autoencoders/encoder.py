"""The encoder of RAE's autoencoder, a DINOv2 with registers as transformers saves it, read as data: no code runs."""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderRAE
from safetensors.torch import load_file
from transformers import Dinov2WithRegistersConfig

from ...command_line import integer
from ...files import read_json, reading
from ...model_folders import OLD_ENCODER_NAMES, check_numbers, present_name, read_header
from ..links import download_from_hub
from ..loading import check_keys
from ..parsing import check_finite


FILES = ("config.json", "model.safetensors")
PUBLISHED = "facebook/dinov2-with-registers-base"
MODEL_TYPE = "dinov2_with_registers"
SIZES = ("hidden_size", "num_attention_heads", "num_hidden_layers", "patch_size")
# What an `AutoencoderRAE` builds one value of.
FACTS = (
    *("hidden_act", "layer_norm_eps", "mlp_ratio", "num_attention_heads", "num_register_tokens", "qkv_bias"),
    "use_swiglu_ffn",
)
MAX_LAYERS = 64
# Of the last norm, which has no weights in RAE.
DROPPED = ("layernorm.weight", "layernorm.bias")


def load_encoder(name: str) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    """
    Reads an encoder.

    Args:
        name (`str`): Folder or Hub id.

    Returns:
        `tuple`: arguments of `AutoencoderRAE` that describe it, and its weights with the names of `AutoencoderRAE`'s
        encoder.

    Raises:
        ValueError: if it is another model, one that `AutoencoderRAE` does not build, or damaged.
        OSError: if there is none.
    """
    try:
        config_file, weights_file = (_find(name, file) for file in FILES)
        config = _read_config(config_file)
        arguments = {
            "encoder_type": "dinov2",
            "encoder_hidden_size": config["hidden_size"],
            "encoder_num_hidden_layers": config["num_hidden_layers"],
            "encoder_patch_size": config["patch_size"],
        }
        needed = _build(arguments, config)
        shapes = {
            present_name(key, needed, OLD_ENCODER_NAMES): shape
            for key, (shape, _) in read_header(weights_file).items()
        }
        header = {key: torch.empty(shape, device="meta") for key, shape in shapes.items() if key not in DROPPED}
        check_keys(header, needed, name)
        with reading(weights_file, "weights of an encoder"):
            weights = load_file(weights_file)
        weights = {present_name(key, needed, OLD_ENCODER_NAMES): weight for key, weight in weights.items()}
        weights = {key: weight for key, weight in weights.items() if key not in DROPPED}
        check_finite(weights, name)
    except ValueError as error:
        raise ValueError(f"--encoder: {error}") from None
    return arguments, weights


def _find(name, file):
    if Path(name).is_dir():
        if not (path := Path(name, file)).is_file():
            raise ValueError(f"{name} has no {file}; pass the folder or Hub id of an encoder, such as {PUBLISHED}.")
        return path
    if Path(name).exists() or name.count("/") != 1:
        raise ValueError(f"{name} must be the folder or the Hub id of an encoder, such as {PUBLISHED}.")
    return download_from_hub(name, file)


def _read_config(file):
    """The sizes and facts of a config, with the defaults of transformers."""
    config = read_json(file)
    if (found := config.get("model_type")) != MODEL_TYPE:
        raise ValueError(f"{file} is of type {found!r}; a DINOv2 with registers is needed, such as {PUBLISHED}.")
    check_numbers(config, file)
    defaults = Dinov2WithRegistersConfig()
    config = {key: config.get(key, getattr(defaults, key)) for key in dict.fromkeys((*SIZES, *FACTS))}
    for key in SIZES:
        integer(at_least=1, at_most=MAX_LAYERS if key == "num_hidden_layers" else None).check(
            f"{key} of {file}", config[key]
        )
    if config["hidden_size"] % 64:
        raise ValueError(f"{file} has hidden_size: {config['hidden_size']}; AutoencoderRAE takes multiples of 64.")
    return config


def _build(arguments: Mapping, config: Mapping) -> dict[str, tuple[int, ...]]:
    """Shapes of the encoder that `AutoencoderRAE` builds; `ValueError` if it is another than the config describes."""
    with torch.device("meta"):
        built = AutoencoderRAE(**arguments, encoder_input_size=arguments["encoder_patch_size"]).encoder
    for fact in FACTS:
        if config[fact] != (needed := getattr(built.config, fact)):
            raise ValueError(f"it has {fact}={config[fact]!r}, and AutoencoderRAE builds {needed!r} only.")
    return {key: tuple(weight.shape) for key, weight in built.state_dict().items()}
