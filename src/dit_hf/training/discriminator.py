"""Adversarial distillation (LADD, https://arxiv.org/abs/2403.12015): a discriminator on the features of the teacher.

Shapes: `B` samples, `R` jumps of all samples, `N` tokens, `C` latent channels, `h w` latent size.
"""

from functools import partial
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from .auxiliary import AuxiliaryLoss
from .objectives import DistillationObjective
from .objectives.distillation import JUMPS
from .objectives.flow_maps import Points


# Blocks whose tokens are judged, and channels of a head.
JUDGED_BLOCKS = 4
WIDTH = 128


class ReverseGradient(torch.autograd.Function):
    """The identity, whose gradient is negative: what follows minimises a loss, and what precedes maximises it."""

    @staticmethod
    def forward(ctx, values):
        return values.view_as(values)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


def build_head(width: int) -> nn.Sequential:
    """A convolutional network from tokens on their grid to a score per token; it starts at 0."""
    last = nn.Conv2d(WIDTH, 1, 1)
    nn.init.zeros_(last.weight)
    return nn.Sequential(
        nn.Conv2d(width, WIDTH, 1),
        nn.GELU(),
        nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=4),
        nn.GroupNorm(8, WIDTH),
        nn.GELU(),
        nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=4),
        nn.GELU(),
        last,
    )


class Discriminator(AuxiliaryLoss):
    """
    Tells the ends of the student's jumps from the teacher's samples. Both are made noisy, and the frozen teacher's
    tokens after four of its blocks go through small heads, which are trained with the hinge loss. Its gradient reaches
    the student with the opposite sign, so one backward pass and one optimizer train both.

    Args:
        objective (`DistillationObjective`): Keeps the ends of the jumps of its last loss. Its teacher gets hooks.
    """

    name: ClassVar[str] = "adversarial"

    def __init__(self, objective: DistillationObjective):
        super().__init__()
        self.objective, self.weight = objective, objective.adversarial_weight
        config, blocks = objective.teacher.config, objective.teacher.transformer_blocks
        self.grid = 2 * (config.sample_size // config.patch_size,)
        judged = sorted({-(-len(blocks) * part // JUDGED_BLOCKS) for part in range(1, JUDGED_BLOCKS + 1)})
        width = config.num_attention_heads * config.attention_head_dim
        self.heads = nn.ModuleList(build_head(width) for _ in judged)
        self._tokens: list[torch.Tensor | None] = [None for _ in judged]
        for place, depth in enumerate(judged):
            blocks[depth - 1].register_forward_hook(partial(self._keep, place))

    def _keep(self, place, block, args, output):
        self._tokens[place] = output

    def tokens(self, points: Points) -> list[torch.Tensor]:
        """The teacher's normalised tokens of noisy samples, `(R, width, h, w)` per head."""
        self.objective.predict(self.objective.teacher, points)
        kept = [F.layer_norm(tokens.float(), tokens.shape[-1:]) for tokens in self._tokens if tokens is not None]
        self._tokens[:] = [None for _ in kept]
        return [tokens[:, -self.grid[0] * self.grid[1] :].transpose(1, 2).unflatten(2, self.grid) for tokens in kept]

    def scores(self, tokens: list[torch.Tensor]) -> torch.Tensor:
        """High for samples of the teacher, `(heads, R, h, w)`."""
        return torch.stack([head(part)[:, 0].float() for head, part in zip(self.heads, tokens, strict=True)])

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        The hinge loss of the trajectories of a batch, 2 if the discriminator can't tell; 0 for velocities.

        Args:
            batch (`dict[str, torch.Tensor]`): From [`draw_batch`].

        Returns:
            `torch.Tensor` of shape `(B,)`
        """
        rows, student, teacher = self.objective.ends.pop()
        with torch.no_grad():
            real = self.tokens(teacher)
        fake = [ReverseGradient.apply(part) for part in self.tokens(student)]
        losses = F.relu(1 + self.scores(fake)) + F.relu(1 - self.scores(real))
        losses = losses.mean(dim=(0, 2, 3)).view(JUMPS, len(rows)).mean(dim=0)
        return losses.new_zeros(len(batch["label"])).index_copy(0, rows, losses)
