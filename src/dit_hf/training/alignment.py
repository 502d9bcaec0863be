"""Representation alignment (REPA, https://arxiv.org/abs/2410.06940) of tokens to a frozen encoder's features.

Shapes: `B` batch, `F` the encoder's feature channels, `h w` its grid, which may differ from the tokens'.
"""

from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..evaluation.extractors import EFFICIENTNET, VisionModel
from ..evaluation.features import EfficientNetLite0
from ..models import DiTTransformer2DModel
from .objectives import AuxiliaryLoss, Objective


PROJECTOR_WIDTH = 1024


def check_alignment(objective: Objective, proj_coeff: float) -> None:
    """`ValueError` if an objective can't be combined with the alignment: it has several outputs per sample."""
    if proj_coeff > 0 and objective.teacher is not None:
        raise ValueError(f"--proj_coeff {proj_coeff} has no effect on {objective.name}; pass 0.")


class EfficientNetEncoder(nn.Module):
    """EfficientNet-Lite0's last feature map of images resized to 128 pixels per side."""

    def __init__(self):
        super().__init__()
        self.network = EfficientNetLite0(resolution=128)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, H, W)` in [-1, 1] to features `(B, 1280, 4, 4)`."""
        return self.network.last_map(images)


class TransformersEncoder(nn.Module):
    """Patch tokens of a vision model of transformers (DINOv2, CLIP's vision tower, ViT …)."""

    def __init__(self, name: str):
        super().__init__()
        self.network = VisionModel(name)
        if not isinstance(getattr(self.network.model.config, "patch_size", None), int):
            raise ValueError("its config has no patch size")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, H, W)` in [-1, 1] to features `(B, F, h, w)`, one per patch."""
        grid = self.network.side // self.network.model.config.patch_size
        tokens = self.network(images).last_hidden_state[:, -grid * grid :]  # class and register tokens come first
        return tokens.transpose(1, 2).unflatten(2, (grid, grid))


def load_encoder(name: str) -> nn.Module:
    """
    A frozen encoder whose features a transformer is aligned to.

    Args:
        name (`str`): `"efficientnet-lite0"`, whose weights come with a package, or a vision model of transformers.

    Returns:
        `nn.Module`: maps images `(B, 3, H, W)` in [-1, 1] to features `(B, F, h, w)`.

    Raises:
        ValueError: if there is no such model.
    """
    if name == EFFICIENTNET:
        return EfficientNetEncoder()
    try:
        return TransformersEncoder(name)
    except (OSError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name!r} is neither {EFFICIENTNET!r} nor a vision model of transformers: {error}"
        ) from error


def check_depth(transformer: DiTTransformer2DModel, depth: int) -> None:
    """Checks that a transformer has a block to align; `ValueError` if not."""
    if not 1 <= depth <= len(transformer.transformer_blocks):
        raise ValueError(
            f"The alignment's depth is {depth}; the transformer has blocks 1 to {len(transformer.transformer_blocks)}."
        )


class AlignmentHead(AuxiliaryLoss):
    """
    Projects the tokens that leave one block to the encoder's features, and measures how well they agree.

    Args:
        transformer (`DiTTransformer2DModel`): Its block gets a hook; nothing else of it changes.
        depth (`int`): The block, counted from 1.
        feature_dim (`int`): F.

    Raises:
        ValueError: if the transformer has no such block.
    """

    name: ClassVar[str] = "alignment"

    def __init__(self, transformer: DiTTransformer2DModel, depth: int, feature_dim: int):
        super().__init__()
        check_depth(transformer, depth)
        self.grid = 2 * (transformer.config.sample_size // transformer.config.patch_size,)
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        self.projector = nn.Sequential(
            nn.Linear(width, PROJECTOR_WIDTH),
            nn.SiLU(),
            nn.Linear(PROJECTOR_WIDTH, PROJECTOR_WIDTH),
            nn.SiLU(),
            nn.Linear(PROJECTOR_WIDTH, feature_dim),
        )
        self._tokens: list[torch.Tensor] = []
        transformer.transformer_blocks[depth - 1].register_forward_hook(self._keep)

    def _keep(self, block, args, output):
        if torch.is_grad_enabled():  # targets may take further forward passes
            self._tokens[:] = [output[0] if isinstance(output, tuple) else output]  # beside context tokens

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        Args:
            batch (`dict[str, torch.Tensor]`):
                `features` of shape `(B, F, h, w)`, of the clean images whose noisy latents went in last.

        Returns:
            `torch.Tensor` of shape `(B,)`: one minus the mean cosine of tokens and features.
        """
        tokens = self._tokens.pop()[:, -self.grid[0] * self.grid[1] :]  # in-context conditions come first
        tokens = self.projector(tokens)
        features = F.interpolate(batch["features"], size=self.grid, mode="bilinear", antialias=True)
        return 1 - F.cosine_similarity(tokens, features.flatten(2).transpose(1, 2), dim=-1).mean(dim=1)
