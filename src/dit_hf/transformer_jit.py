"""Just image Transformer (JiT, Li & He, https://arxiv.org/abs/2511.13720): predicts the clean image from pixels.

Shapes: `B` batch, `C` channels, `H W` image size, `p` patch size, `h w` = `H/p W/p`, `N` = `h·w` image tokens, `L`
context tokens, `D` width, `heads` attention heads.

This file imports torch and diffusers only: it is also the code that a Hub repository carries, so it loads with any
diffusers from `MIN_DIFFUSERS` on. Names that are private to diffusers are optional: without them only the feature
that needs them is missing.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn as nn
import torch.nn.functional as F


MIN_DIFFUSERS = "0.38.0"
if tuple(map(int, diffusers.__version__.split(".")[:2])) < tuple(map(int, MIN_DIFFUSERS.split(".")[:2])):
    raise ImportError(
        f"JiTTransformer2DModel needs diffusers >= {MIN_DIFFUSERS}; this is {diffusers.__version__}. "
        "Run `pip install --upgrade diffusers`."
    )

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, apply_rotary_emb, get_1d_rotary_pos_embed
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
try:  # the plan for context parallelism: image and context tokens are split alike
    from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

    CONTEXT_PARALLEL_PLAN: Any = {
        "transformer_blocks.0": {
            name: ContextParallelInput(split_dim=1, expected_dims=3, split_output=False)
            for name in ("hidden_states", "encoder_hidden_states")
        },
        "rotary_embed": dict.fromkeys((0, 1), ContextParallelInput(split_dim=0, expected_dims=2, split_output=True)),
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


# Width of the sinusoidal time embedding, before its MLP.
FREQUENCY_DIM = 256
NORM_EPS = 1e-6
# Initial standard deviation of the class table, of the time MLP and of the positions of context tokens.
EMBEDDING_STD = 0.02
# The timestep of diffusers' flow-matching schedulers where all is noise.
NUM_TRAIN_TIMESTEPS = 1000
# Shift, scale and gate of each of a block's two branches.
NUM_VECTORS = 6
# Ranges of the sizes, far beyond every published model: a configuration must not ask for any memory it likes.
SIZES = {
    "sample_size": (1, 2**14),
    "patch_size": (1, 2**14),
    "in_channels": (1, 2**16),
    "num_layers": (1, 2**10),
    "num_attention_heads": (1, 2**12),
    "attention_head_dim": (1, 2**14),
    "bottleneck_dim": (1, 2**16),
    "in_context_len": (1, 2**16),
    "num_classes": (1, 2**28),
}
FACTORS = {"mlp_ratio": 2**10, "t_eps": 1, "noise_scale": 10**3}
PROBABILITIES = ("class_dropout_prob", "dropout")
MAX_PARAMETERS = 2**34
MAX_TOKENS = 2**18


def modulate(hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Adaptive norm's affine part: `(B, N, D)` with `(B, D)` shift and scale."""
    return torch.addcmul(shift.unsqueeze(1), hidden_states, 1 + scale.unsqueeze(1))


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


class JiTPatchEmbed(nn.Module):
    """
    Cuts images into patches, projects them through a bottleneck and adds positions.

    The table of the built size is saved with the weights: nothing trains it, but averaging the original's weights has
    moved it by some 1e-4, and the network was evaluated with what came of it. Other sizes get a computed table.
    """

    def __init__(self, sample_size: int, patch_size: int, in_channels: int, bottleneck_dim: int, dim: int):
        super().__init__()
        self.dim = dim
        self.base_size = (sample_size // patch_size, sample_size // patch_size)
        self.bottleneck = nn.Conv2d(in_channels, bottleneck_dim, kernel_size=patch_size, stride=patch_size, bias=False)
        self.proj = nn.Conv2d(bottleneck_dim, dim, kernel_size=1)
        self.register_buffer("positions", sincos_positions(*self.base_size, dim))
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

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden_states = self.proj(self.bottleneck(images.to(self.proj.weight.dtype)))  # (B, D, h, w)
        positions = self.positions_for(*hidden_states.shape[-2:])
        # Contiguous, or the whole residual stream inherits the transposed strides, and every norm copies it.
        return hidden_states.flatten(2).transpose(1, 2).contiguous() + positions  # (B, N, D)


class JiTContextEmbed(nn.Module):
    """Repeats the class embedding `(B, D)` as `L` tokens with learned positions, `(B, L, D)`."""

    def __init__(self, in_context_len: int, dim: int):
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(1, in_context_len, dim))

    def forward(self, class_embedding: torch.Tensor) -> torch.Tensor:
        return class_embedding.unsqueeze(1) + self.positions


