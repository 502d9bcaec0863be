"""A discriminator for distillation. As in LADD (https://arxiv.org/abs/2403.12015) it judges features of noisy samples,
which are those of the teacher's blocks at first. Here these blocks learn too, as do jumps by regression, and heads see
no condition.

Shapes: `B` samples, `R` jumps of all samples, `C` latent channels, `h w` latent size, `g` tokens per side.
"""

import copy
import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from .auxiliary import AuxiliaryLoss
from .flow_maps import Points


if TYPE_CHECKING:
    from .distillation import DistillationObjective

# Blocks whose tokens are judged, and channels of a head.
JUDGED_BLOCKS = 4
WIDTH = 128
# The learning rate of the blocks, as a part of the heads'.
BLOCKS_RATE = 0.33


class ReverseGradient(torch.autograd.Function):
    """The identity, whose gradient changes its sign."""

    @staticmethod
    def forward(ctx, inputs):
        return inputs.view_as(inputs)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


def build_head(width: int) -> nn.Sequential:
    """A convolutional network from the grid of tokens, `(R, width, g, g)`, to a score per token; it starts at 0."""
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
    Learns to tell the ends of the student's jumps from the teacher's samples, and teaches the student to make them
    look alike. Both get noise, and small heads score the tokens of a copy of the teacher after four of its blocks.
    Heads and blocks minimise the hinge loss, and the student maximises that of its own samples, in one backward pass.
    Samples whose score is below -1 teach neither.

    Args:
        objective (`DistillationObjective`): Keeps the ends of the jumps of its last loss.
    """

    name: ClassVar[str] = "adversarial"

    def __init__(self, objective: "DistillationObjective"):
        super().__init__()
        self.objective, self.weight = objective, objective.adversarial_weight
        self.backbone = copy.deepcopy(objective.teacher).float()
        vars(self.backbone).pop("forward", None)  # the teacher's, if a trainer has prepared it
        self.backbone.transformer_blocks.requires_grad_(True)
        config, blocks = self.backbone.config, self.backbone.transformer_blocks
        self.grid = 2 * (config.sample_size // config.patch_size,)
        depths = {math.ceil(len(blocks) * part / JUDGED_BLOCKS) for part in range(1, JUDGED_BLOCKS + 1)}
        self.heads = nn.ModuleList(build_head(config.num_attention_heads * config.attention_head_dim) for _ in depths)
        self._tokens: dict[int, torch.Tensor] = {}
        for depth in depths:
            blocks[depth - 1].register_forward_hook(partial(self._keep, depth))

    def _keep(self, depth, block, args, output):
        self._tokens[depth] = output

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """The copied blocks, at a third of the learning rate, and the heads."""
        blocks = {"params": list(self.backbone.transformer_blocks.parameters()), "lr": BLOCKS_RATE * learning_rate}
        return [blocks, {"params": list(self.heads.parameters()), "lr": learning_rate}]

    def tokens(self, points: Points) -> list[torch.Tensor]:
        """Normalised tokens of noisy samples, `(R, width, g, g)` per head."""
        time = self.objective.timestep(points.time)
        self.backbone(points.noisy, time, points.label, force_drop_ids=points.drop, return_dict=False)
        kept, self._tokens = self._tokens, {}
        count = self.grid[0] * self.grid[1]  # in-context conditions come first
        parts = [kept[depth][:, -count:].float() for depth in sorted(kept)]
        return [F.layer_norm(part, part.shape[-1:]).transpose(1, 2).unflatten(2, self.grid) for part in parts]

    def scores(self, points: Points) -> torch.Tensor:
        """Scores that are high for samples of the teacher, `(heads, R, g, g)`."""
        pairs = zip(self.heads, self.tokens(points), strict=True)
        return torch.stack([head(tokens)[:, 0].float() for head, tokens in pairs])

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        Hinge losses of a batch's trajectories, 2 while the discriminator can't tell, and 0 for velocities. What they
        pass on to the student is reversed.

        Args:
            batch (`dict[str, torch.Tensor]`): From [`draw_batch`].

        Returns:
            `torch.Tensor` of shape `(B,)`
        """
        rows, student, teacher = self.objective.ends.pop()
        result = torch.zeros(len(batch["label"]), device=batch["label"].device)
        if len(rows) == 0:
            trained = (weight for weight in self.parameters() if weight.requires_grad)
            return result + 0 * sum(weight.sum() for weight in trained)  # a gradient for each process
        of_student = self.scores(replace(student, noisy=ReverseGradient.apply(student.noisy)))
        losses = F.relu(1 + of_student) + F.relu(1 - self.scores(teacher))
        return result.index_copy(0, rows, losses.mean(dim=(0, 2, 3)).view(-1, len(rows)).mean(dim=0))
