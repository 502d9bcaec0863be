"""An order of images that does not depend on how their files are named or listed.

Shapes: `N` images, `D` values per image.
"""

import torch

from ..seeds import seeded_generator


def content_order(rows: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """
    A shuffled order that depends on the rows' values and on the seed alone: the same set gives the same sequence,
    whatever order it is stored in.

    Args:
        rows (`torch.Tensor` of shape `(N, D)`): Features or logits.
        seed (`int`, defaults to 0): Seed of the shuffle.

    Returns:
        `torch.Tensor` of shape `(N,)`, int64: indices of the rows.
    """
    direction = torch.randn(rows.shape[1], generator=seeded_generator(seed), dtype=torch.float64)
    keys = torch.cat([(part.double() * direction).sum(dim=1) for part in rows.split(1024)])
    shuffle = torch.randperm(len(rows), generator=seeded_generator(seed, 1))
    return keys.argsort(stable=True)[shuffle]
