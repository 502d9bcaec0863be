"""Diffusion Transformer for class-conditional images (DiT, Peebles & Xie, https://arxiv.org/abs/2212.09748).

Options cover the family that grew from it: SiT (https://arxiv.org/abs/2401.08740), REPA
(https://arxiv.org/abs/2410.06940), LightningDiT (https://arxiv.org/abs/2501.01423), MeanFlow
(https://arxiv.org/abs/2505.13447) and SoFlow (https://arxiv.org/abs/2512.15657).

Shapes: `B` batch, `C` channels, `H W` latent size, `p` patch size, `h w` = `H/p W/p`, `N` = `h·w` tokens (two more
with in-context conditioning), `D` width, `heads` attention heads.

This file imports torch and diffusers only: it is also the code that a Hub repository carries, so it loads with any
diffusers from `MIN_DIFFUSERS` on. Names that are private to diffusers are optional: without them only the feature
that needs them is missing.
"""

import json
import shutil
from collections.abc import Callable, Mapping
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
        f"DiTTransformer2DModel needs diffusers >= {MIN_DIFFUSERS}; this is {diffusers.__version__}. "
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
    Timesteps,
    apply_rotary_emb,
    get_1d_rotary_pos_embed,
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

    CONTEXT_PARALLEL_PLAN: Any = {
        "transformer_blocks.0": {
            "hidden_states": ContextParallelInput(split_dim=1, expected_dims=3, split_output=False)
        },
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }
    ROTARY_PLAN: Any = dict.fromkeys((0, 1), ContextParallelInput(split_dim=0, expected_dims=2, split_output=True))
except (ImportError, TypeError):
    CONTEXT_PARALLEL_PLAN = None
try:  # `attention_kwargs={"scale": s}`
    from diffusers.utils import apply_lora_scale
except ImportError:

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


ADAPTIVE = ("adaln_zero", "adaln")
CONDITIONINGS = (*ADAPTIVE, "cross_attention", "in_context")
POSITION_EMBEDDINGS = ("sincos", "sincos+rope")
NORMS = ("layer_norm", "rms_norm")
FEED_FORWARDS = ("gelu", "swiglu")
# Width of the sinusoidal timestep embedding, before its MLP.
FREQUENCY_DIM = 256
# The same, by the kind of the embedding.
TIME_EMBEDDINGS = {"sinusoidal": FREQUENCY_DIM, "fourier": 512}
NORM_EPS = 1e-6
# Initial standard deviation of the embedding table and of the timestep MLP.
EMBEDDING_STD = 0.02
# Ranges of the sizes, far beyond every published model: a configuration must not ask for any memory it likes.
SIZES = {
    "sample_size": (1, 2**14),
    "patch_size": (1, 2**14),
    "in_channels": (1, 2**16),
    "num_layers": (1, 2**10),
    "num_attention_heads": (1, 2**12),
    "attention_head_dim": (1, 2**14),
    "num_classes": (1, 2**28),
}
FACTORS = {"mlp_ratio": 2**10, "timestep_scale": 10**6}
MAX_PARAMETERS = 2**34
MAX_TOKENS = 2**18


def modulate(hidden_states: torch.Tensor, shift: torch.Tensor | None, scale: torch.Tensor) -> torch.Tensor:
    """Adaptive layer norm's affine part: `(B, N, D)` with `(B, D)` shift, or none, and scale (DiT §3.2)."""
    scale = 1 + scale.unsqueeze(1)
    return hidden_states * scale if shift is None else torch.addcmul(shift.unsqueeze(1), hidden_states, scale)


