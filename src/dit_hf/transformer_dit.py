"""Diffusion Transformer for class-conditional images (DiT, Peebles & Xie, https://arxiv.org/abs/2212.09748).

Options cover the family that grew from it: SiT (https://arxiv.org/abs/2401.08740), REPA
(https://arxiv.org/abs/2410.06940) and LightningDiT (https://arxiv.org/abs/2501.01423).

Shapes: `B` batch, `C` channels, `H W` latent size, `p` patch size, `h w` = `H/p W/p`, `N` = `h·w` tokens (two more
with in-context conditioning), `D` width, `heads` attention heads.

The file is self-contained: it imports torch and diffusers only, so that it is also the code a Hub repository carries.
"""

import importlib
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks._helpers import (
    AttentionProcessorMetadata,
    AttentionProcessorRegistry,
    TransformerBlockMetadata,
    TransformerBlockRegistry,
)
from diffusers.loaders import PeftAdapterMixin
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, apply_rotary_emb, get_1d_rotary_pos_embed
from diffusers.models.model_loading_utils import load_state_dict
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import apply_lora_scale, logging
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


logger = logging.get_logger(__name__)

CONDITIONINGS = ("adaln_zero", "adaln", "cross_attention", "in_context")
POSITION_EMBEDDINGS = ("sincos", "sincos+rope")
NORMS = ("layer_norm", "rms_norm")
FEED_FORWARDS = ("gelu", "swiglu")
# Width of the sinusoidal timestep embedding, before its MLP.
FREQUENCY_DIM = 256
NORM_EPS = 1e-6
# Initial standard deviation of the embedding table and of the timestep MLP.
EMBEDDING_STD = 0.02


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
        hidden_states = self.proj(latents)  # (B, D, h, w)
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
        # The number of heads is left open: under tensor parallelism each rank holds a share of them.
        query, key, value = (states.unflatten(-1, (-1, attn.head_dim)) for states in (query, key, value))
        if attn.norm_q is not None and attn.norm_k is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        if rotary_emb is not None:
            query, key = (apply_rotary_emb(states, rotary_emb, sequence_dim=1) for states in (query, key))
        hidden_states = dispatch_attention_fn(
            query,  # (B, N, heads, D/heads)
            key,
            value,
            backend=self._attention_backend,
            # Condition tokens are not split over ranks, so cross-attention is local.
            parallel_config=self._parallel_config if encoder_hidden_states is None else None,
        )
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


class DiTGELU(nn.Module):
    """A linear layer and tanh GELU; CPU inference does both in one kernel, which spares a pass over memory."""

    def __init__(self, proj: nn.Linear):
        super().__init__()
        self.proj = proj

    def forward(self, hidden_states):
        if self._is_fusible(hidden_states):
            proj = self.proj
            return torch.ops.mkldnn._linear_pointwise(hidden_states, proj.weight, proj.bias, "gelu", [], "tanh")
        return F.gelu(self.proj(hidden_states), approximate="tanh")

    def _is_fusible(self, hidden_states):
        """Whether nothing but a plain float32 layer on the CPU is called: no adapter, quantization, hook, gradient."""
        proj, weight = self.proj, self.proj.weight
        return (
            hidden_states.device.type == weight.device.type == "cpu"
            and hidden_states.dtype == weight.dtype == torch.float32
            and type(hidden_states) is torch.Tensor
            and (type(proj), type(weight)) == (nn.Linear, nn.Parameter)
            and not ("forward" in vars(proj) or proj._forward_hooks or proj._forward_pre_hooks)
            and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())
            and forward_ad.unpack_dual(hidden_states).tangent is None  # the kernel has no forward-mode derivative
            and not is_in_torch_dispatch_mode()
            and torch.backends.mkldnn.is_available()
            and torch.backends.mkldnn.enabled
            and not torch.jit.is_tracing()
        )


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
    feed_forward = FeedForward(dim, inner_dim=int(dim * mlp_ratio), activation_fn="gelu-approximate")
    feed_forward.net[0] = DiTGELU(feed_forward.net[0].proj)
    return feed_forward


