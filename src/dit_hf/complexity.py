"""Multiply-adds of a configuration, counted from its shapes: what the paper calls Gflops (DiT §4, table 4).

Shapes: `N` tokens, `D` width, `L` layers.
"""

from collections.abc import Mapping

from .transformer_ddt import FREQUENCIES, MODULATION_VECTORS, stream_sizes
from .transformer_dit import FREQUENCY_DIM, TIME_EMBEDDINGS, count_modulation_vectors, swiglu_width
from .transformer_jit import NUM_VECTORS


# A condition is one token for time and one for the class.
CONDITION_TOKENS = 2


def count_macs(config: Mapping, height: int | None = None, width: int | None = None) -> int:
    """
    Multiply-adds of one forward pass of one sample; the matrix products are counted, as in the paper.

    Args:
        config (`Mapping`): A `DiTTransformer2DModel`'s, `JiTTransformer2DModel`'s or `DDTTransformer2DModel`'s config.
        height (`int`, *optional*): Rows of the latent; `sample_size` if not given.
        width (`int`, *optional*): Columns of the latent; `sample_size` if not given.

    Returns:
        `int`: multiply-adds; divide by 1e9 for the paper's Gflops.

    Raises:
        ValueError: if the size is not divisible by the patch size.

    Example:

        >>> from dit_hf import DiTTransformer2DModel
        >>> from dit_hf.complexity import count_macs
        >>> tiny = DiTTransformer2DModel(sample_size=8, num_layers=2, num_attention_heads=4, attention_head_dim=12)
        >>> count_macs(tiny.config)
        1017600
    """
    height, width = height or config["sample_size"], width or config["sample_size"]
    patch_size = config["patch_size"]
    if height % patch_size or width % patch_size:
        raise ValueError(f"The latent size {height}×{width} is not divisible by the patch size {patch_size}.")
    if "num_encoder_layers" in config:
        return _ddt_macs(config, (height // patch_size) * (width // patch_size))
    if "bottleneck_dim" in config:
        return _jit_macs(config, (height // patch_size) * (width // patch_size))
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    # Two matrices of the full width, or three of two thirds of it.
    hidden_dim = int(dim * config["mlp_ratio"])
    ff_widths = 3 * int(2 / 3 * hidden_dim) if config["ff"] == "swiglu" else 2 * hidden_dim
    image_tokens = (height // patch_size) * (width // patch_size)
    in_dim = patch_size**2 * config["in_channels"]
    out_dim = in_dim * (2 if config["learn_sigma"] else 1)
    conditioning = config["conditioning"]

    tokens = image_tokens + (CONDITION_TOKENS if conditioning == "in_context" else 0)
    block = _attention_macs(tokens, tokens, dim) + tokens * dim * ff_widths
    if conditioning == "cross_attention":
        block += _attention_macs(tokens, CONDITION_TOKENS, dim)
    # Adaptive layer norms regress their vectors once per sample, and the head two.
    vectors = count_modulation_vectors(conditioning, config["modulation_shift"])
    block += vectors * dim**2
    head_modulation = 2 * dim**2 if vectors else 0

    times = 2 if config["interval_embedding"] else 1
    embed = image_tokens * in_dim * dim + times * (TIME_EMBEDDINGS[config["time_embedding"]] * dim + dim**2)
    return embed + config["num_layers"] * block + head_modulation + tokens * dim * out_dim


def describe_blocks(config: Mapping) -> str:
    """
    The blocks of a model in words.

    Args:
        config (`Mapping`): As [`count_macs`] takes it.

    Returns:
        `str`: such as `"12 blocks of width 384"`, or `"28 + 2 blocks of widths 1152 and 2048"` of two streams.
    """
    if "num_encoder_layers" not in config:
        return f"{config['num_layers']} blocks of width {config['num_attention_heads'] * config['attention_head_dim']}"
    counts, widths = zip(*((count, heads * head_dim) for count, heads, head_dim in stream_sizes(config)), strict=True)
    width = f"widths {widths[0]} and {widths[1]}" if widths[0] != widths[1] else f"width {widths[0]}"
    return f"{counts[0]} + {counts[1]} blocks of {width}"


def _jit_macs(config, image_tokens):
    """JiT's: a bottleneck of patches, and context tokens from one block on."""
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    patch_values = config["patch_size"] ** 2 * config["in_channels"]
    ff_widths = 3 * swiglu_width(dim, config["mlp_ratio"])
    embed = image_tokens * config["bottleneck_dim"] * (patch_values + dim) + FREQUENCY_DIM * dim + dim**2
    blocks = 0
    for index in range(config["num_layers"]):
        tokens = image_tokens + (config["in_context_len"] if index >= config["in_context_start"] else 0)
        blocks += _attention_macs(tokens, tokens, dim) + tokens * dim * ff_widths + NUM_VECTORS * dim**2
    return embed + blocks + 2 * dim**2 + image_tokens * dim * patch_values


def _ddt_macs(config, tokens):
    """DDT's: in the encoder a sample has one condition, in the decoder each token has its own."""
    patch_values = config["patch_size"] ** 2 * config["in_channels"]
    count, widths = 0, []
    for conditions, (num_layers, heads, head_dim) in zip((1, tokens), stream_sizes(config), strict=True):
        dim = heads * head_dim
        hidden = int(dim * config["mlp_ratio"])
        ff_widths = 3 * swiglu_width(dim, config["mlp_ratio"]) if config["ff"] == "swiglu" else 2 * hidden
        block = _attention_macs(tokens, tokens, dim) + tokens * dim * ff_widths
        count += num_layers * (block + conditions * MODULATION_VECTORS * dim**2) + tokens * patch_values * dim
        widths.append(dim)
    encoder_dim, dim = widths
    count += 2 * FREQUENCIES[config["time_embedding"]] * encoder_dim + encoder_dim**2
    projection = tokens * encoder_dim * dim if encoder_dim != dim else 0
    return count + projection + tokens * dim * (2 * dim + patch_values)


def _attention_macs(queries, keys, dim):
    """Query and output projections, key and value projections, scores and weighted values."""
    return 2 * queries * dim**2 + 2 * keys * dim**2 + 2 * queries * keys * dim
