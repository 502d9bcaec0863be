"""Averages of the weights while they are trained.

`WeightAverage` is diffusers' `EMAModel` with a constant decay and checkpoints of sharded weights. `PowerAverages`
keeps two averages with power-function profiles (Karras et al., https://arxiv.org/abs/2312.02696), from whose snapshots
an average of any length can be put together after training.
"""

import re
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from ..files import check_file, reading, writing


# Relative standard deviations (sigma_rel) of the two averages.
PROFILE_WIDTHS = (0.05, 0.10)
SNAPSHOT = re.compile(r"ema-([1-9]\d{0,14})-(0\.05|0\.10)\.safetensors")


def _local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _one(weights):
    """1.0 on their device, in double precision where it has that."""
    device = weights[0].device
    return torch.ones((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


def _full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _sharded_like(tensor, like):
    if tensor.shape != like.shape:
        raise ValueError(f"it holds an average of shape {tuple(tensor.shape)} where {tuple(like.shape)} is needed")
    if isinstance(like, DTensor) and not isinstance(tensor, DTensor):
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor.to(like.device)


@torch.no_grad()
def move_averages(averages: list[torch.Tensor], weights: Iterable[torch.Tensor], share: torch.Tensor) -> None:
    """
    Moves averages towards weights: average + share · (weight − average), without memory for the differences.

    Args:
        averages (`list[torch.Tensor]`): Changed in place.
        weights (`Iterable[torch.Tensor]`): Of the same shapes.
        share (`torch.Tensor` of shape `()`): On their device.
    """
    for average, weight in zip(averages, weights, strict=True):
        _local(average).lerp_(_local(weight), share.to(average.dtype))


class WeightAverage(EMAModel):
    """
    diffusers' `EMAModel` with the papers' constant decay: in each step, average = decay · average + (1 - decay) ·
    weights, starting from the initial weights. Checkpoints hold whole weights, also where each process has a part.

    Args:
        parameters (`Iterable[torch.nn.Parameter]`): The weights before the first step.
        decay (`float`, defaults to 0.9999): Of every step.
        options: For `EMAModel`; with `use_ema_warmup=True` the decay rises to `decay` as there.
    """

    shadow_params: list[torch.Tensor]

    @property
    def optimization_step(self) -> int:
        """Steps that count; they are counted on the device, as it knows first whether a step was taken."""
        return int(self._steps)

    @optimization_step.setter
    def optimization_step(self, count: int) -> None:
        self._steps = torch.tensor(count)

    @torch.no_grad()
    def step(self, parameters: Iterable[torch.nn.Parameter], taken: torch.Tensor | None = None) -> None:
        """
        Updates the average with the weights after an optimizer step.

        Args:
            parameters (`Iterable[torch.nn.Parameter]`): The weights.
            taken (`torch.Tensor` of shape `()`, *optional*):
                1.0 if the step was taken, 0.0 to leave all as it is; in double precision where the device has it.
        """
        taken = _one(self.shadow_params) if taken is None else taken
        self._steps = self._steps.to(taken.device) + taken.long()
        share = torch.full_like(taken, 1 - self.decay)
        if self.use_ema_warmup:
            passed = (self._steps - self.update_after_step - 1).clamp(min=0).to(taken)
            share = (1 + passed / self.inv_gamma).pow(-self.power).clamp(1 - self.decay, 1 - self.min_decay)
        move_averages(self.shadow_params, parameters, share * taken)

    def state_dict(self) -> dict:
        """As `EMAModel`'s; with sharded weights every process has to call it."""
        state = super().state_dict()
        return state | {"shadow_params": [_full(weight) for weight in state["shadow_params"]]}

    def load_state_dict(self, state_dict: dict) -> None:
        """As `EMAModel`'s."""
        parts = self.shadow_params
        super().load_state_dict(state_dict)
        self.shadow_params = [
            _sharded_like(weight, part) for weight, part in zip(self.shadow_params, parts, strict=True)
        ]


def profile_exponent(sigma_rel: float) -> float:
    """
    The exponent of a power-function profile, from its relative width.

    Args:
        sigma_rel (`float`): Standard deviation of the profile over the length of training, above 0, below 0.2886.

    Returns:
        `float`: γ ≥ 0 with sigma_rel² = (γ + 1) / ((γ + 2)² (γ + 3)).

    Raises:
        ValueError: if no profile is that wide.
    """
    if not 1e-6 < sigma_rel < 12**-0.5:
        raise ValueError(f"sigma_rel is {sigma_rel}; it must be above 1e-6 and below {12**-0.5:.4f}.")
    low, high = 0.0, 4 / sigma_rel  # the width falls with γ, and is below 1/γ
    for _ in range(100):
        middle = (low + high) / 2
        wider = (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > sigma_rel**2
        low, high = (middle, high) if wider else (low, middle)
    return low


class PowerAverages:
    """
    Two averages of the weights with profiles of relative widths 0.05 and 0.10.

    Args:
        parameters (`Iterable[torch.nn.Parameter]`): The weights before the first step.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]):
        parameters = list(parameters)
        self._steps = torch.tensor(0)
        self.averages = {width: [weight.detach().clone() for weight in parameters] for width in PROFILE_WIDTHS}
        self._exponents = {width: profile_exponent(width) for width in PROFILE_WIDTHS}

    @property
    def steps(self) -> int:
        """Steps that count."""
        return int(self._steps)

    def step(self, parameters: Iterable[torch.nn.Parameter], taken: torch.Tensor | None = None) -> None:
        """Updates the averages with the weights after an optimizer step; `taken` as for [`WeightAverage`]."""
        taken = _one(self.averages[PROFILE_WIDTHS[0]]) if taken is None else taken
        self._steps = self._steps.to(taken.device) + taken.long()
        parameters = list(parameters)
        for width, averages in self.averages.items():
            keep = (1 - 1 / self._steps.clamp(min=1).to(taken)) ** (self._exponents[width] + 1)
            move_averages(averages, parameters, (1 - keep) * taken)

    def save_snapshot(self, folder: str | Path, names: list[str], is_main_process: bool = True) -> None:
        """
        Writes both averages as half-precision `ema-STEP-WIDTH.safetensors`.

        Args:
            folder (`str` or `Path`): Created if it does not exist.
            names (`list[str]`): Of the parameters.
            is_main_process (`bool`, defaults to `True`):
                Whether to write; with sharded weights every process has to call this.
        """
        for width, averages in self.averages.items():
            whole = {name: _full(weight).half().cpu() for name, weight in zip(names, averages, strict=True)}
            if is_main_process:
                path = Path(folder) / f"ema-{self.steps}-{width:.2f}.safetensors"
                with writing(path) as partial:
                    save_file(whole, partial)

    @staticmethod
    def drop_snapshots(folder: str | Path, step: int) -> None:
        """
        Removes snapshots that a resumed run will write again.

        Args:
            folder (`str` or `Path`): With snapshots; it need not exist.
            step (`int`): The checkpoint's; later snapshots are removed.
        """
        for path in Path(folder).glob("ema-*.safetensors"):
            if (match := SNAPSHOT.fullmatch(path.name)) and int(match[1]) > step:
                path.unlink()

    def state_dict(self) -> dict:
        """Everything a resumed run needs."""
        averages = {f"{width:.2f}": [_full(weight) for weight in kept] for width, kept in self.averages.items()}
        return {"steps": self.steps, "averages": averages}

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` returned; version 0.2 had numbers for the widths."""
        self._steps = torch.tensor(state["steps"])
        for width, averages in self.averages.items():
            saved = state["averages"].get(f"{width:.2f}") or state["averages"][width]
            self.averages[width] = [_sharded_like(new, old) for new, old in zip(saved, averages, strict=True)]


def _overlap(first, second):
    """Inner product of two profiles, each an exponent and an end (its last step)."""
    (gamma_a, end_a), (gamma_b, end_b) = sorted((first, second), key=lambda profile: profile[1])
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) / end_b * (end_a / end_b) ** gamma_b


def average_after_training(
    folder: str | Path, sigma_rel: float, step: int | None = None, kept: Collection[int] = ()
) -> dict[str, torch.Tensor]:
    """
    An average of any length, as the combination of snapshots whose profile comes nearest.

    Args:
        folder (`str` or `Path`): With snapshots of [`PowerAverages`].
        sigma_rel (`float`): Relative width of the wanted profile.
        step (`int`, *optional*): Its last step; that of the newest snapshot if not given.
        kept (`Collection[int]`): Steps whose snapshots have to be there, as far as they count.

    Returns:
        `dict[str, torch.Tensor]`: float32 weights by name.

    Raises:
        ValueError: if there are no snapshots up to the step, it is beyond the newest, or one is missing or damaged.
    """
    found = {
        path: (profile_exponent(float(match[2])), int(match[1]))
        for path in sorted(Path(folder).glob("ema-*.safetensors"))
        if (match := SNAPSHOT.fullmatch(path.name))
    }
    newest = max([0, *kept, *(end for _, end in found.values())])
    step = newest if step is None else step
    found = {path: profile for path, profile in found.items() if profile[1] <= step}
    if not found or step > newest:
        raise ValueError(
            f"{folder} holds no snapshots for step {step}, the newest is of {newest}; train with --ema_profiles."
        )
    for end in sorted({end for _, end in found.values()} | {end for end in kept if end <= step}):
        names = [f"ema-{end}-{width}.safetensors" for width in ("0.05", "0.10")]
        if absent := [name for name in names if Path(folder, name) not in found]:
            raise ValueError(f"{folder} lacks {absent[0]}; restore it, or pass a --step before {end}.")
    target = (profile_exponent(sigma_rel), step)
    profiles = list(found.values())
    overlaps = torch.tensor([[_overlap(a, b) for b in profiles] for a in profiles], dtype=torch.float64)
    wanted = torch.tensor([_overlap(profile, target) for profile in profiles], dtype=torch.float64)
    coefficients = torch.linalg.lstsq(overlaps, wanted, driver="gelsd").solution
    coefficients = coefficients / coefficients.sum()  # of a weight that did not change, the average is that weight
    weights: dict[str, torch.Tensor] = {}
    for path, coefficient in zip(found, coefficients.tolist(), strict=True):
        for name, tensor in _read_snapshot(path, weights).items():
            weights[name] = weights.get(name, 0) + coefficient * tensor.float()
    return weights


def _read_snapshot(path, like):
    """A snapshot, of the same weights as the others, all of them finite."""
    with reading(check_file(path), "snapshot of averages"):
        snapshot = load_file(path)
    if not snapshot:
        raise ValueError(f"{path} holds no weights; restore it.")
    if like and {name: tensor.shape for name, tensor in snapshot.items()} != {
        name: tensor.shape for name, tensor in like.items()
    }:
        raise ValueError(f"{path} is of another model than the other snapshots; restore it.")
    if bad := [name for name, tensor in snapshot.items() if tensor.dtype != torch.float16]:
        raise ValueError(f"{path} is damaged: {bad[0]} is of {snapshot[bad[0]].dtype}, not float16; restore it.")
    if bad := [name for name, tensor in snapshot.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{path} is damaged: {bad[0]} is not finite; restore it.")
    return snapshot
