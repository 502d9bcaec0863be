"""Stage 1 of RAE (https://github.com/bytetriper/RAE): a file of the decoder, and an encoder that is published apart.

Both become an `AutoencoderRAE`.
"""

import math
from itertools import takewhile
from typing import Any

import torch
from diffusers import AutoencoderRAE
from transformers import AutoConfig, Dinov2WithRegistersModel

from ...hub import check_available, connected
from ...pipeline_dit_class_cond import RAE_EPSILON, rae_positions
from ..loading import check_keys
from ..parsing import check_finite
from .family import AutoencoderFamily
from .reference import reference_decode_tokens


BLOCK = "decoder_layers.{}"
# Layers, original -> diffusers, whose keys begin with "decoder.".
LAYERS = {name: name for name in ("decoder_embed", "decoder_norm", "decoder_pred")}
BLOCK_LAYERS = {
    **{f"attention.attention.{name}": f"attention.to_{name[0]}" for name in ("query", "key", "value")},
    "attention.output.dense": "attention.to_out.0",
    **{name: name for name in ("intermediate.dense", "output.dense", "layernorm_before", "layernorm_after")},
}
POSITIONS = "decoder_pos_embed"
# Width -> heads of the published decoders ViT-B, L and XL.
KNOWN_HEADS = {768: 12, 1024: 16, 1152: 16}
# What an `AutoencoderRAE` is built with, and leaves no trace in the weights of an encoder.
ENCODER_FACTS = ("num_attention_heads", "hidden_act", "layer_norm_eps", "num_register_tokens", "use_swiglu_ffn")
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINO = "dinov2_with_registers"
PUBLISHED_ENCODER = "facebook/dinov2-with-registers-base"


def load_encoder(name: str) -> Dinov2WithRegistersModel:
    """
    The frozen encoder, of which the last norm has no weights in RAE.

    Args:
        name (`str`): Folder or Hub id.

    Returns:
        `Dinov2WithRegistersModel`: in eval mode, in float32.

    Raises:
        ValueError: if it is another model, or its weights are not whole.
        OSError: if there is none.
    """
    check_available(name, "config.json")
    with connected():
        config = AutoConfig.from_pretrained(name)
        if config.model_type != DINO:
            raise ValueError(f"--encoder {name} is of type {config.model_type}; DINOv2 with registers is needed.")
        found: Any = Dinov2WithRegistersModel.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    model, loaded = found
    if missing := sorted({*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])}):
        raise ValueError(f"--encoder {name}: its weights lack {missing[0]!r}, and {len(missing) - 1} others.")
    model.layernorm.weight = model.layernorm.bias = None
    return model.eval()


def check_encoder(model: Dinov2WithRegistersModel, arguments: dict, name: str) -> None:
    """`ValueError` if an encoder is none that an `AutoencoderRAE` of these arguments builds."""
    with torch.device("meta"):
        built = AutoencoderRAE(**arguments).encoder
    for fact in ENCODER_FACTS:
        given, needed = getattr(model.config, fact), getattr(built.config, fact)
        if given != needed:
            raise ValueError(f"--encoder {name} has {fact}={given!r}, and AutoencoderRAE builds {needed!r} only.")
    shapes = {key: tuple(weight.shape) for key, weight in built.state_dict().items()}
    check_keys(model.state_dict(), shapes, name)


