"""Whether a converted model computes what its checkpoint computes, and goes back to it: measured, not assumed."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..seeds import seeded_generator
from .parsing import Checkpoint
from .saving import original_state_dict


# Largest differences that rounding explains, relative to the largest output or weight.
FORWARD_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
WEIGHT_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Parity:
    """
    Differences between a checkpoint and the converted model.

    Args:
        forward (`float`): Largest difference of the outputs, relative to the largest output.
        forward_back (`float`): The same for the model written back with the original's keys.
        weights (`float`): Largest difference between a weight of the file and the one written back.
        exact (`int`): Weights of the file that come back to the bit.
        changed (`int`):
            Weights that are renamed only and yet differ from the file's, rounded to the model's type where that is
            the lower one.
        total (`int`): Weights of the file.
        dtype (`torch.dtype`): Of the model.
    """

    forward: float
    forward_back: float
    weights: float
    exact: int
    changed: int
    total: int
    dtype: torch.dtype

    @property
    def holds(self) -> bool:
        """Whether rounding explains every difference."""
        outputs = largest((self.forward, self.forward_back))
        close = outputs <= FORWARD_TOLERANCE[self.dtype] and self.weights <= WEIGHT_TOLERANCE[self.dtype]
        return close and not self.changed

    def __str__(self):
        others = "" if self.exact == self.total else f", the others within {self.weights:.1e}"
        return (
            f"largest difference of outputs {self.forward:.1e} forth, {self.forward_back:.1e} back (relative); "
            f"{self.exact} of {self.total} weights come back to the bit{others}"
            + (f"; {self.changed} differ by more than rounding" if self.changed else "")
        )


def measure_parity(checkpoint: Checkpoint, model, training_only: str | Path | None = None, seed: int = 0) -> Parity:
    """
    Compares a model with an independent forward pass of the original weights, on seeded inputs.

    Args:
        checkpoint (`Checkpoint`): From [`dit_hf.checkpoints.parsing.parse_checkpoint`].
        model (`DiTTransformer2DModel`): The converted model.
        training_only (`str` or `Path`, *optional*): File of the weights that only training needs.
        seed (`int`, defaults to 0): Of the inputs.

    Returns:
        `Parity`

    Raises:
        ValueError: if checkpoint and model do not belong together.

    Example:

        >>> import tempfile
        >>> from pathlib import Path
        >>> from dit_hf import DiTTransformer2DModel
        >>> from dit_hf.checkpoints import FAMILIES
        >>> from dit_hf.checkpoints.parity import measure_parity
        >>> from dit_hf.checkpoints.parsing import parse_checkpoint
        >>> from dit_hf.checkpoints.saving import save_original
        >>> model = DiTTransformer2DModel(sample_size=8, num_layers=2, num_attention_heads=4, attention_head_dim=12)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "tiny.pt")
        ...     save_original(model.eval(), FAMILIES["dit"], file)
        ...     parity = measure_parity(parse_checkpoint(file, num_attention_heads=4, family="dit"), model)
        >>> parity.holds
        True
    """
    family, config = checkpoint.family, model.config
    for name, value in checkpoint.config.items():
        if config[name] != value:
            raise ValueError(
                f"The checkpoint, read as {family.name}, has {name}={value!r} and the model {config[name]!r}: they "
                "are not of one model, or the family is another."
            )
    generator = seeded_generator(seed, 0)
    shape = (2, config.in_channels, config.sample_size, config.sample_size)
    latents = torch.randn(shape, generator=generator)
    labels = torch.tensor([0, model.class_embed.weight.shape[0] - 1])
    time = torch.rand(2, generator=generator) * (1 if family.flow_matching else 999)
    timestep = (1 - time if family.data_at_one else time) * (1000 if family.flow_matching else 1)
    sign = -1 if family.data_at_one else 1
    ends = [time * torch.rand(2, generator=generator)] if config.get("interval_embedding") else []
    with torch.no_grad():
        interval = {"r_timestep": 1000 * ends[0]} if ends else {}
        output = sign * model(latents.to(model.dtype), timestep, labels, **interval).sample.float()

    back = original_state_dict(model, family, training_only)
    # Tables that half precision has rounded in the file are computed anew by every code base.
    tables = {key: back[key] for key in family.tables if key in back}
    with torch.no_grad():
        outputs = [
            family.reference_forward(weights, config, latents, time, labels, *ends)
            for weights in (checkpoint.original | tables, back)
        ]
    forward, forward_back = (output_distance(output, expected) for expected in outputs)
    original = checkpoint.original | checkpoint.training_only
    # The stock format has its table of positions in some files only.
    original = {key: weight for key, weight in original.items() if key in back or key not in family.tables}
    bakes = family.data_at_one and family.bakes
    baked = {key for key, ours in family.keys.items() if bakes and ours == "time_embed.linear_1.weight"}
    weights = compare_weights(original, back, original.keys() - baked - family.tables.keys())
    return Parity(forward, forward_back, **weights, dtype=model.dtype)


def compare_weights(
    original: dict[str, torch.Tensor], back: dict[str, torch.Tensor], renamed: Collection[str]
) -> dict[str, Any]:
    """
    What [`Parity`] says of weights.

    Args:
        original (`dict[str, torch.Tensor]`): Of the file.
        back (`dict[str, torch.Tensor]`): What was written back.
        renamed (`Collection[str]`): Keys of those that must come back as they were.

    Returns:
        `dict`: `weights`, `exact`, `changed` and `total`.
    """
    return {
        "weights": largest(_distance(weight, back[key].to(weight.dtype)) for key, weight in original.items()),
        "exact": sum(torch.equal(weight, back[key].to(weight.dtype)) for key, weight in original.items()),
        "changed": sum(not _is_rounded(original[key], back[key]) for key in renamed),
        "total": len(original),
    }


def largest(values):
    """The largest of some numbers; NaN if any of them is, which `max` may pass over."""
    return torch.tensor(list(values)).max().item()


def _is_rounded(given, written):
    """Whether two weights are equal in the lower of their types."""
    dtype = given.dtype if written.dtype == torch.float32 else written.dtype
    return torch.equal(given.to(dtype), written.to(dtype))


def output_distance(output, expected):
    """Largest difference, relative to the largest output; a fresh model's head is zero, and so are all outputs."""
    scale = expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return ((output - expected).abs().max() / scale).item()


def _distance(given, written):
    """Largest difference, relative where weights are larger than 1."""
    given = given.float()
    return ((given - written.float()).abs().max() / given.abs().max().clamp(min=1)).item()
