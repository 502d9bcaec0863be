"""Measures whether a converted pipeline computes what its checkpoint computes, and converts back to it.

    dit-hf verify --checkpoint_path DiT-XL-2-256x256.pt --pretrained_model_name_or_path dit-xl-2-256

Expected: three forward passes of a batch of two; exit code 2 if a difference is more than rounding.
"""

import argparse
from pathlib import Path

import torch

from ..checkpoints import FAMILIES
from ..checkpoints.autoencoders import (
    AUTOENCODERS,
    NORM_NUM_GROUPS,
    Autoencoder,
    AutoencoderHints,
    parse_autoencoder,
)
from ..checkpoints.autoencoders.parity import measure_autoencoder_parity
from ..checkpoints.links import download, is_link
from ..checkpoints.parity import Parity, measure_parity
from ..checkpoints.parsing import Checkpoint, parse_checkpoint
from ..checkpoints.reading import find_autoencoder, find_file, read_checkpoint
from ..checkpoints.saving import TRAINING_ONLY_FILE
from ..command_line import ArgumentParser, integer, real, run
from ..conversion import load_transformer
from ..data.autoencoders import load_autoencoder
from ..hub import source_file


TRANSFORMER_FLAGS = (
    *("num_attention_heads", "has_null_class", "embedders_of_block"),
    *("in_context_start", "num_encoder_blocks", "noise_scale", "in_channels"),
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that tell how a checkpoint is to be read."""
    parser.add_argument(
        "--checkpoint_path",
        required=True,
        help="A .pt, .bin or .safetensors file, the folder of a diffusers DiT, or the link to a file.",
    )
    parser.add_argument(
        "--family",
        choices=tuple(dict.fromkeys(("auto", *FAMILIES, *AUTOENCODERS))),
        default="auto",
        help="Code base that wrote the checkpoint.",
    )
    parser.add_argument(
        "--weights",
        choices=("auto", "ema", "model"),
        default="auto",
        help="Weights of a training checkpoint; auto takes the EMA weights if there are any.",
    )
    parser.add_argument(
        "--num_attention_heads",
        type=integer(at_least=1),
        nargs="+",
        help="Attention heads, for widths that were never published; two numbers for a model of two streams.",
    )
    parser.add_argument(
        "--in_context_start", type=integer(at_least=0), help="Block before which the context tokens of a JiT join."
    )
    parser.add_argument(
        "--num_encoder_blocks", type=integer(at_least=1), help="Number of encoder blocks of a DDT or DiT-DH."
    )
    parser.add_argument(
        "--in_channels", type=integer(at_least=1), help="Latent channels of a DDT, if they are neither 4 nor 3."
    )
    parser.add_argument("--noise_scale", type=real(above=0), help="Standard deviation of the noise of a JiT.")
    null_class = parser.add_mutually_exclusive_group()
    null_class.add_argument(
        "--no_null_class",
        dest="has_null_class",
        action="store_false",
        default=None,
        help="Trained without label dropout: every row of the class table is a class.",
    )
    null_class.add_argument(
        "--null_class",
        dest="has_null_class",
        action="store_true",
        default=None,
        help="The last row of the class table is the null class, whatever the number of rows.",
    )
    parser.add_argument(
        "--embedders_of_block",
        type=integer(at_least=0),
        help="Block whose copy of the embedders is used, if the copies of a diffusers DiT differ.",
    )
    parser.add_argument(
        "--norm_num_groups",
        type=integer(at_least=1),
        default=NORM_NUM_GROUPS,
        help="Groups of the group norms of an original autoencoder.",
    )
    parser.add_argument(
        "--decoder_num_attention_heads",
        type=integer(at_least=1),
        help="Attention heads of the decoder of an original RAE, for widths that were never published.",
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="Type of the converted weights.")


def read(args: argparse.Namespace) -> Checkpoint | Autoencoder:
    """The checkpoint of these arguments, a transformer's or an autoencoder's; a linked one is downloaded first."""
    if is_link(args.checkpoint_path):
        args.checkpoint_path = str(download(args.checkpoint_path))
    content = read_checkpoint(find_file(Path(args.checkpoint_path)))
    held = find_autoencoder(content)
    is_named = args.family in AUTOENCODERS.keys() - FAMILIES.keys()
    if is_named or (held and args.family in ("auto", held)):
        for flag in TRANSFORMER_FLAGS if held else ():
            if getattr(args, flag) is not None:
                raise ValueError(f"--{flag} is for transformers, and the checkpoint is an autoencoder; omit it.")
        return parse_autoencoder(args.checkpoint_path, autoencoder_hints(args), content, args.weights, args.family)
    return parse_checkpoint(
        args.checkpoint_path,
        args.num_attention_heads,
        args.family,
        args.weights,
        args.embedders_of_block,
        args.has_null_class,
        content,
        args.in_context_start,
        args.num_encoder_blocks,
        args.noise_scale,
        args.in_channels,
    )


def autoencoder_hints(args: argparse.Namespace) -> AutoencoderHints:
    """What these arguments say of an original autoencoder."""
    return AutoencoderHints(args.norm_num_groups, args.decoder_num_attention_heads)


def verify(checkpoint: Checkpoint, name: str | Path, dtype: str, label: str | Path | None = None) -> None:
    """Reloads a pipeline and compares; prints the differences, and raises if they are more than rounding."""
    model, is_pipeline = load_transformer(str(name), DTYPES[dtype])
    file = f"transformer/{TRAINING_ONLY_FILE}" if is_pipeline else TRAINING_ONLY_FILE
    report(measure_parity(checkpoint, model, source_file(model, file)), label or name)


def verify_autoencoder(
    autoencoder: Autoencoder, name: str | Path, dtype: str, label: str | Path | None = None
) -> None:
    """As [`verify`], for an autoencoder alone."""
    report(measure_autoencoder_parity(autoencoder, load_autoencoder(name, dtype=DTYPES[dtype])), label or name)


def report(parity: Parity, name: str | Path) -> None:
    """Prints the differences, and raises if they are more than rounding."""
    print(f"Parity: {parity}")
    if not parity.holds:
        raise ValueError(f"{name} does not compute what its checkpoint computes: {parity}")


def parse_args():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--pretrained_model_name_or_path",
        "--model_path",
        required=True,
        help="The converted pipeline: a folder, a Hub id or a bundled name; or the folder of a model.",
    )
    return parser.parse_args()


def main():
    args = parse_args()
    checkpoint = read(args)
    compare = verify_autoencoder if isinstance(checkpoint, Autoencoder) else verify
    compare(checkpoint, args.pretrained_model_name_or_path, args.dtype)


if __name__ == "__main__":
    run(main)