def build_norm(kind, dim, affine):
    """A norm over the width; RMS norms have a weight even where modulation follows, as in LightningDiT."""
    if kind == "rms_norm":
        return nn.RMSNorm(dim, eps=NORM_EPS)
    return nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=affine)


def build_qk_norm(kind, head_dim):
    """A norm over a head's channels; layer norms have torch's own epsilon here, as in timm's attention."""
    return nn.RMSNorm(head_dim, eps=NORM_EPS) if kind == "rms_norm" else nn.LayerNorm(head_dim)


class DiTBlock(nn.Module):
    """
    Adaptive layer norm block; `gated` (adaLN-Zero) scales both branches by regressed gates (DiT fig. 3), and without
    `shift` no shift is regressed (LightningDiT). `condition` is `(B, D)`, or already what `modulation` makes of it.
    """

    def __init__(
        self,
        num_attention_heads: int,
        attention_head_dim: int,
        mlp_ratio: float,
        norm: str = "layer_norm",
        qk_norm: bool = False,
        ff: str = "gelu",
        gated: bool = True,
        shift: bool = True,
    ):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.gated, self.shift = gated, shift
        self.norm1 = build_norm(norm, dim, affine=False)
        self.attn = DiTAttention(num_attention_heads, attention_head_dim, qk_norm=norm if qk_norm else None)
        self.norm2 = build_norm(norm, dim, affine=False)
        self.ff = build_feed_forward(ff, dim, mlp_ratio)
        self.modulation = nn.Linear(dim, 2 * (1 + gated + shift) * dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        condition: torch.Tensor,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        if condition.shape[1] == hidden_states.shape[2]:
            condition = self.modulation(F.silu(condition))
        vectors = iter(condition.chunk(2 * (1 + self.gated + self.shift), dim=1))  # (B, D)
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
    ) -> torch.Tensor:
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states), rotary_emb=rotary_emb)
        if self.cross_attn is not None:
            hidden_states = hidden_states + self.cross_attn(self.norm_cross(hidden_states), condition)
        return hidden_states + self.ff(self.norm2(hidden_states))


