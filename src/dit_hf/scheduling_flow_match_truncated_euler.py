"""Euler steps of flow matching whose grids keep a distance from the data: RAE's and DDT's.

Shapes: `B` images, `C` channels, `H W` latent size.

This file imports torch and diffusers only: it is also the code that a Hub repository carries.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput


@dataclass
class FlowMatchTruncatedEulerSchedulerOutput(BaseOutput):
    """
    Args:
        prev_sample (`torch.Tensor` of shape `(B, C, H, W)`): The sample at the next timestep.
    """

    prev_sample: torch.Tensor


class FlowMatchTruncatedEulerScheduler(SchedulerMixin, ConfigMixin):
    r"""
    Euler steps between equally spaced sigmas from 1 to `last_sigma`, and perhaps one more from there to the data.

    RAE's N steps (https://arxiv.org/abs/2510.11690) have N + 1 such sigmas and end at the last, where little noise is
    left; DDT's (https://arxiv.org/abs/2504.05741) have N and a longer step to the data. All are shifted.

    Args:
        num_train_timesteps (`int`, defaults to 1000): Timesteps are sigmas times this.
        shift (`float`, defaults to 1.0): Sigmas become `shift · sigma / (1 + (shift − 1) · sigma)`.
        last_sigma (`float`, defaults to 0.001): The last of the equally spaced sigmas, before the shift.
        ends_at_data (`bool`, defaults to `False`): Whether the last step goes from there to the data.

    Example:

        >>> from dit_hf import FlowMatchTruncatedEulerScheduler
        >>> scheduler = FlowMatchTruncatedEulerScheduler(last_sigma=0.04, ends_at_data=True)  # DDT's
        >>> scheduler.set_timesteps(4)
        >>> [round(sigma, 2) for sigma in scheduler.sigmas.tolist()]
        [1.0, 0.68, 0.36, 0.04, 0.0]
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        last_sigma: float = 0.001,
        ends_at_data: bool = False,
    ):
        if not 0 < last_sigma < 1:
            raise ValueError(f"`last_sigma` is {last_sigma!r}; it must be a number between 0 and 1.")
        if not 0 < shift < float("inf"):
            raise ValueError(f"`shift` is {shift!r}; it must be a finite number above 0.")
        self._step_index: int | None = None
        self.set_timesteps(num_train_timesteps)

    # Copied from dit_hf.scheduling_flow_match_sde.FlowMatchSDEScheduler.step_index
    @property
    def step_index(self) -> int | None:
        """The step that comes next; None before the first."""
        return self._step_index

    # Copied from dit_hf.scheduling_flow_match_sde.FlowMatchSDEScheduler.set_begin_index
    def set_begin_index(self, begin_index: int = 0) -> None:
        """Sets the step that comes first."""
        self._step_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int = 50,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
    ) -> None:
        """
        Makes the schedule.

        Args:
            num_inference_steps (`int`, defaults to 50): Steps, each with one evaluation of the model.
            device (`str` or `torch.device`, *optional*): Of the timesteps.
            sigmas (`list[float]`, *optional*):
                Descending ones in place of equal steps, before the shift; the last is where sampling ends, unless
                `ends_at_data` adds a 0.
        """
        if sigmas is None:
            points = int(num_inference_steps or 0) + (not self.config.ends_at_data)
            line = torch.linspace(1.0, self.config.last_sigma, points, dtype=torch.float64)
        else:
            line = torch.tensor(sigmas, dtype=torch.float64)
        shifted = self.config.shift * line / (1 + (self.config.shift - 1) * line)
        if self.config.ends_at_data:
            shifted = torch.cat([shifted, shifted.new_zeros(1)])
        if len(shifted) < 2:
            raise ValueError(f"`sigmas` is {sigmas}; a step needs two of them, as the last is where sampling ends.")
        self.num_inference_steps = len(shifted) - 1
        self.sigmas = shifted.float()
        self.timesteps = (self.sigmas[:-1] * self.config.num_train_timesteps).to(device)
        self._step_index = None

    # Copied from dit_hf.scheduling_flow_match_sde.FlowMatchSDEScheduler.index_for_timestep
    def index_for_timestep(self, timestep: torch.Tensor | float) -> int:
        """The step of a timestep of the schedule."""
        return int((self.timesteps - float(timestep)).abs().argmin())

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | float,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> FlowMatchTruncatedEulerSchedulerOutput | tuple[torch.Tensor]:
        """
        One step towards the data.

        Args:
            model_output (`torch.Tensor` of shape `(B, C, H, W)`): The velocity, noise − data.
            timestep (`torch.Tensor` or `float`): Of the schedule.
            sample (`torch.Tensor` of shape `(B, C, H, W)`): At this timestep.
            return_dict (`bool`, defaults to `True`): Whether to return a `FlowMatchTruncatedEulerSchedulerOutput`.

        Returns:
            `FlowMatchTruncatedEulerSchedulerOutput` or `tuple`: `prev_sample`, of the type of `model_output`.
        """
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep)
        sigma, next_sigma = self.sigmas[self._step_index].item(), self.sigmas[self._step_index + 1].item()
        self._step_index += 1
        prev_sample = (sample.float() + (next_sigma - sigma) * model_output.float()).to(model_output.dtype)
        return FlowMatchTruncatedEulerSchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    # Copied from dit_hf.scheduling_flow_match_sde.FlowMatchSDEScheduler.scale_noise
    def scale_noise(self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Noisy samples `(B, C, H, W)` at timesteps `(B,)`: `(1 − sigma) · sample + sigma · noise`."""
        sigma = (timestep.to(sample) / self.config.num_train_timesteps).view(-1, *[1] * (sample.ndim - 1))
        return (1 - sigma) * sample + sigma * noise

    # Copied from dit_hf.scheduling_flow_match_sde.FlowMatchSDEScheduler.from_config
    @classmethod
    def from_config(cls, config=None, return_unused_kwargs=False, **kwargs):
        """As every `ConfigMixin`'s; `auto_map`, which tells diffusers where the code is, is no option."""
        if isinstance(config, dict):
            config = {name: value for name, value in config.items() if name != "auto_map"}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    # Copied from dit_hf.scheduling_flow_match_sde.FlowMatchSDEScheduler.to_json_string
    def to_json_string(self):
        """The configuration, with `auto_map` for `trust_remote_code=True`."""
        config = json.loads(super().to_json_string())
        config["auto_map"] = {"AutoModel": f"{Path(__file__).stem}.{type(self).__name__}"}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    # Copied from dit_hf.scheduling_flow_match_sde.FlowMatchSDEScheduler.save_config
    def save_config(self, save_directory, push_to_hub=False, **kwargs):
        """Writes the configuration, and beside it this file, which `trust_remote_code=True` runs."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(__file__, Path(save_directory) / Path(__file__).name)
        super().save_config(save_directory, push_to_hub, **kwargs)

    # Copied from dit_hf.scheduling_flow_match_sde.FlowMatchSDEScheduler.__len__
    def __len__(self) -> int:
        return self.config.num_train_timesteps
