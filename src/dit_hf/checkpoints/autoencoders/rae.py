"""Stage 1 of RAE (https://github.com/bytetriper/RAE): a file of the decoder, and an encoder that is published apart.

Both become an `AutoencoderRAE`.
"""

import math
from itertools import takewhile

import torch
from diffusers import AutoencoderRAE

from ...pipeline_dit_class_cond import RAE_EPSILON, rae_positions
from ..reading import AUTOENCODER_PREFIX
from .encoder import PUBLISHED, load_encoder
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
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class RAEDecoderFamily(AutoencoderFamily):
    """RAE's decoder; the statistics of its latents are a separate file."""

    name = "rae"
    model = AutoencoderRAE
    beginnings = ("decoder_", "trainable_cls_token", "decoder.")
    prefix = AUTOENCODER_PREFIX
    stats_forms = ("rae",)
    written = ("decoder.",)

    def infer(self, weights, hints, path):
        def shape(key, rank=2):
            if key not in weights:
                raise ValueError(f"Checkpoint {path} is not a decoder of RAE: the key {key!r} is missing.")
            if weights[key].ndim != rank or 0 in weights[key].shape:
                given = tuple(weights[key].shape)
                raise ValueError(
                    f"Checkpoint {path}: {key!r} has shape {given}, where {rank} axes with values are needed."
                )
            return weights[key].shape

        width, channels = shape("decoder_embed.weight")
        if width % 4:
            raise ValueError(f"Checkpoint {path}: its width is {width}; the table of positions takes multiples of 4.")
        if channels % 64:
            raise ValueError(
                f"Checkpoint {path}: its latents have {channels} channels; AutoencoderRAE takes multiples of 64."
            )
        values, tokens = shape("decoder_pred.weight")[0], shape(POSITIONS, 3)[1] - 1
        patch_size = math.isqrt(values // 3)
        if values != 3 * patch_size**2:
            raise ValueError(
                f"Checkpoint {path}: 'decoder_pred.weight' gives {values} values per token, which are not a square of "
                "RGB pixels."
            )
        if tokens < 1 or math.isqrt(tokens) ** 2 != tokens:
            raise ValueError(
                f"Checkpoint {path}: {POSITIONS!r} is of {tokens} tokens, which is not a square number; only square "
                "images can be converted."
            )
        heads = hints.decoder_num_attention_heads or KNOWN_HEADS.get(width)
        if heads is None:
            known = ", ".join(map(str, KNOWN_HEADS))
            raise ValueError(
                f"Checkpoint {path}: the heads of a decoder of width {width} are unknown (known widths: {known}); "
                "pass decoder_num_attention_heads (`--decoder_num_attention_heads`), as in the config.json that the "
                "decoder was trained with. The weights do not tell, so no verification can."
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

    def latent_size(self, weights):
        return math.isqrt(weights[POSITIONS].shape[1] - 1)

    def describe(self, config):
        layers = config["decoder_num_hidden_layers"]
        return f"a decoder of {layers} block{'s' * (layers != 1)} of width {config['decoder_hidden_size']}"

    def skeleton(self, config, weights):
        grid = self.latent_size(weights)
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
                f"the one that it was trained with, such as {PUBLISHED}."
            )
        grid = self.latent_size(weights)
        height, width = len(statistics[0][0]), len(statistics[0][0][0])
        if (height, width) not in ((1, 1), (grid, grid)):
            raise ValueError(
                f"The latents' statistics are of {height}×{width} positions, and the decoder has {grid}×{grid}."
            )
        arguments, loaded = load_encoder(encoder)
        if (width := arguments["encoder_hidden_size"]) != config["encoder_hidden_size"]:
            raise ValueError(
                f"--encoder: {encoder} has width {width}, and the decoder is for one of "
                f"{config['encoder_hidden_size']}; pass the one that it was trained with."
            )
        arguments |= config | {"encoder_input_size": grid * arguments["encoder_patch_size"]}
        arguments |= dict(zip(("latents_mean", "latents_std"), statistics, strict=True))
        return arguments, {f"encoder.{key}": weight for key, weight in loaded.items()}

    def find_mismatch(self, config):
        for name, needed in (("reshape_to_2d", True), ("num_channels", 3), ("scaling_factor", 1.0)):
            if config[name] != needed:
                return f"{name}={config[name]!r}"
        return None

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
        mean, std = vae.encoder_mean.float(), vae.encoder_std.float()

        def reference(weights):
            return [reference_decode_tokens(weights, heads, raw, config["patch_size"]) * std + mean]

        return [decoded], reference


RAE_DECODER = RAEDecoderFamily()