class DiTAdaLayerNormOut(nn.Module):
    """Norm before the head, modulated by the condition `(B, D)`, or by what `linear` has made of it."""

    def __init__(self, dim: int, norm: str = "layer_norm"):
        super().__init__()
        self.norm = build_norm(norm, dim, affine=False)
        self.linear = nn.Linear(dim, 2 * dim)

    def forward(self, hidden_states: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        if condition.shape[1] == hidden_states.shape[2]:
            condition = self.linear(F.silu(condition))
        shift, scale = condition.chunk(2, dim=1)
        return modulate(self.norm(hidden_states), shift, scale)


class DiTTransformer2DModel(ModelMixin, AttentionMixin, ConfigMixin, CacheMixin, PeftAdapterMixin):
    r"""
    Class-conditional Diffusion Transformer (DiT, https://arxiv.org/abs/2212.09748).

    Args:
        sample_size (`int`, defaults to 32): Side of the latents the model is built for; other sizes work too.
        patch_size (`int`, defaults to 2): Side of a patch; a token is one patch.
        in_channels (`int`, defaults to 4): Channels of the latents.
        num_layers (`int`, defaults to 28): Blocks.
        num_attention_heads (`int`, defaults to 16): Heads a block.
        attention_head_dim (`int`, defaults to 72): Channels a head; the width is heads × channels, divisible by 4.
        mlp_ratio (`float`, defaults to 4.0): Hidden width of the feed-forward layers over the model's width.
        num_classes (`int`, defaults to 1000): Classes; the id `num_classes` is the null class.
        class_dropout_prob (`float`, defaults to 0.1):
            Probability with which a training sample's label is replaced by the null class. With 0 there is no null
            class, and so no classifier-free guidance.
        learn_sigma (`bool`, defaults to `True`): Whether the head predicts variance channels beside the mean's.
        conditioning (`str`, defaults to `"adaln_zero"`):
            How time and class enter a block: `"adaln_zero"`, `"adaln"`, `"cross_attention"` or `"in_context"`.
        position_embedding (`str`, defaults to `"sincos"`):
            `"sincos"` adds the paper's frozen table, `"sincos+rope"` turns queries and keys by their place as well.
        norm (`str`, defaults to `"layer_norm"`): `"layer_norm"` or `"rms_norm"`.
        qk_norm (`bool`, defaults to `False`): Whether queries and keys of each head are normalised.
        ff (`str`, defaults to `"gelu"`): Feed-forward layers, `"gelu"` or `"swiglu"` of two thirds of the width.
        modulation_shift (`bool`, defaults to `True`):
            Whether the blocks' adaptive norms shift as well as scale; the head's does always.
        timestep_scale (`float`, defaults to 1.0):
            The scheduler's timestep is multiplied by this before it is embedded; 0.001 for models that were trained
            with time in [0, 1].

    Raises:
        ValueError: if an option is unknown or sizes do not fit; the message names the option.
    """

    _auto_class = "AutoModel"
    _supports_gradient_checkpointing = True
    _no_split_modules = ["DiTBlock", "DiTContextBlock"]
    _repeated_blocks = ["DiTBlock", "DiTContextBlock"]
    _keep_in_fp32_modules = ["time_embed"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm"]
    _cp_plan = {
        "transformer_blocks.0": {
            "hidden_states": ContextParallelInput(split_dim=1, expected_dims=3, split_output=False)
        },
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }
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
    ):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        options = {
            "conditioning": (conditioning, CONDITIONINGS),
            "position_embedding": (position_embedding, POSITION_EMBEDDINGS),
            "norm": (norm, NORMS),
            "ff": (ff, FEED_FORWARDS),
        }
        for name, (option, allowed) in options.items():
            if option not in allowed:
                raise ValueError(f"`{name}` is {option!r}; it must be one of {', '.join(allowed)}.")
        self.is_adaptive = conditioning in ("adaln_zero", "adaln")
        if not self.is_adaptive and not modulation_shift:
            raise ValueError(
                f"`modulation_shift=False` needs adaptive norms; `conditioning` {conditioning!r} has none."
            )
        rotary = position_embedding == "sincos+rope"
        if rotary and conditioning == "in_context":
            raise ValueError("`position_embedding='sincos+rope'` has no place for the tokens of 'in_context'.")
        if rotary and attention_head_dim % 4 != 0:
            raise ValueError(f"`attention_head_dim` is {attention_head_dim}; 'sincos+rope' needs a multiple of 4.")
        counts = {"sample_size": sample_size, "patch_size": patch_size, "in_channels": in_channels}
        counts |= {"num_layers": num_layers, "num_classes": num_classes}
        for name, size in counts.items():
            if size < 1:
                raise ValueError(f"`{name}` is {size}; it must be at least 1.")
        if not 0 <= class_dropout_prob <= 1:
            raise ValueError(f"`class_dropout_prob` is {class_dropout_prob}; it must be from 0 to 1.")
        if sample_size % patch_size != 0:
            raise ValueError(f"`sample_size` {sample_size} is not divisible by `patch_size` {patch_size}.")
        if dim < 4 or dim % 4 != 0:
            raise ValueError(
                f"The width `num_attention_heads` × `attention_head_dim` = {num_attention_heads} × "
                f"{attention_head_dim} = {dim} must be divisible by 4, for two axes of sines and cosines."
            )
        self.out_channels = 2 * in_channels if learn_sigma else in_channels

        # 1. Embed patches, time and class
        self.pos_embed = DiTPatchEmbed(sample_size, patch_size, in_channels, dim)
        self.time_proj = Timesteps(FREQUENCY_DIM, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(FREQUENCY_DIM, dim)
        self.class_embed = nn.Embedding(num_classes + int(class_dropout_prob > 0), dim)

        self.rotary_embed = None
        if rotary:
            self.rotary_embed = DiTRotaryEmbed(attention_head_dim)
            angles = ContextParallelInput(split_dim=0, expected_dims=2, split_output=True)
            self._cp_plan = self._cp_plan | {"rotary_embed": {0: angles, 1: angles}}

        # 2. Blocks
        sizes = (num_attention_heads, attention_head_dim, mlp_ratio, norm, qk_norm, ff)
        self.transformer_blocks = nn.ModuleList(
            DiTBlock(*sizes, gated=conditioning == "adaln_zero", shift=modulation_shift)
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
        nn.init.normal_(self.time_embed.linear_1.weight, std=EMBEDDING_STD)
        nn.init.normal_(self.time_embed.linear_2.weight, std=EMBEDDING_STD)
        if self.config.conditioning == "adaln_zero":
            for block in self.transformer_blocks:
                nn.init.zeros_(block.modulation.weight)
            nn.init.zeros_(self.norm_out.linear.weight)
        nn.init.zeros_(self.proj_out.weight)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "DiTTransformer2DModel":
        """
        A freshly initialised model of a size of the paper.

        Args:
            name (`str`): `"DiT-S/8"` … `"DiT-XL/2"`; see `dit_hf.presets.PRESETS`.
            overrides: Constructor arguments that replace the preset's.

        Returns:
            `DiTTransformer2DModel`

        Raises:
            ValueError: if there is no such preset.
        """
        return cls(**(_package("presets").preset_config(name) | overrides))

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str,
        num_attention_heads: int | None = None,
        family: str = "auto",
        weights: str = "ema",
        torch_dtype: torch.dtype | None = None,
    ) -> "DiTTransformer2DModel":
        """
        Loads a checkpoint of an original code base.

        Args:
            pretrained_model_link_or_path (`str`): A local `.pt` or `.safetensors` file.
            num_attention_heads (`int`, *optional*):
                Heads can't be read off the weights; the widths of the paper are known, others need this.
            family (`str`, defaults to `"auto"`):
                Code base the file comes from: `"dit"`, `"sit"`, `"repa"`, `"lightningdit"` or `"diffusers"`.
            weights (`str`, defaults to `"ema"`): Which of a training checkpoint's weights, `"ema"` or `"model"`.
            torch_dtype (`torch.dtype`, *optional*):
                Type of the weights, float32 if not given; the timestep embedding stays in float32, as with
                `from_pretrained`.

        Returns:
            `DiTTransformer2DModel`: in eval mode.

        Raises:
            ValueError: if the file is not such a checkpoint; the message names the file and the key.
        """
        load_model = _package("checkpoints.loading").load_model
        return load_model(cls, pretrained_model_link_or_path, num_attention_heads, family, weights, torch_dtype)

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs=False, **kwargs):
        """As every `ConfigMixin`'s; the configuration of diffusers' own DiT is read as well."""
        if isinstance(config, dict):  # less what only tells diffusers where the code is
            config = {name: value for name, value in config.items() if name != "auto_map"}
        if isinstance(config, dict) and "num_embeds_ada_norm" in config:
            config = _package("checkpoints.diffusers_dit").our_config(config)
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, resolved_model_file, name, loaded_keys, **kwargs):
        """Renames the weights of diffusers' own DiT; the weights of this class pass through."""
        if "transformer_blocks.0.norm1.linear.weight" in loaded_keys:
            if state_dict is None:
                state_dict = {
                    key: weight for file in resolved_model_file for key, weight in load_state_dict(file).items()
                }
            stock = _package("checkpoints.diffusers_dit")
            try:
                state_dict = stock.to_our_state_dict(state_dict)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            loaded_keys = list(state_dict)
            if unfit := set(loaded_keys) ^ set(model.state_dict()):
                raise ValueError(f"{name}: the key {min(unfit)!r} is missing or unknown.")
            logger.warning(f"{name}: {stock.CORRECTED}.")
        return super()._load_pretrained_model(model, state_dict, resolved_model_file, name, loaded_keys, **kwargs)

    def save_pretrained(
        self,
        save_directory,
        is_main_process=True,
        save_function=None,
        safe_serialization=True,
        variant=None,
        max_shard_size="10GB",
        push_to_hub=False,
        use_flashpack=False,
        *,
        card=None,
        **kwargs,
    ):
        """
        Saves the model, its code and a model card, and what a conversion kept aside.

        Args:
            save_directory (`str` or `Path`): Created if it does not exist.
            is_main_process, save_function, safe_serialization, variant, max_shard_size, use_flashpack: As with every
                model.
            push_to_hub (`bool`, defaults to `False`): Whether to publish the folder as well.
            card (`dit_hf.hub.CardFacts`, *optional*): What the model can't tell of itself.
            kwargs: `repo_id`, `commit_message`, `private`, `token`, `create_pr` for `push_to_hub`.
        """
        is_installed = __name__.startswith("dit_hf.")
        hub = _package("hub") if push_to_hub or is_installed else None
        folder = Path(save_directory)
        options = {"safe_serialization": safe_serialization, "variant": variant, "max_shard_size": max_shard_size}
        super().save_pretrained(folder, is_main_process, save_function, **options, use_flashpack=use_flashpack)
        if not is_main_process:
            return
        if hub is not None:
            hub.carry_over(self, folder, "projectors.safetensors")
            hub.write_card(self, folder, facts=card)
        else:
            source = Path(str(self.config.get("_name_or_path")))
            for file in (source / "projectors.safetensors", source / "README.md"):
                if file.is_file() and source.resolve() != folder.resolve():
                    shutil.copyfile(file, folder / file.name)
        if push_to_hub:
            hub.publish_folder(folder, kwargs.pop("repo_id", folder.resolve().name), self, card, **kwargs)

    def save_config(self, save_directory, push_to_hub=False, **kwargs):
        """Writes the configuration, and this file beside it as the code for `trust_remote_code=True`."""
        super().save_config(save_directory)
        folder = Path(save_directory)
        config = json.loads((folder / self.config_name).read_text())
        config.pop("_name_or_path", None)  # may be a path of this machine
        (folder / self.config_name).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        shutil.copyfile(__file__, folder / "transformer_dit.py")
        if push_to_hub:
            _package("hub").publish_folder(folder, kwargs.pop("repo_id", folder.resolve().name), self, **kwargs)

    def push_to_hub(self, repo_id, **kwargs):
        """As every `ModelMixin`'s, with a model card; see `DiTClassCondPipeline.push_to_hub`."""
        return _package("hub.publish").push(self, repo_id, **kwargs)

    def _embed_condition(self, timestep, class_labels, force_drop_ids, batch_size):
        """Time and class as one vector `(B, D)`, or as two tokens `(B, 2, D)`; labels are dropped, once a sample."""
        timestep = torch.as_tensor(timestep, device=class_labels.device).expand(batch_size)
        frequencies = self.time_proj(timestep.float() * self.config.timestep_scale)
        time_embedding = self.time_embed(frequencies.to(self.time_embed.linear_1.weight.dtype))

        if force_drop_ids is None and self.training and self.config.class_dropout_prob > 0:
            force_drop_ids = torch.rand(batch_size, device=class_labels.device) < self.config.class_dropout_prob
        if force_drop_ids is not None:
            class_labels = torch.where(force_drop_ids.bool(), self.config.num_classes, class_labels)
        class_embedding = self.class_embed(class_labels)
        if self.is_adaptive:
            return time_embedding + class_embedding
        return torch.stack([time_embedding, class_embedding.to(time_embedding.dtype)], dim=1)

    def compute_modulation(self, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        """
        All that the adaptive norms get from time and class; a sampler computes it once for all steps.

        Args:
            timestep (`torch.Tensor` of shape `(R,)`): The scheduler's timesteps.
            class_labels (`torch.Tensor` of shape `(R,)`, int64): Class ids; `num_classes` is the null class.

        Returns:
            `torch.Tensor` of shape `(R, M)`: shifts, scales and gates of all blocks and the head; rows of it are
            `forward`'s `modulation`.

        Raises:
            ValueError: if `conditioning` is not `"adaln_zero"` or `"adaln"`.
        """
        if not self.is_adaptive:
            raise ValueError(f"`conditioning` {self.config.conditioning!r} has no modulation.")
        keep_labels = torch.zeros_like(class_labels)
        condition = self._embed_condition(timestep, class_labels, keep_labels, len(class_labels))
        condition = F.silu(condition.to(self.pos_embed.proj.weight.dtype))
        layers: list[Any] = [*(block.modulation for block in self.transformer_blocks), self.norm_out.linear]
        return torch.cat([layer(condition) for layer in layers], dim=1)

    def _split_modulation(self, modulation):
        """What each block and the head get of `compute_modulation`'s rows."""
        dim = self.config.num_attention_heads * self.config.attention_head_dim
        block_size = 2 * (1 + (self.config.conditioning == "adaln_zero") + self.config.modulation_shift) * dim
        return modulation.split([block_size] * len(self.transformer_blocks) + [2 * dim], dim=1)

    def _check_inputs(self, hidden_states, timestep, class_labels, force_drop_ids, modulation):
        """Everything that can be told from shapes alone."""
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
        if modulation is not None and (force_drop_ids is not None or not self.is_adaptive):
            raise ValueError("`modulation` fits adaptive norms only, and its labels can't be dropped any more.")
        if modulation is not None and modulation.shape[:1] != hidden_states.shape[:1]:
            raise ValueError(
                f"`modulation` has shape {tuple(modulation.shape)}; a batch of {hidden_states.shape[0]} needs as many rows."
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

        Returns:
            `Transformer2DModelOutput` or `tuple`: `sample` of shape `(B, C, H, W)`, with `learn_sigma`
            `(B, 2C, H, W)` whose second half are the variance channels.

        Raises:
            ValueError: if shapes do not fit.
        """
        self._check_inputs(hidden_states, timestep, class_labels, force_drop_ids, modulation)
        batch_size, _, height, width = hidden_states.shape
        patch_size = self.config.patch_size
        grid = (height // patch_size, width // patch_size)

        # 1. Embed
        hidden_states = self.pos_embed(hidden_states)  # (B, N, D)
        if modulation is None:
            condition = self._embed_condition(timestep, class_labels, force_drop_ids, batch_size)
            conditions = [condition.to(hidden_states.dtype)] * (len(self.transformer_blocks) + 1)
        else:
            conditions = self._split_modulation(modulation)
        rotary_emb = None
        if self.rotary_embed is not None:
            rotary_emb = self.rotary_embed(*grid, hidden_states.device)
        in_context = self.config.conditioning == "in_context"
        if in_context:
            hidden_states = torch.cat([conditions[0], hidden_states], dim=1)  # (B, 2 + N, D)

        # 2. Blocks
        for block, condition in zip(self.transformer_blocks, conditions[:-1], strict=True):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, condition, rotary_emb)
            else:
                hidden_states = block(hidden_states=hidden_states, condition=condition, rotary_emb=rotary_emb)

        # 3. Head
        hidden_states = (
            self.norm_out(hidden_states, conditions[-1]) if self.is_adaptive else self.norm_out(hidden_states)
        )
        hidden_states = self.proj_out(hidden_states)  # (B, N, p·p·C)
        if in_context:
            hidden_states = hidden_states[:, conditions[0].shape[1] :]

        output = hidden_states.unflatten(1, grid).unflatten(-1, (patch_size, patch_size, self.out_channels))
        output = output.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, H, W)

        if not return_dict:
            return (output,)
        return Transformer2DModelOutput(sample=output)


def _package(module):
    """A module of the installed package: this file also travels alone."""
    if importlib.util.find_spec("dit_hf") is None:
        raise ImportError("This needs the dit_hf package, which is not installed.")
    return importlib.import_module(f"dit_hf.{module}")


def _skip_attention(attn, hidden_states, encoder_hidden_states=None, rotary_emb=None):
    """What a cache that skips attention gets in its stead."""
    return hidden_states


AttentionProcessorRegistry.register(
    DiTAttnProcessor, AttentionProcessorMetadata(skip_processor_output_fn=_skip_attention)
)
for _block_class in (DiTBlock, DiTContextBlock):
    TransformerBlockRegistry.register(
        _block_class,
        TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None),
    )
