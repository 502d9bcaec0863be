"""Generators for draws that are a function of a few numbers, e.g. (seed, index of the sample)."""

import numpy as np
import torch


def seeded_generator(*numbers: int) -> torch.Generator:
    """
    A CPU generator that depends on all the numbers.

    torch seeds its CPU generator with the low 32 bits of a seed only, so that `seed * 2**32 + index` would ignore the
    seed; the numbers are mixed first.

    Args:
        numbers (`int`): Not negative, at least one; e.g. a run's seed and a sample's index.

    Returns:
        `torch.Generator`

    Example:

        >>> import torch
        >>> from dit_hf.seeds import seeded_generator
        >>> first, same, other = (torch.rand(1, generator=seeded_generator(*key)) for key in ((0, 7), (0, 7), (1, 7)))
        >>> bool(first == same), bool(first == other)
        (True, False)
    """
    sequence = np.random.SeedSequence(numbers[0], spawn_key=numbers[1:])
    return torch.Generator().manual_seed(int(sequence.generate_state(1)[0]))


def drawn_classes(num_classes: int, count: int, seed: int = 0) -> list[int]:
    """
    Classes to show of a model that has more than fit: chosen by the seed alone, not selected.

    Args:
        num_classes (`int`): Classes of the model.
        count (`int`): Classes to choose; if there are no more, all are taken in order.
        seed (`int`, defaults to 0): Of the choice.

    Returns:
        `list[int]`: ids, in the order of sampling.
    """
    if num_classes <= count:
        return list(range(num_classes))
    return torch.randperm(num_classes, generator=seeded_generator(seed))[:count].tolist()