def add_branch(hidden_states: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """The residual sum `(B, N, D)`; in adaLN-Zero the branch is scaled by a gate `(B, D)` (DiT §3.2)."""
    return hidden_states + branch if gate is None else torch.addcmul(hidden_states, branch, gate.unsqueeze(1))


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


def check_tensors(optional: bool = False, **tensors: Any) -> None:
    """Raises `ValueError` for an input that is not a dense tensor, by its name."""
    for name, tensor in tensors.items():
        if tensor is None and optional:
            continue
        dense = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        if not dense or tensor.is_nested or tensor.is_quantized:
            given = "sparse, nested or quantized" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(f"`{name}` is {given}; it must be a dense torch.Tensor.")


class DiTPatchEmbed(nn.Module):
    """Cuts latents into patches, projects them and adds positions; positions of every size seen are kept."""

    def __init__(self, sample_size: int, patch_size: int, in_channels: int, dim: int):
        super().__init__()
        self.dim = dim
        self.base_size = (sample_size // patch_size, sample_size // patch_size)
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.register_buffer("positions", sincos_positions(*self.base_size, dim), persistent=False)
        self._other_positions: dict[tuple, torch.Tensor] = {}

    def positions_for(self, height, width):
        if (height, width) == self.base_size:
            return self.positions
        known = self._other_positions.get((height, width))
        if known is None or (known.device, known.dtype) != (self.positions.device, self.positions.dtype):
            known = sincos_positions(height, width, self.dim).to(self.positions)
            self._other_positions[height, width] = known
        return known

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        hidden_states = self.proj(latents.to(self.proj.weight.dtype))  # (B, D, h, w)
        positions = self.positions_for(*hidden_states.shape[-2:])
        # Contiguous, or the whole residual stream inherits the transposed strides, and every norm copies it.
        hidden_states = hidden_states.flatten(2).transpose(1, 2).contiguous() + positions  # (B, N, D)
        # `from_pretrained` in half precision leaves positions float32, and so would be the sum.
        return hidden_states.to(self.proj.weight.dtype)


class DiTRotaryEmbed(nn.Module):
    """Angles of rotary positions: half of a head's channels turn with the row, half with the column."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self._tables: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}

    def forward(self, height: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, `(h·w, D/heads)` float32 each; those of every size seen are kept."""
        if (height, width, device) not in self._tables:
            self._tables[height, width, device] = self._build(height, width, device)
        return self._tables[height, width, device]

    def _build(self, height, width, device):
        with torch.inference_mode(False):  # the tables outlive the call, and training may come next
            rows = torch.arange(height, device=device).repeat_interleave(width)
            columns = torch.arange(width, device=device).repeat(height)
            axes = [get_1d_rotary_pos_embed(self.head_dim // 2, axis, use_real=True) for axis in (rows, columns)]
            cosines, sines = (torch.cat(tables, dim=1).float() for tables in zip(*axes, strict=True))
            return cosines, sines


class DiTAttnProcessor:
    """Scaled dot-product attention through diffusers' dispatcher, which owns backends and context parallelism."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "DiTAttention",
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        query, key, value = attn.project(hidden_states, encoder_hidden_states)
        # The number of heads is left open: under tensor parallelism each rank holds a part of them.
        query, key, value = (states.unflatten(-1, (-1, attn.head_dim)) for states in (query, key, value))
        if attn.norm_q is not None and attn.norm_k is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        if rotary_emb is not None:
            query, key = (apply_rotary_emb(states, rotary_emb, sequence_dim=1) for states in (query, key))
        options = {"backend": self._attention_backend}
        # Condition tokens are not split over ranks, so cross-attention is local.
        if self._parallel_config is not None and encoder_hidden_states is None:
            options["parallel_config"] = self._parallel_config
        hidden_states = dispatch_attention_fn(query, key, value, **options)  # (B, N, heads, D/heads)
        return attn.to_out[0](hidden_states.flatten(2).to(query.dtype))


class DiTAttention(nn.Module, AttentionModuleMixin):
    """
    Multi-head attention with biases; `is_cross_attention` takes keys and values from the condition tokens, `qk_norm`
    normalises the queries and keys of each head.
    """

    _default_processor_cls = DiTAttnProcessor
    _available_processors = [DiTAttnProcessor]
    processor: Callable[..., torch.Tensor]

    def __init__(
        self,
        num_attention_heads: int,
        attention_head_dim: int,
        is_cross_attention: bool = False,
        qk_norm: str | None = None,
    ):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.heads = num_attention_heads
        self.head_dim = attention_head_dim
        self.use_bias = True
        self.is_cross_attention = is_cross_attention
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q = build_qk_norm(qk_norm, attention_head_dim) if qk_norm else None
        self.norm_k = build_qk_norm(qk_norm, attention_head_dim) if qk_norm else None
        self.processor = self._default_processor_cls()

    def project(self, hidden_states, encoder_hidden_states=None):
        """Queries, keys and values, `(B, N, D)` each, by the fused layer if there is one."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if not self.fused_projections:
            return self.to_q(hidden_states), self.to_k(source), self.to_v(source)
        if self.is_cross_attention:
            return self.to_q(hidden_states), *self.to_kv(source).chunk(2, dim=-1)
        return self.to_qkv(hidden_states).chunk(3, dim=-1)

    def forward(self, hidden_states, encoder_hidden_states=None, rotary_emb=None):
        return self.processor(self, hidden_states, encoder_hidden_states, rotary_emb)


class DiTSwiGLU(nn.Module):
    """Gated feed-forward; gate and value are two layers, so that tensor parallelism can split both."""

    def __init__(self, dim: int, inner_dim: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, inner_dim)
        self.up_proj = nn.Linear(dim, inner_dim)
        self.down_proj = nn.Linear(inner_dim, dim)

    def forward(self, hidden_states):
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


def swiglu_width(dim: int, mlp_ratio: float) -> int:
    """Hidden width of a SwiGLU with about the parameters of a two-layer perceptron of this ratio."""
    return int(2 / 3 * int(dim * mlp_ratio))


def build_feed_forward(kind, dim, mlp_ratio):
    """The two-layer perceptron of the paper's designs, tanh GELU inside, or LightningDiT's SwiGLU."""
    if kind == "swiglu":
        return DiTSwiGLU(dim, swiglu_width(dim, mlp_ratio))
    return FeedForward(dim, inner_dim=int(dim * mlp_ratio), activation_fn="gelu-approximate")


def build_norm(kind, dim, affine):
    """A norm over the width; RMS norms have a weight even where modulation follows, as in LightningDiT."""
    if kind == "rms_norm":
        return nn.RMSNorm(dim, eps=NORM_EPS)
    return nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=affine)


def build_qk_norm(kind, head_dim):
    """A norm over a head's channels; layer norms have torch's own epsilon here, as in timm's attention."""
    return nn.RMSNorm(head_dim, eps=NORM_EPS) if kind == "rms_norm" else nn.LayerNorm(head_dim)


def count_modulation_vectors(conditioning: str, modulation_shift: bool) -> int:
    """Vectors of width D that a block regresses from its condition: scale, gate and shift of each of two branches."""
    if conditioning not in ADAPTIVE:
        return 0
    return 2 * (1 + (conditioning == "adaln_zero") + modulation_shift)


def count_weights(config: Mapping) -> int:
    """
    Parameters of a model, without biases and norms.

    Args:
        config (`Mapping`): A `DiTTransformer2DModel`'s config.

    Returns:
        `int`
    """
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    patch_values = config["in_channels"] * config["patch_size"] ** 2
    vectors = count_modulation_vectors(config["conditioning"], config["modulation_shift"])
    hidden_dim = int(dim * config["mlp_ratio"])
    ff = 3 * dim * swiglu_width(dim, config["mlp_ratio"]) if config["ff"] == "swiglu" else 2 * dim * hidden_dim
    attention = 4 * dim**2 * (2 if config["conditioning"] == "cross_attention" else 1)
    block = attention + ff + vectors * dim**2
    head = dim * patch_values * (2 if config["learn_sigma"] else 1) + (2 * dim**2 if vectors else 0)
    classes = config["num_classes"] + int(config["class_dropout_prob"] > 0)
    timesteps = 2 if config["interval_embedding"] else 1
    embed = dim * (patch_values + timesteps * (TIME_EMBEDDINGS[config["time_embedding"]] + dim) + classes)
    return embed + config["num_layers"] * block + head


def check_config(config: Mapping) -> None:
    """
    Checks a model's options before anything is allocated.

    Args:
        config (`Mapping`): All arguments of `DiTTransformer2DModel`.

    Raises:
        ValueError: naming the option, its value and the allowed ones.
    """
    for name, (smallest, largest) in SIZES.items():
        size = config[name]
        if isinstance(size, bool) or not isinstance(size, int) or not smallest <= size <= largest:
            raise ValueError(f"`{name}` is {size!r}; it must be a whole number from {smallest} to {largest}.")
    for name, bound in FACTORS.items():
        factor = config[name]
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor <= bound:
            raise ValueError(f"`{name}` is {factor!r}; it must be a number above 0, at most {bound}.")
    dropout = config["class_dropout_prob"]
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
        raise ValueError(f"`class_dropout_prob` is {dropout!r}; it must be from 0 to 1.")
    for name in ("learn_sigma", "qk_norm", "modulation_shift", "interval_embedding"):
        if not isinstance(config[name], bool):
            raise ValueError(f"`{name}` is {config[name]!r}; it must be True or False.")
    if config["guidance_in_weights"] not in (True, False, "jumps"):
        guidance = config["guidance_in_weights"]
        raise ValueError(f"`guidance_in_weights` is {guidance!r}; it must be True, False or 'jumps'.")
    choices = {"conditioning": CONDITIONINGS, "position_embedding": POSITION_EMBEDDINGS}
    choices |= {"norm": NORMS, "ff": FEED_FORWARDS, "time_embedding": tuple(TIME_EMBEDDINGS)}
    for name, allowed in choices.items():
        if config[name] not in allowed:
            raise ValueError(f"`{name}` is {config[name]!r}; it must be one of {', '.join(allowed)}.")
    _check_sizes_fit(**{name: config[name] for name in SIZES})
    _check_designs_fit(config)
    if int(config["num_attention_heads"] * config["attention_head_dim"] * config["mlp_ratio"]) < 2:
        raise ValueError(f"`mlp_ratio` is {config['mlp_ratio']!r}, which leaves the feed-forward layers no width.")
    if (count := count_weights(config)) > MAX_PARAMETERS:
        sizes = ", ".join(f"`{name}` {config[name]}" for name in SIZES)
        raise ValueError(
            f"A model of {sizes} and `mlp_ratio` {config['mlp_ratio']} has {count:,} parameters; at most "
            f"{MAX_PARAMETERS:,} are possible."
        )


def _check_sizes_fit(sample_size, patch_size, num_attention_heads, attention_head_dim, **_):
    if sample_size % patch_size != 0:
        raise ValueError(f"`sample_size` {sample_size} is not divisible by `patch_size` {patch_size}.")
    if (sample_size // patch_size) ** 2 > MAX_TOKENS:
        raise ValueError(
            f"`sample_size` {sample_size} has {(sample_size // patch_size) ** 2:,} patches of {patch_size}; at most "
            f"{MAX_TOKENS:,} are possible."
        )
    dim = num_attention_heads * attention_head_dim
    if dim % 4 != 0:
        raise ValueError(
            f"The width `num_attention_heads` × `attention_head_dim` = {num_attention_heads} × "
            f"{attention_head_dim} = {dim} must be divisible by 4, for two axes of sines and cosines."
        )


def _check_designs_fit(config):
    conditioning, head_dim = config["conditioning"], config["attention_head_dim"]
    if conditioning not in ADAPTIVE and not config["modulation_shift"]:
        raise ValueError(f"`modulation_shift=False` needs adaptive norms; `conditioning` {conditioning!r} has none.")
    if config["position_embedding"] == "sincos+rope" and conditioning == "in_context":
        raise ValueError("`position_embedding='sincos+rope'` has no place for the tokens of 'in_context'.")
    if config["position_embedding"] == "sincos+rope" and head_dim % 4 != 0:
        raise ValueError(f"`attention_head_dim` is {head_dim}; 'sincos+rope' needs a multiple of 4.")


class DiTBlock(nn.Module):
    """
    Adaptive layer norm block: `conditioning="adaln_zero"` scales both branches by regressed gates (DiT fig. 3), and
    without `modulation_shift` no shift is regressed (LightningDiT).
    """

    def __init__(
        self,
        num_attention_heads: int,
        attention_head_dim: int,
        mlp_ratio: float,
        norm: str = "layer_norm",
        qk_norm: bool = False,
        ff: str = "gelu",
        conditioning: str = "adaln_zero",
        modulation_shift: bool = True,
    ):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.gated, self.shift = conditioning == "adaln_zero", modulation_shift
        self.num_vectors = count_modulation_vectors(conditioning, modulation_shift)
        self.norm1 = build_norm(norm, dim, affine=False)
        self.attn = DiTAttention(num_attention_heads, attention_head_dim, qk_norm=norm if qk_norm else None)
        self.norm2 = build_norm(norm, dim, affine=False)
        self.ff = build_feed_forward(ff, dim, mlp_ratio)
        self.modulation = nn.Linear(dim, self.num_vectors * dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        condition: Any,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        modulation: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`modulation` `(B, num_vectors·D)` is what the linear layer makes of the condition `(B, D)`, if known."""
        if modulation is None:
            modulation = self.modulation(F.silu(condition))
        vectors = iter(modulation.chunk(self.num_vectors, dim=1))  # (B, D)
        shift_attn = next(vectors) if self.shift else None
        scale_attn = next(vectors)
        gate_attn = next(vectors) if self.gated else None
        shift_ff = next(vectors) if self.shift else None
        scale_ff = next(vectors)
        gate_ff = next(vectors) if self.gated else None

        attn_output = self.attn(modulate(self.norm1(hidden_states), shift_attn, scale_attn), rotary_emb=rotary_emb)
        hidden_states = add_branch(hidden_states, attn_output, gate_attn)
        ff_output = self.ff(modulate(self.norm2(hidden_states), shift_ff, scale_ff))
        return add_branch(hidden_states, ff_output, gate_ff)


class DiTContextBlock(nn.Module):
    """Plain pre-norm block; the condition comes as tokens among the others, or through cross-attention (DiT §3.2)."""

    def __init__(
        self,
        num_attention_heads: int,
        attention_head_dim: int,
        mlp_ratio: float,
        norm: str = "layer_norm",
        qk_norm: bool = False,
        ff: str = "gelu",
        cross_attention: bool = False,
    ):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        qk_norm_kind = norm if qk_norm else None
        self.norm1 = build_norm(norm, dim, affine=True)
        self.attn = DiTAttention(num_attention_heads, attention_head_dim, qk_norm=qk_norm_kind)
        self.cross_attn = None
        if cross_attention:
            self.norm_cross = build_norm(norm, dim, affine=True)
            self.cross_attn = DiTAttention(num_attention_heads, attention_head_dim, True, qk_norm_kind)
        self.norm2 = build_norm(norm, dim, affine=True)
        self.ff = build_feed_forward(ff, dim, mlp_ratio)

    def forward(
        self,
        hidden_states: torch.Tensor,
        condition: torch.Tensor,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        modulation: None = None,
    ) -> torch.Tensor:
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states), rotary_emb=rotary_emb)
        if self.cross_attn is not None:
            hidden_states = hidden_states + self.cross_attn(self.norm_cross(hidden_states), condition)
        return hidden_states + self.ff(self.norm2(hidden_states))


class DiTAdaLayerNormOut(nn.Module):
    """Norm before the head, modulated by the condition `(B, D)`, or by what `linear` makes of it, if known."""

    def __init__(self, dim: int, norm: str = "layer_norm"):
        super().__init__()
        self.norm = build_norm(norm, dim, affine=False)
        self.linear = nn.Linear(dim, 2 * dim)

    def forward(self, hidden_states, condition, modulation=None):
        if modulation is None:
            modulation = self.linear(F.silu(condition))
        shift, scale = modulation.chunk(2, dim=1)
        return modulate(self.norm(hidden_states), shift, scale)


class DiTTransformer2DModel(ModelMixin, AttentionMixin, ConfigMixin, CacheMixin, PeftAdapterMixin):
    r"""
    Class-conditional Diffusion Transformer (DiT, https://arxiv.org/abs/2212.09748).

    Args:
        sample_size (`int`, defaults to 32): Side of the latents the model is built for; other sizes work too.
        patch_size (`int`, defaults to 2): Side of a patch; a token is one patch.
        in_channels (`int`, defaults to 4): Channels of the latents.
        num_layers (`int`, defaults to 28): Blocks.
        num_attention_heads (`int`, defaults to 16): Heads per block.
        attention_head_dim (`int`, defaults to 72): Channels per head; the width is heads × channels, divisible by 4.
        mlp_ratio (`float`, defaults to 4.0): Hidden width of the feed-forward layers over the model's width.
        num_classes (`int`, defaults to 1000): Classes; the id `num_classes` is the null class.
        class_dropout_prob (`float`, defaults to 0.1):
            Probability with which a training sample's label is replaced by the null class. With 0 there is no null
            class, and so no classifier-free guidance.
        learn_sigma (`bool`, defaults to `True`): Whether the head predicts variance channels beside the mean's.
        conditioning (`str`, defaults to `"adaln_zero"`):
            How time and class enter a block: `"adaln_zero"`, `"adaln"`, `"cross_attention"` or `"in_context"`.
        position_embedding (`str`, defaults to `"sincos"`):
            `"sincos"` adds the paper's frozen table, `"sincos+rope"` also applies rotary position embeddings.
        norm (`str`, defaults to `"layer_norm"`): `"layer_norm"` or `"rms_norm"`.
        qk_norm (`bool`, defaults to `False`): Whether queries and keys of each head are normalised.
        ff (`str`, defaults to `"gelu"`): Feed-forward layers, `"gelu"` or `"swiglu"` of two thirds of the width.
        modulation_shift (`bool`, defaults to `True`):
            Whether the blocks' adaptive norms shift as well as scale; the head's does always.
        timestep_scale (`float`, defaults to 1.0):
            The scheduler's timestep is multiplied by this before it is embedded; 0.001 for models that were trained
            with time in [0, 1].
        interval_embedding (`bool`, defaults to `False`):
            Whether a second timestep embedder takes the length of an interval, `timestep − r_timestep`. The output is
            then the mean velocity over the interval (MeanFlow, SoFlow).
        guidance_in_weights (`bool` or `str`, defaults to `False`):
            Whether the model was trained to predict what guidance would give, so that sampling takes no guidance;
            `"jumps"` if only over intervals, so that its velocity takes guidance as any other.
        time_embedding (`str`, defaults to `"sinusoidal"`):
            `"sinusoidal"`, or `"fourier"` with random frequencies, which are among the weights (RAE's LightningDiT).

    Raises:
        ValueError: if an option is unknown or sizes do not fit; the message names the option.

    Example:

        >>> import torch
        >>> from dit_hf import DiTTransformer2DModel
        >>> model = DiTTransformer2DModel(sample_size=8, num_layers=2, num_attention_heads=4, attention_head_dim=12)
        >>> latents, labels = torch.randn(2, 4, 8, 8), torch.tensor([207, 88])
        >>> model(latents, 500, labels).sample.shape  # noise and variance, 4 channels each
        torch.Size([2, 8, 8, 8])
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DiTBlock", "DiTContextBlock"]
    _repeated_blocks = ["DiTBlock", "DiTContextBlock"]
    _keep_in_fp32_modules = ["time_proj", "time_embed", "interval_embed"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm"]
    _cp_plan = CONTEXT_PARALLEL_PLAN
    _tp_plan = {
        "transformer_blocks.*.attn.to_q": "colwise",
        "transformer_blocks.*.attn.to_k": "colwise",
        "transformer_blocks.*.attn.to_v": "colwise",
        "transformer_blocks.*.attn.to_out.0": "rowwise",
        "transformer_blocks.*.ff.net.0.proj": "colwise",
        "transformer_blocks.*.ff.net.2": "rowwise",
    }

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = True,
        conditioning: str = "adaln_zero",
        position_embedding: str = "sincos",
        norm: str = "layer_norm",
        qk_norm: bool = False,
        ff: str = "gelu",
        modulation_shift: bool = True,
        timestep_scale: float = 1.0,
        interval_embedding: bool = False,
        guidance_in_weights: bool | str = False,
        time_embedding: str = "sinusoidal",
    ):
        super().__init__()
        check_config(self.config)
        dim = num_attention_heads * attention_head_dim
        self.is_adaptive = conditioning in ADAPTIVE
        rotary = position_embedding == "sincos+rope"
        self.out_channels = 2 * in_channels if learn_sigma else in_channels

        # 1. Embed patches, time and class
        self.pos_embed = DiTPatchEmbed(sample_size, patch_size, in_channels, dim)
        frequency_dim = TIME_EMBEDDINGS[time_embedding]
        if time_embedding == "fourier":
            self.time_proj = GaussianFourierProjection(frequency_dim // 2, set_W_to_weight=False, log=False)
        else:
            self.time_proj = Timesteps(frequency_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(frequency_dim, dim)
        self.interval_embed = TimestepEmbedding(frequency_dim, dim) if interval_embedding else None
        self.class_embed = nn.Embedding(num_classes + int(class_dropout_prob > 0), dim)

        self.rotary_embed = None
        if rotary:
            self.rotary_embed = DiTRotaryEmbed(attention_head_dim)
            if self._cp_plan is not None:
                self._cp_plan = self._cp_plan | {"rotary_embed": ROTARY_PLAN}

        # 2. Blocks
        sizes = (num_attention_heads, attention_head_dim, mlp_ratio, norm, qk_norm, ff)
        self.transformer_blocks = nn.ModuleList(
            DiTBlock(*sizes, conditioning, modulation_shift)
            if self.is_adaptive
            else DiTContextBlock(*sizes, cross_attention=conditioning == "cross_attention")
            for _ in range(num_layers)
        )

        if ff == "swiglu":
            # A plan may name no layer that is absent. `from_pretrained(parallel_config=...)` reads the class's plan,
            # so such a model is split after loading, by `enable_parallelism`.
            attention = {name: style for name, style in self._tp_plan.items() if ".attn." in name}
            layers = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
            self._tp_plan = attention | {f"transformer_blocks.*.ff.{name}": style for name, style in layers.items()}

        # 3. Head
        self.norm_out = DiTAdaLayerNormOut(dim, norm) if self.is_adaptive else build_norm(norm, dim, affine=True)
        self.proj_out = nn.Linear(dim, patch_size * patch_size * self.out_channels)

        self.gradient_checkpointing = False
        self.initialize_weights()

    @torch.no_grad()
    def initialize_weights(self):
        """Initialises as DiT §3.2 says: Xavier linears, small embeddings, the identity function by zero gates."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, DiTAttention) and not module.is_cross_attention:
                # Queries, keys and values are one matrix in the original, and Xavier's bound sees its full height.
                for projection in (module.to_q, module.to_k, module.to_v):
                    nn.init.xavier_uniform_(projection.weight, gain=0.5**0.5)
        nn.init.xavier_uniform_(self.pos_embed.proj.weight.view(self.pos_embed.proj.weight.shape[0], -1))
        nn.init.zeros_(self.pos_embed.proj.bias)
        nn.init.normal_(self.class_embed.weight, std=EMBEDDING_STD)
        for embedder in filter(None, (self.time_embed, self.interval_embed)):
            nn.init.normal_(embedder.linear_1.weight, std=EMBEDDING_STD)
            nn.init.normal_(embedder.linear_2.weight, std=EMBEDDING_STD)
        if self.config.conditioning == "adaln_zero":
            for block in self.transformer_blocks:
                nn.init.zeros_(block.modulation.weight)
            nn.init.zeros_(self.norm_out.linear.weight)
        nn.init.zeros_(self.proj_out.weight)

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs=False, **kwargs):
        """As every `ConfigMixin`'s; `auto_map`, which tells diffusers where the code is, is no option of the model."""
        if isinstance(config, dict):
            config = {name: value for name, value in config.items() if name != "auto_map"}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def enable_cache(self, config):
        """As every `CacheMixin`'s."""
        if TransformerBlockRegistry is None:
            raise ImportError(
                f"diffusers {diffusers.__version__} has no registry of blocks (`diffusers.hooks._helpers`) as "
                "diffusers 0.42 has, which caches need."
            )
        super().enable_cache(config)

    def to_json_string(self):
        """The configuration, with `auto_map` for `trust_remote_code=True` and without where the model came from."""
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)  # may be a path of this machine
        config["auto_map"] = {"AutoModel": f"{Path(__file__).stem}.{type(self).__name__}"}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory, push_to_hub=False, **kwargs):
        """Writes the configuration, and beside it this file, which `trust_remote_code=True` runs."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(__file__, Path(save_directory) / Path(__file__).name)
        super().save_config(save_directory, push_to_hub, **kwargs)

    def _embed_time(self, embedder, timestep, batch_size):
        """One of the timestep embedders, `(B, D)`."""
        frequencies = self.time_proj(timestep.expand(batch_size).float() * self.config.timestep_scale)
        return embedder(frequencies.to(embedder.linear_1.weight.dtype))

    def _embed_condition(self, timestep, r_timestep, class_labels, force_drop_ids, batch_size):
        """Time and class as one vector `(B, D)`, or as two tokens `(B, 2, D)`; labels are dropped, once per sample."""
        timestep = torch.as_tensor(timestep, device=class_labels.device)
        time_embedding = self._embed_time(self.time_embed, timestep, batch_size)
        if self.interval_embed is not None:
            r_timestep = timestep if r_timestep is None else torch.as_tensor(r_timestep, device=timestep.device)
            interval = timestep - r_timestep
            time_embedding = time_embedding + self._embed_time(self.interval_embed, interval, batch_size)

        if force_drop_ids is None and self.training and self.config.class_dropout_prob > 0:
            force_drop_ids = torch.rand(batch_size, device=class_labels.device) < self.config.class_dropout_prob
        if force_drop_ids is not None:
            class_labels = torch.where(force_drop_ids.bool(), self.config.num_classes, class_labels)
        class_embedding = self.class_embed(class_labels)
        if self.is_adaptive:
            return time_embedding + class_embedding
        return torch.stack([time_embedding, class_embedding.to(time_embedding.dtype)], dim=1)

    def compute_modulation(
        self, timestep: torch.Tensor, class_labels: torch.Tensor, r_timestep: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        All that the adaptive norms get from time and class; a sampler computes it once for all steps.

        Args:
            timestep (`torch.Tensor` of shape `(R,)`): The scheduler's timesteps.
            class_labels (`torch.Tensor` of shape `(R,)`, int64): Class ids; `num_classes` is the null class.
            r_timestep (`torch.Tensor` of shape `(R,)`, *optional*): As `forward` takes it.

        Returns:
            `torch.Tensor` of shape `(R, M)`: shifts, scales and gates of all blocks and the head; rows of it are
            `forward`'s `modulation`.

        Raises:
            ValueError: if `conditioning` is not `"adaln_zero"` or `"adaln"`, or the ids or the shapes don't fit.
        """
        if not self.is_adaptive:
            raise ValueError(f"`conditioning` {self.config.conditioning!r} has no modulation.")
        check_tensors(class_labels=class_labels)
        if class_labels.ndim != 1:
            raise ValueError(f"`class_labels` has shape {tuple(class_labels.shape)}; it must be (rows,).")
        self._check_class_ids(class_labels)
        self._check_timesteps(timestep, r_timestep, class_labels)
        keep_labels = torch.zeros_like(class_labels)
        condition = self._embed_condition(timestep, r_timestep, class_labels, keep_labels, len(class_labels))
        condition = F.silu(condition.to(self.pos_embed.proj.weight.dtype))
        layers: list[Any] = [*(block.modulation for block in self.transformer_blocks), self.norm_out.linear]
        return torch.cat([layer(condition) for layer in layers], dim=1)

    def _check_class_ids(self, class_labels):
        """Values are checked on the CPU only, as a GPU would have to wait."""
        if class_labels.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"`class_labels` has dtype {class_labels.dtype}; it must hold class ids (torch.int64).")
        if class_labels.device.type == "cpu" and not torch.compiler.is_compiling() and len(class_labels):
            last = self.config.num_classes - (self.config.class_dropout_prob == 0)
            low, high = (bound.item() for bound in class_labels.aminmax())
            if not 0 <= low <= high <= last:
                raise ValueError(f"`class_labels` holds {high if low >= 0 else low}; the allowed ids are 0 to {last}.")

    def _check_timesteps(self, timestep, r_timestep, class_labels):
        """The end of an interval needs a model that embeds it; both have one value, or one per sample."""
        if r_timestep is not None and self.interval_embed is None:
            raise ValueError("`r_timestep` was given, and a model without `interval_embedding=True` has one time.")
        for name, value in (("timestep", timestep), ("r_timestep", r_timestep)):
            if isinstance(value, bool) or not isinstance(value, Real):
                check_tensors(optional=name == "r_timestep", **{name: value})
            if isinstance(value, torch.Tensor) and value.shape not in ((), (1,), class_labels.shape):
                raise ValueError(
                    f"`{name}` has shape {tuple(value.shape)}; it must be a number or that of `class_labels`, "
                    f"{tuple(class_labels.shape)}."
                )

    def _check_inputs(self, hidden_states, timestep, r_timestep, class_labels, force_drop_ids, modulation):
        """Refuses what does not fit."""
        check_tensors(hidden_states=hidden_states, class_labels=class_labels)
        check_tensors(optional=True, force_drop_ids=force_drop_ids, modulation=modulation)
        patch_size = self.config.patch_size
        if hidden_states.ndim != 4 or hidden_states.shape[1] != self.config.in_channels:
            raise ValueError(
                f"`hidden_states` has shape {tuple(hidden_states.shape)}; it must be "
                f"(batch, {self.config.in_channels}, height, width)."
            )
        height, width = hidden_states.shape[-2:]
        if height % patch_size != 0 or width % patch_size != 0 or min(height, width) == 0:
            raise ValueError(f"The latent size {height}×{width} is not divisible by the patch size {patch_size}.")
        if class_labels.shape != hidden_states.shape[:1]:
            raise ValueError(
                f"`class_labels` has shape {tuple(class_labels.shape)}; a batch of {hidden_states.shape[0]} needs "
                f"({hidden_states.shape[0]},)."
            )
        self._check_class_ids(class_labels)
        self._check_timesteps(timestep, r_timestep, class_labels)
        if force_drop_ids is not None and force_drop_ids.shape != class_labels.shape:
            raise ValueError(
                f"`force_drop_ids` has shape {tuple(force_drop_ids.shape)}; it must be that of `class_labels`, "
                f"{tuple(class_labels.shape)}."
            )
        if force_drop_ids is not None and self.config.class_dropout_prob == 0:
            raise ValueError("`force_drop_ids` needs a null class, and a model with `class_dropout_prob=0` has none.")
        if modulation is not None and (force_drop_ids is not None or not self.is_adaptive):
            raise ValueError("`modulation` needs adaptive norms, and contains the labels: pass no `force_drop_ids`.")
        if modulation is not None and (modulation.ndim != 2 or len(modulation) != len(hidden_states)):
            raise ValueError(
                f"`modulation` has shape {tuple(modulation.shape)}; a batch of {hidden_states.shape[0]} needs as many "
                "rows of `compute_modulation`."
            )

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor,
        force_drop_ids: torch.Tensor | None = None,
        modulation: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        r_timestep: torch.Tensor | float | int | None = None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(B, C, H, W)`): Noisy latents; H and W divisible by the patch size.
            timestep (`torch.Tensor` of shape `(B,)`, or a number): The scheduler's timestep, fractional ones too.
            class_labels (`torch.Tensor` of shape `(B,)`, int64): Class ids; `num_classes` is the null class.
            force_drop_ids (`torch.Tensor` of shape `(B,)`, *optional*):
                Non-zero where the label is to be replaced by the null class; given, it takes the place of the random
                dropout of training.
            modulation (`torch.Tensor` of shape `(B, M)`, *optional*):
                `compute_modulation`'s rows for these timesteps and labels, which are then not embedded again.
            attention_kwargs (`dict`, *optional*): `{"scale": s}` scales LoRA adapters.
            return_dict (`bool`, defaults to `True`): Whether to return a `Transformer2DModelOutput`.
            r_timestep (`torch.Tensor` of shape `(B,)`, or a number, *optional*):
                With `interval_embedding` the timestep at which the interval ends, at most `timestep`, which is not
                checked: the output is the mean velocity from `timestep` to there. If not given, it is `timestep`, and
                the output the velocity at `timestep`.

        Returns:
            `Transformer2DModelOutput` or `tuple`: `sample` of shape `(B, C, H, W)`, with `learn_sigma`
            `(B, 2C, H, W)` whose second half are the variance channels.

        Raises:
            ValueError: if shapes do not fit.
        """
        self._check_inputs(hidden_states, timestep, r_timestep, class_labels, force_drop_ids, modulation)
        batch_size, _, height, width = hidden_states.shape
        patch_size = self.config.patch_size
        grid = (height // patch_size, width // patch_size)

        # 1. Embed
        hidden_states = self.pos_embed(hidden_states)  # (B, N, D)
        condition: Any = None
        modulations: Any = [None] * (len(self.transformer_blocks) + 1)
        if modulation is None:
            condition = self._embed_condition(timestep, r_timestep, class_labels, force_drop_ids, batch_size)
            condition = condition.to(hidden_states.dtype)  # (B, D), or two tokens (B, 2, D)
        else:
            dim = hidden_states.shape[-1]
            size = dim * count_modulation_vectors(self.config.conditioning, self.config.modulation_shift)
            modulations = modulation.split([size] * len(self.transformer_blocks) + [2 * dim], dim=1)
        rotary_emb = None
        if self.rotary_embed is not None:
            rotary_emb = self.rotary_embed(*grid, hidden_states.device)
        in_context = self.config.conditioning == "in_context"
        if in_context:
            hidden_states = torch.cat([condition, hidden_states], dim=1)  # (B, 2 + N, D)

        # 2. Blocks
        for block, vectors in zip(self.transformer_blocks, modulations, strict=False):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, condition, rotary_emb, vectors)
            else:
                hidden_states = block(
                    hidden_states=hidden_states, condition=condition, rotary_emb=rotary_emb, modulation=vectors
                )

        # 3. Head
        if self.is_adaptive:
            hidden_states = self.norm_out(hidden_states, condition, modulations[-1])
        else:
            hidden_states = self.norm_out(hidden_states)
        hidden_states = self.proj_out(hidden_states)  # (B, N, p·p·C)
        if in_context:
            hidden_states = hidden_states[:, condition.shape[1] :]

        output = hidden_states.unflatten(1, grid).unflatten(-1, (patch_size, patch_size, self.out_channels))
        output = output.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, H, W)

        if not return_dict:
            return (output,)
        return Transformer2DModelOutput(sample=output)


def _skip_attention(attn, hidden_states, encoder_hidden_states=None, rotary_emb=None):
    """What a cache that skips attention gets in its stead."""
    return hidden_states


if TransformerBlockRegistry is not None:
    try:
        AttentionProcessorRegistry.register(
            DiTAttnProcessor, AttentionProcessorMetadata(skip_processor_output_fn=_skip_attention)
        )
        for _block_class in (DiTBlock, DiTContextBlock):
            TransformerBlockRegistry.register(
                _block_class,
                TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None),
            )
    except (TypeError, AttributeError):  # this diffusers registers in another way
        TransformerBlockRegistry = None  # type: ignore[assignment,misc]