# Copied from dit_hf.transformer_dit.DiTRotaryEmbed with DiT->JiT
class JiTRotaryEmbed(nn.Module):
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


class JiTAttnProcessor:
    """Scaled dot-product attention through diffusers' dispatcher, which owns backends and context parallelism."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "JiTAttention",
        hidden_states: torch.Tensor,
        rotary_emb: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        # The number of heads is left open: under tensor parallelism each rank holds a part of them.
        query, key, value = (states.unflatten(-1, (-1, attn.head_dim)) for states in attn.project(hidden_states))
        query, key = (
            apply_rotary_emb(norm(states), rotary_emb, sequence_dim=1)
            for norm, states in ((attn.norm_q, query), (attn.norm_k, key))
        )
        hidden_states = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )  # (B, N, heads, D/heads)
        hidden_states = hidden_states.flatten(2).to(query.dtype)
        for layer in attn.to_out:
            hidden_states = layer(hidden_states)
        return hidden_states


class JiTAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention with biases; the queries and keys of each head are normalised, then rotated."""

    _default_processor_cls = JiTAttnProcessor
    _available_processors = [JiTAttnProcessor]
    processor: Callable[..., torch.Tensor]

    def __init__(self, num_attention_heads: int, attention_head_dim: int, dropout: float):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.heads = num_attention_heads
        self.head_dim = attention_head_dim
        self.use_bias = True
        self.is_cross_attention = False
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(dropout)])
        self.norm_q = nn.RMSNorm(attention_head_dim, eps=NORM_EPS)
        self.norm_k = nn.RMSNorm(attention_head_dim, eps=NORM_EPS)
        self.processor = self._default_processor_cls()

    def project(self, hidden_states):
        """Queries, keys and values, `(B, N, D)` each, by the fused layer if there is one."""
        if self.fused_projections:
            return self.to_qkv(hidden_states).chunk(3, dim=-1)
        return self.to_q(hidden_states), self.to_k(hidden_states), self.to_v(hidden_states)

    def forward(self, hidden_states, rotary_emb):
        return self.processor(self, hidden_states, rotary_emb)


class JiTSwiGLU(nn.Module):
    """Gated feed-forward; gate and value are two layers, so that tensor parallelism can split both."""

    def __init__(self, dim: int, inner_dim: int, dropout: float):
        super().__init__()
        self.gate_proj = nn.Linear(dim, inner_dim)
        self.up_proj = nn.Linear(dim, inner_dim)
        self.dropout = nn.Dropout(dropout)
        self.down_proj = nn.Linear(inner_dim, dim)

    def forward(self, hidden_states):
        hidden_states = F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return self.down_proj(self.dropout(hidden_states))


# Copied from dit_hf.transformer_dit.swiglu_width
def swiglu_width(dim: int, mlp_ratio: float) -> int:
    """Hidden width of a SwiGLU with about the parameters of a two-layer perceptron of this ratio."""
    return int(2 / 3 * int(dim * mlp_ratio))


