"""Diffusion Transformer in two streams: a condition encoder and a velocity decoder.

Options cover the Decoupled Diffusion Transformer (DDT, Wang et al., https://arxiv.org/abs/2504.05741) and DiT-DH, the
transformer with a wide head of Representation Autoencoders (RAE, Zheng et al., https://arxiv.org/abs/2510.11690).

Shapes: `B` batch, `C` channels, `H W` latent size, `p` patch size, `h w` = `H/p W/p`, `N` = `h·w` tokens, `D` width of
a stream, `E` width of the encoder, `heads` attention heads.

This file imports torch and diffusers only: it is also the code that a Hub repository carries, so it loads with any
diffusers from `MIN_DIFFUSERS` on. Names that are private to diffusers are optional: without them only the feature
that needs them is missing.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from numbers import Real
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn as nn
import torch.nn.functional as F


MIN_DIFFUSERS = "0.38.0"
if tuple(map(int, diffusers.__version__.split(".")[:2])) < tuple(map(int, MIN_DIFFUSERS.split(".")[:2])):
    raise ImportError(
        f"DDTTransformer2DModel needs diffusers >= {MIN_DIFFUSERS}; this is {diffusers.__version__}. "
        "Run `pip install --upgrade diffusers`."
    )

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import (
    GaussianFourierProjection,
    TimestepEmbedding,
    apply_rotary_emb,
    get_1d_rotary_pos_embed,
    get_timestep_embedding,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin


try:  # registration with diffusers' caches
    from diffusers.hooks._helpers import (
        AttentionProcessorMetadata,
        AttentionProcessorRegistry,
        TransformerBlockMetadata,
        TransformerBlockRegistry,
    )
except ImportError:
    TransformerBlockRegistry = None  # type: ignore[assignment,misc]
try:  # the plan for context parallelism
    from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

    TOKENS: Any = ContextParallelInput(split_dim=1, expected_dims=3, split_output=False)
    CONTEXT_PARALLEL_PLAN: Any = {
        "rotary_embed": dict.fromkeys((0, 1), ContextParallelInput(split_dim=0, expected_dims=2, split_output=True)),
        "transformer_blocks.0": {"hidden_states": TOKENS},
        "decoder_blocks.0": {"hidden_states": TOKENS},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }
except (ImportError, TypeError):
    CONTEXT_PARALLEL_PLAN = None
try:  # `attention_kwargs={"scale": s}`
    from diffusers.utils import apply_lora_scale
except ImportError:
    # Copied from dit_hf.transformer_dit.apply_lora_scale
    def apply_lora_scale(argument):
        """Refuses to scale LoRA adapters."""

        def decorate(forward):
            @wraps(forward)
            def call(self, *args, **kwargs):
                if (kwargs.get(argument) or {}).get("scale", 1.0) != 1.0:
                    raise ImportError(
                        f"diffusers {diffusers.__version__} can't scale LoRA adapters; use `set_adapters`."
                    )
                return forward(self, *args, **kwargs)

            return call

        return decorate


TIME_EMBEDDINGS = ("sinusoidal", "fourier")
NORMS = ("layer_norm", "rms_norm")
FEED_FORWARDS = ("gelu", "swiglu")
# Pairs of a cosine and a sine in the timestep embedding, before its MLP.
FREQUENCIES = {"sinusoidal": 128, "fourier": 256}
# The longest period of the sinusoidal timestep embedding, over 2π. DiT's is 10000, for times up to 1000.
MAX_PERIOD = 10
# The model's time is the scheduler's timestep times this: from 0 for data to 1 for noise.
TIMESTEP_SCALE = 0.001
# How tensor parallelism splits the feed-forward layers; a plan may name no layer that is absent.
TENSOR_PARALLEL_FF = {
    "swiglu": {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"},
    "gelu": {"net.0.proj": "colwise", "net.2": "rowwise"},
}
# Shift, scale and gate of each of two branches.
MODULATION_VECTORS = 6
NORM_EPS = 1e-6
# Initial standard deviation of the embedding table and of the timestep MLP.
EMBEDDING_STD = 0.02
# Ranges of the sizes, far beyond every published model: a configuration must not ask for any memory it likes.
SIZES = {
    "sample_size": (1, 2**14),
    "patch_size": (1, 2**14),
    "in_channels": (1, 2**16),
    "num_layers": (2, 2**10),
    "num_encoder_layers": (1, 2**10),
    "num_attention_heads": (1, 2**12),
    "attention_head_dim": (1, 2**14),
    "num_classes": (1, 2**28),
}
# Of the decoder; None is the encoder's.
OPTIONAL_SIZES = {
    "decoder_num_attention_heads": SIZES["num_attention_heads"],
    "decoder_attention_head_dim": SIZES["attention_head_dim"],
}
FACTORS = {"mlp_ratio": 2**10, "rotary_span": 2**14}
CHOICES = {"time_embedding": TIME_EMBEDDINGS, "norm": NORMS, "head_norm": NORMS, "ff": FEED_FORWARDS}
FLAGS = ("position_table", "qk_norm", "bias", "modulation_activation")
MAX_PARAMETERS = 2**34
MAX_TOKENS = 2**18


@dataclass
class DDTTransformer2DModelOutput(Transformer2DModelOutput):
    """
    Output of [`DDTTransformer2DModel`].

    Args:
        sample (`torch.Tensor` of shape `(B, C, H, W)`): The velocity, noise − data.
        encoder_state (`torch.Tensor` of shape `(B, N, E)`):
            What the decoder was conditioned on. Pass it as `encoder_state` to evaluate the decoder alone in a
            neighbouring step.
    """

    encoder_state: torch.Tensor | None = None


def modulate(hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Adaptive layer norm's affine part: `(B, N, D)`, with shift and scale for each token, or `(B, 1, D)` for all."""
    return torch.addcmul(shift, hidden_states, 1 + scale)