class RAEDecoderFamily(AutoencoderFamily):
    """RAE's decoder; the statistics of its latents are a file of their own."""

    name = "rae"
    model = AutoencoderRAE
    beginnings = ("decoder_", "trainable_cls_token")
    stats_forms = ("rae",)
    written = ("decoder.",)

    def infer(self, weights, hints, path):
        def shape(key, rank=2):
            if key not in weights:
                raise ValueError(f"Checkpoint {path} is no decoder of RAE: the key {key!r} is missing.")
            if weights[key].ndim != rank or 0 in weights[key].shape:
                given = tuple(weights[key].shape)
                raise ValueError(f"Checkpoint {path}: {key!r} has shape {given}, where {rank} axes are needed.")
            return weights[key].shape

        width, channels = shape("decoder_embed.weight")
        if channels % 64:
            raise ValueError(
                f"Checkpoint {path}: its latents have {channels} channels; AutoencoderRAE takes multiples of 64."
            )
        patch_size, tokens = math.isqrt(shape("decoder_pred.weight")[0] // 3), shape(POSITIONS, 3)[1] - 1
        if tokens < 1 or math.isqrt(tokens) ** 2 != tokens:
            raise ValueError(f"Checkpoint {path}: {POSITIONS!r} is of {tokens} tokens, which is no square.")
        heads = hints.decoder_num_attention_heads or KNOWN_HEADS.get(width)
        if heads is None:
            known = ", ".join(map(str, KNOWN_HEADS))
            raise ValueError(
                f"Checkpoint {path}: the heads of a decoder of width {width} are unknown (known widths: {known}); "
                "pass decoder_num_attention_heads (`--decoder_num_attention_heads`)."
            )
        if width % heads:
            raise ValueError(f"Checkpoint {path}: its width {width} is not divisible by {heads} attention heads.")
        layers = takewhile(lambda index: f"{BLOCK.format(index)}.intermediate.dense.weight" in weights, range(256))
        return {
            "encoder_hidden_size": channels,
            "decoder_hidden_size": width,
            "decoder_num_hidden_layers": len(list(layers)),
            "decoder_num_attention_heads": heads,
            "decoder_intermediate_size": shape(f"{BLOCK.format(0)}.intermediate.dense.weight")[0],
            "patch_size": patch_size,
        }

    def latent_channels(self, config):
        return config["encoder_hidden_size"]

    def describe(self, config):
        layers = config["decoder_num_hidden_layers"]
        return f"a decoder of {layers} block{'s' * (layers != 1)} of width {config['decoder_hidden_size']}"

    def skeleton(self, config, weights):
        grid = math.isqrt(weights[POSITIONS].shape[1] - 1)
        # Only its decoder counts; the encoder is not in the file.
        encoder = {"encoder_num_hidden_layers": 0, "encoder_patch_size": 1, "encoder_input_size": grid}
        return AutoencoderRAE(**config, **encoder)

    def key_table(self, config):
        layers = dict(LAYERS)
        for index in range(config["decoder_num_hidden_layers"]):
            block = BLOCK.format(index)
            layers |= {f"{block}.{original}": f"{block}.{ours}" for original, ours in BLOCK_LAYERS.items()}
        keys = {f"{old}.{kind}": f"decoder.{new}.{kind}" for old, new in layers.items() for kind in ("weight", "bias")}
        return keys | {"trainable_cls_token": "decoder.trainable_cls_token"}

    def computed_tables(self, weights):
        return {POSITIONS: rae_positions(weights["decoder_embed.weight"].shape[0], weights[POSITIONS].shape[1] - 1)}

    def model_tables(self, vae):
        return {POSITIONS: rae_positions(vae.config["decoder_hidden_size"], vae.num_patches)}

    def complete(self, config, weights, statistics, encoder):
        if encoder is None:
            raise ValueError(
                "RAE's file has a decoder and no encoder; pass encoder (`--encoder`), the folder or Hub id of "
                f"the one that it was trained with, such as {PUBLISHED_ENCODER}."
            )
        grid = math.isqrt(weights[POSITIONS].shape[1] - 1)
        height, width = len(statistics[0][0]), len(statistics[0][0][0])
        if (height, width) not in ((1, 1), (grid, grid)):
            raise ValueError(
                f"The latents' statistics are of {height}×{width} positions, and the decoder has {grid}×{grid}."
            )
        model = load_encoder(encoder)
        if model.config.hidden_size != config["encoder_hidden_size"]:
            raise ValueError(
                f"The encoder {encoder} has width {model.config.hidden_size}, and the decoder is for one of "
                f"{config['encoder_hidden_size']}; give the one that it was trained with."
            )
        arguments = config | {
            "encoder_type": "dinov2",
            "encoder_patch_size": model.config.patch_size,
            "encoder_num_hidden_layers": model.config.num_hidden_layers,
            "encoder_input_size": grid * model.config.patch_size,
        }
        check_encoder(model, arguments, encoder)
        check_finite(model.state_dict(), encoder)
        others = {f"encoder.{key}": weight for key, weight in model.state_dict().items()}
        return arguments | dict(zip(("latents_mean", "latents_std"), statistics, strict=True)), others

    def buffers(self, vae):
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
        latents = {f"_{name}": torch.tensor(vae.config[name]) for name in ("latents_mean", "latents_std")}
        positions = {f"decoder.{POSITIONS}": self.model_tables(vae)[POSITIONS]}
        return {"encoder_mean": mean, "encoder_std": std} | latents | positions

    def outputs(self, config, vae, generator):
        grid, heads = math.isqrt(vae.num_patches), config["decoder_num_attention_heads"]
        latents = torch.randn(1, self.latent_channels(config), grid, grid, generator=generator)
        decoded = vae.decode(latents.to(vae.dtype)).sample
        raw = latents * (vae._latents_std.float() + RAE_EPSILON) + vae._latents_mean.float()
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))

        def reference(weights):
            return [reference_decode_tokens(weights, heads, raw, config["patch_size"]) * std + mean]

        return [decoded], reference


RAE_DECODER = RAEDecoderFamily()