class JiTBlock(nn.Module):
    """
    adaLN-Zero block with RMS norms. Context tokens come beside the image tokens: with `takes_context` the block works
    on both as one sequence, without it passes the context on.
    """

    def __init__(
        self,
        num_attention_heads: int,
        attention_head_dim: int,
        mlp_ratio: float,
        dropout: float,
        takes_context: bool,
    ):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.takes_context = takes_context
        self.norm1 = nn.RMSNorm(dim, eps=NORM_EPS)
        self.attn = JiTAttention(num_attention_heads, attention_head_dim, dropout)
        self.norm2 = nn.RMSNorm(dim, eps=NORM_EPS)
        self.ff = JiTSwiGLU(dim, swiglu_width(dim, mlp_ratio), dropout)
        self.modulation = nn.Linear(dim, NUM_VECTORS * dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        condition: torch.Tensor,
        rotary_emb: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Image tokens `(B, N, D)` and context tokens `(B, L, D)`, for the condition `(B, D)`."""
        context_len, image_len = encoder_hidden_states.shape[1], hidden_states.shape[1]
        if self.takes_context:
            hidden_states = torch.cat([encoder_hidden_states, hidden_states], dim=1)  # (B, L + N, D)
            cosines, sines = rotary_emb
            # Context tokens are not rotated.
            rotary_emb = F.pad(cosines, (0, 0, context_len, 0), value=1.0), F.pad(sines, (0, 0, context_len, 0))
        vectors = self.modulation(F.silu(condition)).chunk(NUM_VECTORS, dim=1)  # (B, D)
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = vectors

        attn_output = self.attn(modulate(self.norm1(hidden_states), shift_attn, scale_attn), rotary_emb=rotary_emb)
        hidden_states = torch.addcmul(hidden_states, attn_output, gate_attn.unsqueeze(1))
        ff_output = self.ff(modulate(self.norm2(hidden_states), shift_ff, scale_ff))
        hidden_states = torch.addcmul(hidden_states, ff_output, gate_ff.unsqueeze(1))
        if self.takes_context:
            encoder_hidden_states, hidden_states = hidden_states.split([context_len, image_len], dim=1)
        return hidden_states, encoder_hidden_states


class JiTAdaLayerNormOut(nn.Module):
    """RMS norm before the head, modulated by the condition `(B, D)`."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=NORM_EPS)
        self.linear = nn.Linear(dim, 2 * dim)

    def forward(self, hidden_states, condition):
        shift, scale = self.linear(F.silu(condition)).chunk(2, dim=1)
        return modulate(self.norm(hidden_states), shift, scale)


def count_weights(config: Mapping) -> int:
    """
    Parameters of a model, without biases and norms.

    Args:
        config (`Mapping`): A `JiTTransformer2DModel`'s config.

    Returns:
        `int`
    """
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    patch_values = config["in_channels"] * config["patch_size"] ** 2
    block = (4 + NUM_VECTORS) * dim**2 + 3 * dim * swiglu_width(dim, config["mlp_ratio"])
    classes = config["num_classes"] + int(config["class_dropout_prob"] > 0)
    embed = config["bottleneck_dim"] * (patch_values + dim) + dim * (FREQUENCY_DIM + dim + classes)
    return embed + dim * config["in_context_len"] + config["num_layers"] * block + dim * (2 * dim + patch_values)


def check_config(config: Mapping) -> None:
    """
    Checks a model's options before anything is allocated.

    Args:
        config (`Mapping`): All arguments of `JiTTransformer2DModel`.

    Raises:
        ValueError: naming the option, its value and the allowed ones.
    """
    for name, (smallest, largest) in (SIZES | {"in_context_start": (0, 2**10)}).items():
        size = config[name]
        if isinstance(size, bool) or not isinstance(size, int) or not smallest <= size <= largest:
            raise ValueError(f"`{name}` is {size!r}; it must be a whole number from {smallest} to {largest}.")
    for name, bound in FACTORS.items():
        factor = config[name]
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor <= bound:
            raise ValueError(f"`{name}` is {factor!r}; it must be a number above 0, at most {bound}.")
    for name in PROBABILITIES:
        probability = config[name]
        if isinstance(probability, bool) or not isinstance(probability, (int, float)) or not 0 <= probability <= 1:
            raise ValueError(f"`{name}` is {probability!r}; it must be from 0 to 1.")
    _check_sizes_fit(**{name: config[name] for name in SIZES})
    if config["in_context_start"] >= config["num_layers"]:
        raise ValueError(
            f"`in_context_start` is {config['in_context_start']}; a model of {config['num_layers']} layers has blocks "
            f"0 to {config['num_layers'] - 1}."
        )
    if config["attention_head_dim"] % 4 != 0:
        raise ValueError(
            f"`attention_head_dim` is {config['attention_head_dim']}; rotary positions of two axes need a multiple "
            "of 4."
        )
    if swiglu_width(config["num_attention_heads"] * config["attention_head_dim"], config["mlp_ratio"]) < 1:
        raise ValueError(f"`mlp_ratio` is {config['mlp_ratio']!r}, which leaves the feed-forward layers no width.")
    if (count := count_weights(config)) > MAX_PARAMETERS:
        sizes = ", ".join(f"`{name}` {config[name]}" for name in SIZES)
        raise ValueError(
            f"A model of {sizes} and `mlp_ratio` {config['mlp_ratio']} has {count:,} parameters; at most "
            f"{MAX_PARAMETERS:,} are possible."
        )


# Copied from dit_hf.transformer_dit._check_sizes_fit
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


def init_stacked(*layers: nn.Linear) -> None:
    """Xavier for layers that are one matrix in the original: its bound sees their full height."""
    height = sum(layer.out_features for layer in layers)
    bound = math.sqrt(6 / (layers[0].in_features + height))
    for layer in layers:
        nn.init.uniform_(layer.weight, -bound, bound)


class JiTTransformer2DModel(ModelMixin, AttentionMixin, ConfigMixin, CacheMixin, PeftAdapterMixin):
    r"""
    Class-conditional pixel-space Transformer that predicts the clean image (JiT, https://arxiv.org/abs/2511.13720).

    Its `sample` is the velocity noise − data of diffusers' flow-matching schedulers, computed from the predicted image
    x and the noisy image z at `timestep = 1000 · sigma`: (z − x) / max(sigma, t_eps). The paper's time is 1 − sigma,
    and its velocity has the opposite sign.

    Args:
        sample_size (`int`, defaults to 256):
            Side of the images the model is built for. Other sizes work too: absolute positions are then computed, and
            rotary ones continue with the same step from token to token.
        patch_size (`int`, defaults to 16): Side of a patch; a token is one patch.
        in_channels (`int`, defaults to 3): Channels of the images.
        num_layers (`int`, defaults to 12): Blocks.
        num_attention_heads (`int`, defaults to 12): Heads per block.
        attention_head_dim (`int`, defaults to 64): Channels per head, divisible by 4; the width is heads × channels.
        mlp_ratio (`float`, defaults to 4.0): The SwiGLU layers have two thirds of this times the model's width.
        bottleneck_dim (`int`, defaults to 128): Channels between the two layers of the patch embedding.
        in_context_len (`int`, defaults to 32): Context tokens, all made of the class embedding.
        in_context_start (`int`, defaults to 4): The first block in which context tokens join the image tokens.
        num_classes (`int`, defaults to 1000): Classes; the id `num_classes` is the null class.
        class_dropout_prob (`float`, defaults to 0.1):
            Probability with which a training sample's label is replaced by the null class. With 0 there is no null
            class, and so no classifier-free guidance.
        dropout (`float`, defaults to 0.0):
            Dropout of the attention's output and inside of the feed-forward layers in training, in the middle half of
            the blocks.
        t_eps (`float`, defaults to 0.05): The smallest sigma that the velocity is divided by.
        noise_scale (`float`, defaults to 1.0):
            Standard deviation of the noise that the model was trained with, 2.0 for the published 512×512 models. The
            model takes noisy images as they are; a sampler multiplies its initial noise by it.

    Raises:
        ValueError: if an option is out of range or sizes do not fit; the message names the option.

    Example:

        >>> import torch
        >>> from dit_hf import JiTTransformer2DModel
        >>> model = JiTTransformer2DModel(
        ...     sample_size=32, patch_size=8, num_layers=2, num_attention_heads=4, attention_head_dim=12,
        ...     in_context_start=1,
        ... )
        >>> images, labels = torch.randn(2, 3, 32, 32), torch.tensor([207, 88])
        >>> model(images, 500, labels).sample.shape  # a velocity
        torch.Size([2, 3, 32, 32])
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["JiTBlock"]
    _repeated_blocks = ["JiTBlock"]
    _keep_in_fp32_modules = ["time_embed"]
    _skip_layerwise_casting_patterns = ["pos_embed", "context_embed", "norm"]
    _cp_plan = CONTEXT_PARALLEL_PLAN
    _tp_plan = {
        "transformer_blocks.*.attn.to_q": "colwise",
        "transformer_blocks.*.attn.to_k": "colwise",
        "transformer_blocks.*.attn.to_v": "colwise",
        "transformer_blocks.*.attn.to_out.0": "rowwise",
        "transformer_blocks.*.ff.gate_proj": "colwise",
        "transformer_blocks.*.ff.up_proj": "colwise",
        "transformer_blocks.*.ff.down_proj": "rowwise",
    }

    @register_to_config
    def __init__(
        self,
        sample_size: int = 256,
        patch_size: int = 16,
        in_channels: int = 3,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        attention_head_dim: int = 64,
        mlp_ratio: float = 4.0,
        bottleneck_dim: int = 128,
        in_context_len: int = 32,
        in_context_start: int = 4,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        dropout: float = 0.0,
        t_eps: float = 0.05,
        noise_scale: float = 1.0,
    ):
        super().__init__()
        check_config(self.config)
        dim = num_attention_heads * attention_head_dim

        # 1. Embed patches, time and class
        self.pos_embed = JiTPatchEmbed(sample_size, patch_size, in_channels, bottleneck_dim, dim)
        self.time_proj = Timesteps(FREQUENCY_DIM, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(FREQUENCY_DIM, dim)
        self.class_embed = nn.Embedding(num_classes + int(class_dropout_prob > 0), dim)
        self.context_embed = JiTContextEmbed(in_context_len, dim)
        self.rotary_embed = JiTRotaryEmbed(attention_head_dim)

        # 2. Blocks
        quarter = num_layers // 4
        self.transformer_blocks = nn.ModuleList(
            JiTBlock(
                num_attention_heads,
                attention_head_dim,
                mlp_ratio,
                dropout=dropout if quarter <= index < 3 * quarter else 0.0,
                takes_context=index >= in_context_start,
            )
            for index in range(num_layers)
        )

        # 3. Head
        self.norm_out = JiTAdaLayerNormOut(dim)
        self.proj_out = nn.Linear(dim, patch_size * patch_size * in_channels)

        self.gradient_checkpointing = False
        self.initialize_weights()

    @torch.no_grad()
    def initialize_weights(self):
        """Initialises as the original does: Xavier linears, small embeddings, the identity function by zero gates."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for block in self.transformer_blocks:
            init_stacked(block.attn.to_q, block.attn.to_k, block.attn.to_v)
            init_stacked(block.ff.gate_proj, block.ff.up_proj)
            nn.init.zeros_(block.modulation.weight)
        for projection in (self.pos_embed.bottleneck, self.pos_embed.proj):
            nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
        nn.init.zeros_(self.pos_embed.proj.bias)
        embeddings = (self.time_embed.linear_1.weight, self.time_embed.linear_2.weight, self.class_embed.weight)
        for weight in (*embeddings, self.context_embed.positions):
            nn.init.normal_(weight, std=EMBEDDING_STD)
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

    def _embed_time(self, sigma):
        """The embedding `(B, D)` of the original's time, which runs from noise at 0 to data at 1."""
        return self.time_embed(self.time_proj(1 - sigma).to(self.time_embed.linear_1.weight.dtype))

    def _embed_class(self, class_labels, force_drop_ids):
        """The embedding `(B, D)` of the labels; in training some are dropped, once per sample."""
        if force_drop_ids is None and self.training and self.config.class_dropout_prob > 0:
            drop = torch.rand(len(class_labels), device=class_labels.device)
            force_drop_ids = drop < self.config.class_dropout_prob
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

    def _check_inputs(self, hidden_states, timestep, class_labels, force_drop_ids):
        """Refuses what does not fit."""
        check_tensors(hidden_states=hidden_states, class_labels=class_labels)
        check_tensors(optional=True, force_drop_ids=force_drop_ids)
        patch_size = self.config.patch_size
        if hidden_states.ndim != 4 or hidden_states.shape[1] != self.config.in_channels:
            raise ValueError(
                f"`hidden_states` has shape {tuple(hidden_states.shape)}; it must be "
                f"(batch, {self.config.in_channels}, height, width)."
            )
        height, width = hidden_states.shape[-2:]
        if height % patch_size != 0 or width % patch_size != 0 or min(height, width) == 0:
            raise ValueError(f"The image size {height}×{width} is not divisible by the patch size {patch_size}.")
        if class_labels.shape != hidden_states.shape[:1]:
            raise ValueError(
                f"`class_labels` has shape {tuple(class_labels.shape)}; a batch of {hidden_states.shape[0]} needs "
                f"({hidden_states.shape[0]},)."
            )
        self._check_class_ids(class_labels)
        if isinstance(timestep, torch.Tensor) and timestep.shape not in ((), (1,), class_labels.shape):
            raise ValueError(
                f"`timestep` has shape {tuple(timestep.shape)}; it must be a number or that of `class_labels`, "
                f"{tuple(class_labels.shape)}."
            )
        if force_drop_ids is not None and force_drop_ids.shape != class_labels.shape:
            raise ValueError(
                f"`force_drop_ids` has shape {tuple(force_drop_ids.shape)}; it must be that of `class_labels`, "
                f"{tuple(class_labels.shape)}."
            )
        if force_drop_ids is not None and self.config.class_dropout_prob == 0:
            raise ValueError("`force_drop_ids` needs a null class, and a model with `class_dropout_prob=0` has none.")

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor,
        force_drop_ids: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        return_pred_original_sample: bool = False,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(B, C, H, W)`):
                Noisy images, (1 − sigma) · data + sigma · `noise_scale` · noise with data in [−1, 1]; H and W
                divisible by the patch size.
            timestep (`torch.Tensor` of shape `(B,)`, or a number): The scheduler's timestep, 1000 · sigma.
            class_labels (`torch.Tensor` of shape `(B,)`, int64): Class ids; `num_classes` is the null class.
            force_drop_ids (`torch.Tensor` of shape `(B,)`, *optional*):
                Non-zero where the label is to be replaced by the null class; given, it takes the place of the random
                dropout of training.
            attention_kwargs (`dict`, *optional*): `{"scale": s}` scales LoRA adapters.
            return_dict (`bool`, defaults to `True`): Whether to return a `Transformer2DModelOutput`.
            return_pred_original_sample (`bool`, defaults to `False`):
                Whether to return the clean images that the network predicts, in place of the velocity.

        Returns:
            `Transformer2DModelOutput` or `tuple`: `sample` of shape `(B, C, H, W)`.

        Raises:
            ValueError: if shapes do not fit.
        """
        self._check_inputs(hidden_states, timestep, class_labels, force_drop_ids)
        batch_size, channels, height, width = hidden_states.shape
        patch_size = self.config.patch_size
        grid = (height // patch_size, width // patch_size)
        noisy_images = hidden_states
        timestep = torch.as_tensor(timestep, device=hidden_states.device)
        sigma = timestep.expand(batch_size).float() / NUM_TRAIN_TIMESTEPS  # (B,)

        # 1. Embed
        hidden_states = self.pos_embed(hidden_states)  # (B, N, D)
        class_embedding = self._embed_class(class_labels, force_drop_ids)
        context = self.context_embed(class_embedding)  # (B, L, D)
        condition = (self._embed_time(sigma) + class_embedding).to(hidden_states.dtype)  # (B, D)
        rotary_emb = self.rotary_embed(*grid, hidden_states.device)

        # 2. Blocks
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states, context = self._gradient_checkpointing_func(
                    block, hidden_states, context, condition, rotary_emb
                )
            else:
                hidden_states, context = block(
                    hidden_states=hidden_states,
                    encoder_hidden_states=context,
                    condition=condition,
                    rotary_emb=rotary_emb,
                )

        # 3. Head
        hidden_states = self.proj_out(self.norm_out(hidden_states, condition))  # (B, N, p·p·C)
        output = hidden_states.unflatten(1, grid).unflatten(-1, (patch_size, patch_size, channels))
        output = output.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, H, W)

        # 4. From the clean image to the velocity, in float32: the division enlarges rounding errors
        if not return_pred_original_sample:
            velocity = noisy_images.float() - output.float()
            velocity = velocity / sigma.clamp(min=self.config.t_eps).view(-1, 1, 1, 1)
            output = velocity.to(output.dtype)

        if not return_dict:
            return (output,)
        return Transformer2DModelOutput(sample=output)


def _skip_attention(attn, hidden_states, rotary_emb=None):
    """What a cache that skips attention gets in its stead."""
    return hidden_states


if TransformerBlockRegistry is not None:
    try:
        AttentionProcessorRegistry.register(
            JiTAttnProcessor, AttentionProcessorMetadata(skip_processor_output_fn=_skip_attention)
        )
        TransformerBlockRegistry.register(
            JiTBlock, TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=1)
        )
    except (TypeError, AttributeError):  # this diffusers registers in another way
        TransformerBlockRegistry = None  # type: ignore[assignment,misc]
