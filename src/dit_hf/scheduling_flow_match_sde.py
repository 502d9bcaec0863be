"""Sampling of flow-matching models by their stochastic differential equation (SiT, https://arxiv.org/abs/2401.08740).

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
from diffusers.utils.torch_utils import randn_tensor


@dataclass
class FlowMatchSDESchedulerOutput(BaseOutput):
    """
    Args:
        prev_sample (`torch.Tensor` of shape `(B, C, H, W)`): The sample at the next timestep.
    """

    prev_sample: torch.Tensor


class FlowMatchSDEScheduler(SchedulerMixin, ConfigMixin):
    r"""
    Euler–Maruyama steps of the reverse SDE of flow matching with the diffusion coefficient `w = sigma` (SiT eq. 7).

    SiT, REPA and REPA-E publish their results with it: N equal steps from sigma 1, the last of them longer and without
    noise.

    Args:
        num_train_timesteps (`int`, defaults to 1000): Timesteps are sigmas times this.
        shift (`float`, defaults to 1.0): Sigmas become `shift · sigma / (1 + (shift − 1) · sigma)`.
        last_step_size (`float`, defaults to 0.04): The sigma of the last step, before the shift.

    Example:

        >>> from dit_hf import FlowMatchSDEScheduler
        >>> scheduler = FlowMatchSDEScheduler()
        >>> scheduler.set_timesteps(4)
        >>> [round(sigma, 2) for sigma in scheduler.sigmas.tolist()]
        [1.0, 0.68, 0.36, 0.04, 0.0]
    """

    order = 1

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, shift: float = 1.0, last_step_size: float = 0.04):
        if not 0 < last_step_size < 1:
            raise ValueError(f"`last_step_size` is {last_step_size!r}; it must be a number between 0 and 1.")
        if not 0 < shift < float("inf"):
            raise ValueError(f"`shift` is {shift!r}; it must be a finite number above 0.")
        self._step_index: int | None = None
        self.set_timesteps(num_train_timesteps)

    @property
    def step_index(self) -> int | None:
        """The step that comes next; None before the first."""
        return self._step_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Sets the step that comes first."""
        self._step_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
    ) -> None:
        """
        Makes the schedule.

        Args:
            num_inference_steps (`int`, *optional*): Steps, each with one evaluation of the model.
            device (`str` or `torch.device`, *optional*): Of the timesteps.
            sigmas (`list[float]`, *optional*): Descending ones in place of equal steps; a last 0 is added.
        """
        if sigmas is None:
            line = torch.linspace(1.0, self.config.last_step_size, num_inference_steps, dtype=torch.float64)
        else:
            line = torch.tensor(sigmas, dtype=torch.float64)
        shifted = self.config.shift * line / (1 + (self.config.shift - 1) * line)
        self.num_inference_steps = len(shifted)
        self.sigmas = torch.cat([shifted, shifted.new_zeros(1)]).float()
        self.timesteps = (self.sigmas[:-1] * self.config.num_train_timesteps).to(device)
        self._step_index = None

    def index_for_timestep(self, timestep: torch.Tensor | float) -> int:
        """The step of a timestep of the schedule."""
        return int((self.timesteps - float(timestep)).abs().argmin())

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | float,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> FlowMatchSDESchedulerOutput | tuple[torch.Tensor]:
        """
        One step towards the data.

        Args:
            model_output (`torch.Tensor` of shape `(B, C, H, W)`): The velocity, noise − data.
            timestep (`torch.Tensor` or `float`): Of the schedule.
            sample (`torch.Tensor` of shape `(B, C, H, W)`): At this timestep.
            generator (`torch.Generator` or `list`, *optional*): One, or one per image.
            return_dict (`bool`, defaults to `True`): Whether to return a `FlowMatchSDESchedulerOutput`.

        Returns:
            `FlowMatchSDESchedulerOutput` or `tuple`: `prev_sample`, of the type of `model_output`.
        """
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep)
        sigma, next_sigma = self.sigmas[self._step_index].item(), self.sigmas[self._step_index + 1].item()
        self._step_index += 1

        velocity, sample = model_output.float(), sample.float()
        # The score is ((sigma − 1) · velocity − sample) / sigma, and the drift velocity − sigma · score.
        drift = (2 - sigma) * velocity + sample
        prev_sample = sample + (next_sigma - sigma) * drift
        if next_sigma > 0:
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            prev_sample = prev_sample + (2 * sigma * (sigma - next_sigma)) ** 0.5 * noise
        prev_sample = prev_sample.to(model_output.dtype)
        return FlowMatchSDESchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    def scale_noise(self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Noisy samples `(B, C, H, W)` at timesteps `(B,)`: `(1 − sigma) · sample + sigma · noise`."""
        sigma = (timestep.to(sample) / self.config.num_train_timesteps).view(-1, *[1] * (sample.ndim - 1))
        return (1 - sigma) * sample + sigma * noise

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs=False, **kwargs):
        """As every `ConfigMixin`'s; `auto_map`, which tells diffusers where the code is, is no option."""
        if isinstance(config, dict):
            config = {name: value for name, value in config.items() if name != "auto_map"}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def to_json_string(self):
        """The configuration, with `auto_map` for `trust_remote_code=True`."""
        config = json.loads(super().to_json_string())
        config["auto_map"] = {"AutoModel": f"{Path(__file__).stem}.{type(self).__name__}"}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory, push_to_hub=False, **kwargs):
        """Writes the configuration, and beside it this file, which `trust_remote_code=True` runs."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(__file__, Path(save_directory) / Path(__file__).name)
        super().save_config(save_directory, push_to_hub, **kwargs)

    def __len__(self) -> int:
        return self.config.num_train_timesteps