# Copied from dit_hf.transformer_dit.sincos_positions
def sincos_positions(height: int, width: int, dim: int) -> torch.Tensor:
    """
    The frozen 2-D sine-cosine table of the original: half of the channels encode the column, half the row.

    Args:
        height (`int`): Tokens in a column.
        width (`int`): Tokens in a row.
        dim (`int`): Width of the model, divisible by 4.

    Returns:
        `torch.Tensor` of shape `(1, height * width, dim)`, float32.
    """
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(
        torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij"
    )
    angles = [axis.reshape(-1, 1) * frequencies for axis in (columns, rows)]  # two of (N, D/4)
    table = torch.cat([function(angle) for angle in angles for function in (torch.sin, torch.cos)], dim=1)
    return table.float().unsqueeze(0)


# Copied from dit_hf.transformer_dit.check_tensors
def check_tensors(optional: bool = False, **tensors: Any) -> None:
    """Raises `ValueError` for an input that is not a dense tensor, by its name."""
    for name, tensor in tensors.items():
        if tensor is None and optional:
            continue
        dense = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        if not dense or tensor.is_nested or tensor.is_quantized:
            given = "sparse, nested or quantized" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(f"`{name}` is {given}; it must be a dense torch.Tensor.")


class DDTPatchEmbed(nn.Module):
    """Cuts latents into patches and projects them."""

    def __init__(self, patch_size: int, in_channels: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        hidden_states = self.proj(latents.to(self.proj.weight.dtype))  # (B, D, h, w)
        # Contiguous, or the whole residual stream inherits the transposed strides, and every norm copies it.
        return hidden_states.flatten(2).transpose(1, 2).contiguous()  # (B, N, D)


class DDTPositions(nn.Module):
    """Adds the sine-cosine table; tables of every size seen are kept."""

    def __init__(self, side: int, dim: int):
        super().__init__()
        self.dim = dim
        self.base_size = (side, side)
        self.register_buffer("positions", sincos_positions(*self.base_size, dim), persistent=False)
        self._other_positions: dict[tuple, torch.Tensor] = {}

    # Copied from dit_hf.transformer_dit.DiTPatchEmbed.positions_for
    def positions_for(self, height, width):
        if (height, width) == self.base_size:
            return self.positions
        known = self._other_positions.get((height, width))
        if known is None or (known.device, known.dtype) != (self.positions.device, self.positions.dtype):
            known = sincos_positions(height, width, self.dim).to(self.positions)
            self._other_positions[height, width] = known
        return known

    def forward(self, hidden_states: torch.Tensor, height: int, width: int) -> torch.Tensor:
        # `from_pretrained` in half precision leaves positions float32, and so would be the sum.
        return (hidden_states + self.positions_for(height, width)).to(hidden_states.dtype)


class DDTRotaryEmbed(nn.Module):
    """
    Angles of rotary positions: half of a head's channels turn with the row, half with the column. With a `span` the
    rows and the columns of every grid go from 0 to there, else they are counted from 0.
    """

    def __init__(self, span: float | None):
        super().__init__()
        self.span = span
        self._tables: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}

    def forward(
        self, height: int, width: int, head_dim: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, `(h·w, D/heads)` float32 each; those of every size seen are kept."""
        key = (height, width, head_dim, device)
        if key not in self._tables:
            self._tables[key] = self._build(*key)
        return self._tables[key]

    def _coordinates(self, count, device):
        if self.span is None:
            return torch.arange(count, device=device)
        return torch.linspace(0, self.span, count, device=device)

    def _build(self, height, width, head_dim, device):
        with torch.inference_mode(False):  # the tables outlive the call, and training may come next
            rows = self._coordinates(height, device).repeat_interleave(width)
            columns = self._coordinates(width, device).repeat(height)
            axes = [get_1d_rotary_pos_embed(head_dim // 2, axis, use_real=True) for axis in (rows, columns)]
            cosines, sines = (torch.cat(tables, dim=1).float() for tables in zip(*axes, strict=True))
            return cosines, sines


class DDTAttnProcessor:
    """Scaled dot-product attention through diffusers' dispatcher, which owns the backends."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "DDTAttention",
        hidden_states: torch.Tensor,
        rotary_emb: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        # The number of heads is left open: under tensor parallelism each rank holds a part of them.
        query, key, value = (states.unflatten(-1, (-1, attn.head_dim)) for states in attn.project(hidden_states))
        if attn.norm_q is not None and attn.norm_k is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        query, key = (apply_rotary_emb(states, rotary_emb, sequence_dim=1) for states in (query, key))
        options = {"backend": self._attention_backend}
        if self._parallel_config is not None:
            options["parallel_config"] = self._parallel_config
        hidden_states = dispatch_attention_fn(query, key, value, **options)  # (B, N, heads, D/heads)
        return attn.to_out[0](hidden_states.flatten(2).to(query.dtype))


class DDTAttention(nn.Module, AttentionModuleMixin):
    """
    Multi-head self-attention with rotary positions. `bias` is that of queries, keys and values; `qk_norm` normalises
    the queries and keys of each head.
    """

    _default_processor_cls = DDTAttnProcessor
    _available_processors = [DDTAttnProcessor]
    processor: Callable[..., torch.Tensor]

    def __init__(self, num_attention_heads: int, attention_head_dim: int, bias: bool, qk_norm: str | None = None):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.heads = num_attention_heads
        self.head_dim = attention_head_dim
        self.use_bias = bias
        self.is_cross_attention = False
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(dim, dim, bias=bias)
        self.to_v = nn.Linear(dim, dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q = build_qk_norm(qk_norm, attention_head_dim) if qk_norm else None
        self.norm_k = build_qk_norm(qk_norm, attention_head_dim) if qk_norm else None
        self.processor = self._default_processor_cls()

    def project(self, hidden_states):
        """Queries, keys and values, `(B, N, D)` each, by the fused layer if there is one."""
        if self.fused_projections:
            return self.to_qkv(hidden_states).chunk(3, dim=-1)
        return self.to_q(hidden_states), self.to_k(hidden_states), self.to_v(hidden_states)

    def forward(self, hidden_states, rotary_emb):
        return self.processor(self, hidden_states, rotary_emb)


class DDTSwiGLU(nn.Module):
    """Gated feed-forward; gate and value are two layers, so that tensor parallelism can split both."""

    def __init__(self, dim: int, inner_dim: int, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(dim, inner_dim, bias=bias)
        self.up_proj = nn.Linear(dim, inner_dim, bias=bias)
        self.down_proj = nn.Linear(inner_dim, dim, bias=bias)

    # Copied from dit_hf.transformer_dit.DiTSwiGLU.forward
    def forward(self, hidden_states):
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


# Copied from dit_hf.transformer_dit.swiglu_width
def swiglu_width(dim: int, mlp_ratio: float) -> int:
    """Hidden width of a SwiGLU with about the parameters of a two-layer perceptron of this ratio."""
    return int(2 / 3 * int(dim * mlp_ratio))


def build_feed_forward(kind, dim, mlp_ratio, bias):
    """SwiGLU, or DiT's two-layer perceptron with tanh GELU inside."""
    if kind == "swiglu":
        return DDTSwiGLU(dim, swiglu_width(dim, mlp_ratio), bias)
    return FeedForward(dim, inner_dim=int(dim * mlp_ratio), activation_fn="gelu-approximate", bias=bias)


def build_norm(kind, dim):
    """A norm over the width; RMS norms have a weight though modulation follows, as in LightningDiT."""
    if kind == "rms_norm":
        return nn.RMSNorm(dim, eps=NORM_EPS)
    return nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=False)


# Copied from dit_hf.transformer_dit.build_qk_norm
def build_qk_norm(kind, head_dim):
    """A norm over a head's channels; layer norms have torch's own epsilon here, as in timm's attention."""
    return nn.RMSNorm(head_dim, eps=NORM_EPS) if kind == "rms_norm" else nn.LayerNorm(head_dim)


def stream_sizes(config: Mapping) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """
    Sizes of the two streams.

    Args:
        config (`Mapping`): A `DDTTransformer2DModel`'s config.

    Returns:
        `tuple`: blocks, heads and channels per head, of the encoder and of the decoder.
    """
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    encoder_layers = config["num_encoder_layers"]
    decoder_heads = config["decoder_num_attention_heads"] or heads
    decoder_head_dim = config["decoder_attention_head_dim"] or head_dim
    return (
        (encoder_layers, heads, head_dim),
        (config["num_layers"] - encoder_layers, decoder_heads, decoder_head_dim),
    )


def count_weights(config: Mapping) -> int:
    """
    Parameters of a model, without biases and norms.

    Args:
        config (`Mapping`): A `DDTTransformer2DModel`'s config.

    Returns:
        `int`
    """
    patch_values = config["in_channels"] * config["patch_size"] ** 2
    count, widths = 0, []
    for num_layers, heads, head_dim in stream_sizes(config):
        dim = heads * head_dim
        hidden_dim = int(dim * config["mlp_ratio"])
        ff = 3 * dim * swiglu_width(dim, config["mlp_ratio"]) if config["ff"] == "swiglu" else 2 * dim * hidden_dim
        count += num_layers * ((4 + MODULATION_VECTORS) * dim**2 + ff) + dim * patch_values
        widths.append(dim)
    encoder_dim, dim = widths
    classes = config["num_classes"] + int(config["class_dropout_prob"] > 0)
    count += encoder_dim * (2 * FREQUENCIES[config["time_embedding"]] + encoder_dim + classes)
    return count + (encoder_dim * dim if encoder_dim != dim else 0) + 2 * dim**2 + dim * patch_values


def check_config(config: Mapping) -> None:
    """
    Checks a model's options before anything is allocated.

    Args:
        config (`Mapping`): All arguments of `DDTTransformer2DModel`.

    Raises:
        ValueError: naming the option, its value and the allowed ones.
    """
    for name, (smallest, largest) in (SIZES | OPTIONAL_SIZES).items():
        size = config[name]
        if size is None and name in OPTIONAL_SIZES:
            continue
        if isinstance(size, bool) or not isinstance(size, int) or not smallest <= size <= largest:
            raise ValueError(f"`{name}` is {size!r}; it must be a whole number from {smallest} to {largest}.")
    for name, bound in FACTORS.items():
        factor = config[name]
        if name == "rotary_span" and factor is None:
            continue
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor <= bound:
            raise ValueError(f"`{name}` is {factor!r}; it must be a number above 0, at most {bound}.")
    dropout = config["class_dropout_prob"]
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
        raise ValueError(f"`class_dropout_prob` is {dropout!r}; it must be from 0 to 1.")
    for name in FLAGS:
        if not isinstance(config[name], bool):
            raise ValueError(f"`{name}` is {config[name]!r}; it must be True or False.")
    for name, allowed in CHOICES.items():
        if config[name] not in allowed:
            raise ValueError(f"`{name}` is {config[name]!r}; it must be one of {', '.join(allowed)}.")
    _check_sizes_fit(config)
    if (count := count_weights(config)) > MAX_PARAMETERS:
        sizes = ", ".join(f"`{name}` {config[name]}" for name in SIZES | OPTIONAL_SIZES)
        raise ValueError(
            f"A model of {sizes} and `mlp_ratio` {config['mlp_ratio']} has {count:,} parameters; at most "
            f"{MAX_PARAMETERS:,} are possible."
        )


def _check_sizes_fit(config):
    sample_size, patch_size = config["sample_size"], config["patch_size"]
    if sample_size % patch_size != 0:
        raise ValueError(f"`sample_size` {sample_size} is not divisible by `patch_size` {patch_size}.")
    if (sample_size // patch_size) ** 2 > MAX_TOKENS:
        raise ValueError(
            f"`sample_size` {sample_size} has {(sample_size // patch_size) ** 2:,} patches of {patch_size}; at most "
            f"{MAX_TOKENS:,} are possible."
        )
    if config["num_encoder_layers"] >= config["num_layers"]:
        raise ValueError(
            f"`num_encoder_layers` is {config['num_encoder_layers']}; it must be below `num_layers` "
            f"{config['num_layers']}, as the remaining blocks are the decoder."
        )
    for name, (_, heads, head_dim) in zip(
        ("attention_head_dim", "decoder_attention_head_dim"), stream_sizes(config), strict=True
    ):
        if head_dim % 4 != 0:
            raise ValueError(f"`{name}` is {head_dim}; rotary positions of two axes need a multiple of 4.")
        if int(heads * head_dim * config["mlp_ratio"]) < 2:
            raise ValueError(f"`mlp_ratio` is {config['mlp_ratio']!r}, which leaves the feed-forward layers no width.")


def tensor_parallel_plan(ff: str) -> dict[str, str]:
    """The plan of a model with these feed-forward layers."""
    layers = {f"attn.to_{name}": "colwise" for name in "qkv"} | {"attn.to_out.0": "rowwise"}
    layers |= {f"ff.{name}": style for name, style in TENSOR_PARALLEL_FF[ff].items()}
    return {
        f"{blocks}.*.{name}": layers[name] for blocks in ("transformer_blocks", "decoder_blocks") for name in layers
    }


class DDTBlock(nn.Module):
    """adaLN-Zero block (DiT fig. 3) whose shifts, scales and gates may differ from token to token (DDT)."""

    def __init__(
        self,
        num_attention_heads: int,
        attention_head_dim: int,
        mlp_ratio: float,
        norm: str = "rms_norm",
        qk_norm: bool = True,
        ff: str = "swiglu",
        bias: bool = False,
    ):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.norm1 = build_norm(norm, dim)
        self.attn = DDTAttention(num_attention_heads, attention_head_dim, bias, qk_norm=norm if qk_norm else None)
        self.norm2 = build_norm(norm, dim)
        self.ff = build_feed_forward(ff, dim, mlp_ratio, bias)
        self.modulation = nn.Linear(dim, MODULATION_VECTORS * dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        condition: torch.Tensor,
        rotary_emb: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """The condition is `(B, 1, D)` in the encoder, `(B, N, D)` in the decoder."""
        vectors = self.modulation(condition).chunk(MODULATION_VECTORS, dim=-1)
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = vectors
        attn_output = self.attn(modulate(self.norm1(hidden_states), shift_attn, scale_attn), rotary_emb=rotary_emb)
        hidden_states = torch.addcmul(hidden_states, attn_output, gate_attn)
        ff_output = self.ff(modulate(self.norm2(hidden_states), shift_ff, scale_ff))
        return torch.addcmul(hidden_states, ff_output, gate_ff)


class DDTAdaLayerNormOut(nn.Module):
    """Norm before the head, modulated by the condition `(B, N, D)`."""

    def __init__(self, dim: int, norm: str):
        super().__init__()
        self.norm = build_norm(norm, dim)
        self.linear = nn.Linear(dim, 2 * dim)

    def forward(self, hidden_states, condition):
        shift, scale = self.linear(condition).chunk(2, dim=-1)
        return modulate(self.norm(hidden_states), shift, scale)


class DDTTransformer2DModel(ModelMixin, AttentionMixin, ConfigMixin, CacheMixin, PeftAdapterMixin):
    r"""
    Class-conditional Diffusion Transformer in two streams over the same latents. The encoder sees time and class and
    computes a state for each token; the decoder is modulated by it, token by token, and predicts the velocity (DDT,
    https://arxiv.org/abs/2504.05741; DiT-DH in RAE, https://arxiv.org/abs/2510.11690).

    The defaults are DDT-XL/2. `dit_hf.presets.RAE_DIT_DH` holds the options of RAE's DiT-DH.

    Args:
        sample_size (`int`, defaults to 32): Side of the latents the model is built for; other sizes work too.
        patch_size (`int`, defaults to 2): Side of a patch; a token is one patch.
        in_channels (`int`, defaults to 4): Channels of the latents.
        num_layers (`int`, defaults to 28): Blocks of both streams together.
        num_encoder_layers (`int`, defaults to 22): How many of them, the first ones, are the encoder.
        num_attention_heads (`int`, defaults to 16): Heads per block.
        attention_head_dim (`int`, defaults to 72): Channels per head, divisible by 4; the width is heads × channels.
        decoder_num_attention_heads (`int`, *optional*): Heads per block of the decoder, if not the encoder's.
        decoder_attention_head_dim (`int`, *optional*): Channels per head of the decoder, if not the encoder's.
        mlp_ratio (`float`, defaults to 4.0): Hidden width of the feed-forward layers over the stream's width.
        num_classes (`int`, defaults to 1000): Classes; the id `num_classes` is the null class.
        class_dropout_prob (`float`, defaults to 0.1):
            Probability with which a training sample's label is replaced by the null class. With 0 there is no null
            class, and so no classifier-free guidance.
        time_embedding (`str`, defaults to `"sinusoidal"`):
            `"sinusoidal"` with periods up to 10 · 2π, or `"fourier"` with random frequencies, which are among the
            weights. Time is the scheduler's timestep / 1000.
        position_table (`bool`, defaults to `False`): Whether the encoder adds DiT's frozen sine-cosine table.
        rotary_span (`float`, *optional*, defaults to 16.0):
            Rotary positions of the first and the last row are 0 and this whatever their number, and so are those of
            the columns. With None rows and columns are counted from 0.
        norm (`str`, defaults to `"rms_norm"`): Of the blocks, `"layer_norm"` or `"rms_norm"`.
        head_norm (`str`, defaults to `"layer_norm"`): Before the head, `"layer_norm"` or `"rms_norm"`.
        qk_norm (`bool`, defaults to `True`): Whether queries and keys of each head are normalised.
        ff (`str`, defaults to `"swiglu"`): Feed-forward layers, `"gelu"` or `"swiglu"` of two thirds of the width.
        bias (`bool`, defaults to `False`): Whether queries, keys, values and the feed-forward layers have a bias.
        modulation_activation (`bool`, defaults to `False`):
            Whether the conditions of both streams, which are activated by SiLU, are activated once more before the
            layers that regress shifts, scales and gates.

    Raises:
        ValueError: if an option is unknown or sizes do not fit; the message names the option.

    Example:

        >>> import torch
        >>> from dit_hf import DDTTransformer2DModel
        >>> model = DDTTransformer2DModel(
        ...     sample_size=8, num_layers=3, num_encoder_layers=2, num_attention_heads=4, attention_head_dim=12
        ... )
        >>> latents, labels = torch.randn(2, 4, 8, 8), torch.tensor([207, 88])
        >>> model(latents, 500, labels).sample.shape  # a velocity
        torch.Size([2, 4, 8, 8])
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DDTBlock"]
    _repeated_blocks = ["DDTBlock"]
    _keep_in_fp32_modules = ["time_proj", "time_embed"]
    _skip_layerwise_casting_patterns = ["patch_embed", "norm"]
    _cp_plan = CONTEXT_PARALLEL_PLAN
    _tp_plan = tensor_parallel_plan("swiglu")

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        num_layers: int = 28,
        num_encoder_layers: int = 22,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        decoder_num_attention_heads: int | None = None,
        decoder_attention_head_dim: int | None = None,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        time_embedding: str = "sinusoidal",
        position_table: bool = False,
        rotary_span: float | None = 16.0,
        norm: str = "rms_norm",
        head_norm: str = "layer_norm",
        qk_norm: bool = True,
        ff: str = "swiglu",
        bias: bool = False,
        modulation_activation: bool = False,
    ):
        super().__init__()
        check_config(self.config)
        encoder, decoder = stream_sizes(self.config)
        encoder_dim, dim = (heads * head_dim for _, heads, head_dim in (encoder, decoder))
        self._tp_plan = tensor_parallel_plan(ff)

        def build_blocks(count, heads, head_dim):
            sizes = (heads, head_dim, mlp_ratio)
            return nn.ModuleList(DDTBlock(*sizes, norm, qk_norm, ff, bias) for _ in range(count))

        # 1. Embed time, class and positions
        self.time_proj = None
        if time_embedding == "fourier":
            self.time_proj = GaussianFourierProjection(FREQUENCIES["fourier"], set_W_to_weight=False, log=False)
        self.time_embed = TimestepEmbedding(2 * FREQUENCIES[time_embedding], encoder_dim)
        self.class_embed = nn.Embedding(num_classes + int(class_dropout_prob > 0), encoder_dim)
        self.rotary_embed = DDTRotaryEmbed(rotary_span)

        # 2. Encoder. Caches that skip a list of blocks look for this name: they end where the encoder does.
        self.patch_embed = DDTPatchEmbed(patch_size, in_channels, encoder_dim)
        self.pos_embed = DDTPositions(sample_size // patch_size, encoder_dim) if position_table else None
        self.transformer_blocks = build_blocks(*encoder)

        # 3. Decoder
        self.state_proj = nn.Linear(encoder_dim, dim) if dim != encoder_dim else None
        self.decoder_patch_embed = DDTPatchEmbed(patch_size, in_channels, dim)
        self.decoder_blocks = build_blocks(*decoder)
        self.norm_out = DDTAdaLayerNormOut(dim, head_norm)
        self.proj_out = nn.Linear(dim, patch_size * patch_size * in_channels)

        self.gradient_checkpointing = False
        self.initialize_weights()

    @torch.no_grad()
    def initialize_weights(self):
        """Initialises as DiT §3.2 says: Xavier linears, small embeddings, the identity function by zero gates."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for embedder in (self.patch_embed, self.decoder_patch_embed):
            nn.init.xavier_uniform_(embedder.proj.weight.view(embedder.proj.weight.shape[0], -1))
            nn.init.zeros_(embedder.proj.bias)
        nn.init.normal_(self.class_embed.weight, std=EMBEDDING_STD)
        nn.init.normal_(self.time_embed.linear_1.weight, std=EMBEDDING_STD)
        nn.init.normal_(self.time_embed.linear_2.weight, std=EMBEDDING_STD)
        for block in (*self.transformer_blocks, *self.decoder_blocks):
            # Queries, keys and values are one matrix in the original, and Xavier's bound sees its full height.
            for projection in (block.attn.to_q, block.attn.to_k, block.attn.to_v):
                nn.init.xavier_uniform_(projection.weight, gain=0.5**0.5)
            nn.init.zeros_(block.modulation.weight)
        nn.init.zeros_(self.norm_out.linear.weight)
        nn.init.zeros_(self.proj_out.weight)

    # Copied from dit_hf.transformer_dit.DiTTransformer2DModel.from_config
    @classmethod
    def from_config(cls, config=None, return_unused_kwargs=False, **kwargs):
        """As every `ConfigMixin`'s; `auto_map`, which tells diffusers where the code is, is no option of the model."""
        if isinstance(config, dict):
            config = {name: value for name, value in config.items() if name != "auto_map"}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    # Copied from dit_hf.transformer_dit.DiTTransformer2DModel.enable_cache
    def enable_cache(self, config):
        """As every `CacheMixin`'s."""
        if TransformerBlockRegistry is None:
            raise ImportError(
                f"diffusers {diffusers.__version__} has no registry of blocks (`diffusers.hooks._helpers`) as "
                "diffusers 0.42 has, which caches need."
            )
        super().enable_cache(config)

    # Copied from dit_hf.transformer_dit.DiTTransformer2DModel.to_json_string
    def to_json_string(self):
        """The configuration, with `auto_map` for `trust_remote_code=True` and without where the model came from."""
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)  # may be a path of this machine
        config["auto_map"] = {"AutoModel": f"{Path(__file__).stem}.{type(self).__name__}"}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    # Copied from dit_hf.transformer_dit.DiTTransformer2DModel.save_config
    def save_config(self, save_directory, push_to_hub=False, **kwargs):
        """Writes the configuration, and beside it this file, which `trust_remote_code=True` runs."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(__file__, Path(save_directory) / Path(__file__).name)
        super().save_config(save_directory, push_to_hub, **kwargs)

    def _embed_time(self, timestep, batch_size):
        """`(B, E)` in the type of the timestep embedding."""
        time = timestep.expand(batch_size).float() * TIMESTEP_SCALE
        if self.time_proj is not None:
            frequencies = self.time_proj(time)
        else:
            frequencies = get_timestep_embedding(
                time, 2 * FREQUENCIES["sinusoidal"], True, downscale_freq_shift=0, max_period=MAX_PERIOD
            )
        return self.time_embed(frequencies.to(self.time_embed.linear_1.weight.dtype))

    def _embed_class(self, class_labels, force_drop_ids):
        """`(B, E)`; labels are dropped, once per sample."""
        if force_drop_ids is None and self.training and self.config.class_dropout_prob > 0:
            force_drop_ids = torch.rand(len(class_labels), device=class_labels.device) < self.config.class_dropout_prob
        if force_drop_ids is not None:
            class_labels = torch.where(force_drop_ids.bool(), self.config.num_classes, class_labels)
        return self.class_embed(class_labels)

    # Copied from dit_hf.transformer_dit.DiTTransformer2DModel._check_class_ids
    def _check_class_ids(self, class_labels):
        """Values are checked on the CPU only, as a GPU would have to wait."""
        if class_labels.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"`class_labels` has dtype {class_labels.dtype}; it must hold class ids (torch.int64).")
        if class_labels.device.type == "cpu" and not torch.compiler.is_compiling() and len(class_labels):
            last = self.config.num_classes - (self.config.class_dropout_prob == 0)
            low, high = (bound.item() for bound in class_labels.aminmax())
            if not 0 <= low <= high <= last:
                raise ValueError(f"`class_labels` holds {high if low >= 0 else low}; the allowed ids are 0 to {last}.")

    def _check_inputs(self, hidden_states, timestep, class_labels, force_drop_ids, encoder_state):
        """Refuses what does not fit."""
        check_tensors(hidden_states=hidden_states, class_labels=class_labels)
        check_tensors(optional=True, force_drop_ids=force_drop_ids, encoder_state=encoder_state)
        if isinstance(timestep, bool) or not isinstance(timestep, Real):
            check_tensors(timestep=timestep)
        patch_size = self.config.patch_size
        if hidden_states.ndim != 4 or hidden_states.shape[1] != self.config.in_channels:
            raise ValueError(
                f"`hidden_states` has shape {tuple(hidden_states.shape)}; it must be "
                f"(batch, {self.config.in_channels}, height, width)."
            )
        batch_size, _, height, width = hidden_states.shape
        if height % patch_size != 0 or width % patch_size != 0 or min(height, width) == 0:
            raise ValueError(f"The latent size {height}×{width} is not divisible by the patch size {patch_size}.")
        if class_labels.shape != (batch_size,):
            raise ValueError(
                f"`class_labels` has shape {tuple(class_labels.shape)}; a batch of {batch_size} needs ({batch_size},)."
            )
        self._check_class_ids(class_labels)
        if isinstance(timestep, torch.Tensor) and timestep.shape not in ((), (1,), (batch_size,)):
            raise ValueError(
                f"`timestep` has shape {tuple(timestep.shape)}; it must be a number or that of `class_labels`, "
                f"({batch_size},)."
            )
        if force_drop_ids is not None and force_drop_ids.shape != class_labels.shape:
            raise ValueError(
                f"`force_drop_ids` has shape {tuple(force_drop_ids.shape)}; it must be that of `class_labels`, "
                f"({batch_size},)."
            )
        if force_drop_ids is not None and self.config.class_dropout_prob == 0:
            raise ValueError("`force_drop_ids` needs a null class, and a model with `class_dropout_prob=0` has none.")
        encoder_dim = self.config.num_attention_heads * self.config.attention_head_dim
        state_shape = (batch_size, height // patch_size * (width // patch_size), encoder_dim)
        if encoder_state is not None and encoder_state.shape != state_shape:
            raise ValueError(
                f"`encoder_state` has shape {tuple(encoder_state.shape)}; these latents need {state_shape}: that of "
                "a forward pass with the same batch."
            )

    def _run_blocks(self, blocks, hidden_states, condition, rotary_emb):
        if self.config.modulation_activation:
            condition = F.silu(condition)
        for block in blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, condition, rotary_emb)
            else:
                hidden_states = block(hidden_states=hidden_states, condition=condition, rotary_emb=rotary_emb)
        return hidden_states

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor,
        force_drop_ids: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        encoder_state: torch.Tensor | None = None,
    ) -> DDTTransformer2DModelOutput | tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(B, C, H, W)`): Noisy latents; H and W divisible by the patch size.
            timestep (`torch.Tensor` of shape `(B,)`, or a number): The scheduler's timestep, 1000 · sigma.
            class_labels (`torch.Tensor` of shape `(B,)`, int64): Class ids; `num_classes` is the null class.
            force_drop_ids (`torch.Tensor` of shape `(B,)`, *optional*):
                Non-zero where the label is to be replaced by the null class; given, it takes the place of the random
                dropout of training.
            attention_kwargs (`dict`, *optional*): `{"scale": s}` scales LoRA adapters.
            return_dict (`bool`, defaults to `True`): Whether to return a `DDTTransformer2DModelOutput`.
            encoder_state (`torch.Tensor` of shape `(B, N, E)`, *optional*):
                That of an earlier forward pass with the same batch. The encoder is skipped then, and timestep and
                labels play no part: all that the decoder knows of them is in the state (DDT). Under context
                parallelism a state is that of a rank's tokens, which this does not take.

        Returns:
            `DDTTransformer2DModelOutput` or `tuple`: `sample`, the velocity noise − data of shape `(B, C, H, W)`, and
            `encoder_state` of shape `(B, N, E)`.

        Raises:
            ValueError: if shapes do not fit.
        """
        self._check_inputs(hidden_states, timestep, class_labels, force_drop_ids, encoder_state)
        batch_size, _, height, width = hidden_states.shape
        patch_size = self.config.patch_size
        grid = (height // patch_size, width // patch_size)
        (_, _, head_dim), (_, _, decoder_head_dim) = stream_sizes(self.config)

        # 1. Encoder
        if encoder_state is None:
            tokens = self.patch_embed(hidden_states)  # (B, N, E)
            if self.pos_embed is not None:
                tokens = self.pos_embed(tokens, *grid)
            time = self._embed_time(torch.as_tensor(timestep, device=class_labels.device), batch_size).unsqueeze(1)
            condition = time + self._embed_class(class_labels, force_drop_ids).unsqueeze(1)
            condition = F.silu(condition.to(tokens.dtype))  # (B, 1, E)
            rotary_emb = self.rotary_embed(*grid, head_dim, tokens.device)
            tokens = self._run_blocks(self.transformer_blocks, tokens, condition, rotary_emb)
            encoder_state = F.silu(time.to(tokens.dtype) + tokens)  # (B, N, E)

        # 2. Decoder
        tokens = self.decoder_patch_embed(hidden_states)  # (B, N, D)
        condition = encoder_state if self.state_proj is None else self.state_proj(encoder_state)  # (B, N, D)
        rotary_emb = self.rotary_embed(*grid, decoder_head_dim, tokens.device)
        tokens = self._run_blocks(self.decoder_blocks, tokens, condition, rotary_emb)

        # 3. Head
        if self.config.modulation_activation:
            condition = F.silu(condition)
        tokens = self.proj_out(self.norm_out(tokens, condition))  # (B, N, p·p·C)
        output = tokens.unflatten(1, grid).unflatten(-1, (patch_size, patch_size, self.config.in_channels))
        output = output.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, H, W)

        if not return_dict:
            return output, encoder_state
        return DDTTransformer2DModelOutput(sample=output, encoder_state=encoder_state)


def _skip_attention(attn, hidden_states, rotary_emb=None):
    """What a cache that skips attention gets in its stead."""
    return hidden_states


if TransformerBlockRegistry is not None:
    try:
        AttentionProcessorRegistry.register(
            DDTAttnProcessor, AttentionProcessorMetadata(skip_processor_output_fn=_skip_attention)
        )
        TransformerBlockRegistry.register(
            DDTBlock,
            TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None),
        )
    except (TypeError, AttributeError):  # this diffusers registers in another way
        TransformerBlockRegistry = None  # type: ignore[assignment,misc]
