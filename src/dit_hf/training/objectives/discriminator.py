"""A discriminator for distillation. As in LADD (https://arxiv.org/abs/2403.12015) it judges the frozen teacher's
features of noisy samples; here jumps also learn by regression, and the heads are not conditioned.

Shapes: `B` samples, `R` jumps of all samples, `C` latent channels, `h w` latent size, `g` tokens per side.
"""

import math
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call

from .auxiliary import AuxiliaryLoss
from .flow_maps import Points


if TYPE_CHECKING:
    from .distillation import DistillationObjective

# Blocks whose tokens are judged, and channels of a head.
JUDGED_BLOCKS = 4
WIDTH = 128


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
    look alike. Both get noise, and small heads score the tokens of the frozen teacher after four of its blocks. The
    heads minimise the hinge loss, the student maximises its own scores, in one backward pass.

    Args:
        objective (`DistillationObjective`): Keeps the ends of the jumps of its last loss. Its teacher gets hooks.
    """

    name: ClassVar[str] = "adversarial"

    def __init__(self, objective: "DistillationObjective"):
        super().__init__()
        self.objective, self.weight = objective, objective.adversarial_weight
        config, blocks = objective.teacher.config, objective.teacher.transformer_blocks
        self.grid = 2 * (config.sample_size // config.patch_size,)
        depths = {math.ceil(len(blocks) * part / JUDGED_BLOCKS) for part in range(1, JUDGED_BLOCKS + 1)}
        self.heads = nn.ModuleList(build_head(config.num_attention_heads * config.attention_head_dim) for _ in depths)
        self._tokens: dict[int, torch.Tensor] | None = None
        for depth in depths:
            blocks[depth - 1].register_forward_hook(partial(self._keep, depth))

    def _keep(self, depth, block, args, output):
        if self._tokens is not None:  # not while the teacher samples
            self._tokens[depth] = output

    def tokens(self, points: Points) -> list[torch.Tensor]:
        """The teacher's normalised tokens of noisy samples, `(R, width, g, g)` per head."""
        self._tokens = {}
        self.objective.predict_teacher(points)
        kept, self._tokens = self._tokens, None
        count = self.grid[0] * self.grid[1]  # in-context conditions come first
        parts = [kept[depth][:, -count:].float() for depth in sorted(kept)]
        return [F.layer_norm(part, part.shape[-1:]).transpose(1, 2).unflatten(2, self.grid) for part in parts]

    def scores(self, tokens: list[torch.Tensor], frozen: bool = False) -> torch.Tensor:
        """Scores that are high for samples of the teacher, `(heads, R, g, g)`; `frozen` heads get no gradient."""
        parts = []
        for head, part in zip(self.heads, tokens, strict=True):
            weights = {name: weight.detach() if frozen else weight for name, weight in head.named_parameters()}
            parts.append(functional_call(head, weights, (part,))[:, 0].float())
        return torch.stack(parts)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        Hinge losses of a batch's trajectories, 2 while the discriminator can't tell, and 0 for velocities. Their
        gradient is the heads' for the heads, and that of the negative scores for the student.

        Args:
            batch (`dict[str, torch.Tensor]`): From [`draw_batch`].

        Returns:
            `torch.Tensor` of shape `(B,)`
        """
        rows, student, teacher = self.objective.ends.pop()
        result = torch.zeros(len(batch["label"]), device=batch["label"].device)
        if len(rows) == 0:
            return result + 0 * sum(weight.sum() for weight in self.parameters())  # a gradient for each process
        with torch.no_grad():
            real = self.tokens(teacher)
        fake = self.tokens(student)
        hinge = F.relu(1 + self.scores([part.detach() for part in fake])) + F.relu(1 - self.scores(real))
        of_student = -self.scores(fake, frozen=True)
        losses = hinge + of_student - of_student.detach()  # the value is that of the heads
        return result.index_copy(0, rows, losses.mean(dim=(0, 2, 3)).view(-1, len(rows)).mean(dim=0))
