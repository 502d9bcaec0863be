"""What makes a training step faster on a GPU: TF32, an attention backend, float8 matrix products, compiled blocks."""

from dataclasses import replace
from importlib.util import find_spec

import torch
from accelerate import Accelerator
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.utils import logging
from torch.utils._triton import has_triton

from ..files import first_line
from ..models import PackagedModel
from ..optimization import BLOCKS, RECOMPILE_LIMIT
from .config import TrainingConfig


logger = logging.get_logger(__name__)

# What accelerate's autocast gives the attention.
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Sides of matrices that the float8 products of GPUs take are multiples of this.
FLOAT8_MULTIPLE = 16


def speed_up(
    transformer: PackagedModel, config: TrainingConfig, device: torch.device, mixed_precision: str = "no"
) -> None:
    """
    Applies the settings of a run that concern speed alone, before the model is wrapped.

    Args:
        transformer (`DiTTransformer2DModel`): Changed in place; its weights and their names stay.
        config (`TrainingConfig`): `allow_tf32`, `attention_backend`, `float8` and `compile_blocks`.
        device (`torch.device`): Where it is trained; what is not set is chosen for it.
        mixed_precision (`str`, defaults to `"no"`): Of accelerate.

    Raises:
        ValueError: if the device has no float8, or there is no such attention backend here.
        ImportError: if torchao is needed and not installed.
    """
    is_cuda = device.type == "cuda"
    if is_cuda:
        allowed = config.allow_tf32 is not False
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        torch.backends.cudnn.allow_tf32 = allowed
    check_speed(transformer, config, device, mixed_precision)
    if config.float8:
        use_float8(transformer, device.type == "cpu")
    if (is_cuda and has_triton()) if config.compile_blocks is None else config.compile_blocks:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
        transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)


def prepare_teacher(teacher: PackagedModel, config: TrainingConfig, accelerator: Accelerator) -> None:
    """
    Lets the frozen network of an objective run as the model does, but not in float8. `accelerator.prepare` would write
    it into every checkpoint.

    Args:
        teacher (`DiTTransformer2DModel`): Changed in place.
        config (`TrainingConfig`): As of [`speed_up`].
        accelerator (`accelerate.Accelerator`): Device, and precision by its autocast.
    """
    teacher.to(accelerator.device)
    if config.gradient_checkpointing:
        teacher.enable_gradient_checkpointing()
    speed_up(teacher, replace(config, float8=False), accelerator.device, accelerator.mixed_precision)
    teacher.forward = accelerator.autocast()(teacher.forward)


def check_speed(
    transformer: PackagedModel, config: TrainingConfig, device: torch.device, mixed_precision: str = "no"
) -> None:
    """
    Checks, before any work, that a device has what the settings ask for; sets the attention backend.

    Args:
        transformer (`DiTTransformer2DModel`): What will be trained.
        config (`TrainingConfig`): `attention_backend` and `float8`.
        device (`torch.device`): Where.
        mixed_precision (`str`, defaults to `"no"`): Of accelerate.

    Raises:
        ValueError: if the device has no float8, or there is no such attention backend here.
        ImportError: if torchao is needed and not installed.
    """
    if config.attention_backend is not None:
        name = f"--attention_backend {config.attention_backend}"
        try:
            transformer.set_attention_backend(config.attention_backend)
        except (ValueError, RuntimeError, ImportError) as error:
            raise ValueError(f"{name} can't be used: {first_line(error).rstrip('.')}.") from None
        try:
            dtype = PRECISIONS.get(mixed_precision, torch.float32)
            _try_attention(config.attention_backend, transformer.config.attention_head_dim, device, dtype)
        except (ValueError, RuntimeError, ImportError) as error:
            reason = f"{name} does not run on {device} in {dtype}: {first_line(error).rstrip('.')}."
            raise ValueError(f"{reason} Omit it, or pass native.") from None
    if not config.float8:
        return
    if find_spec("torchao") is None:
        raise ImportError("--float8 needs torchao: `pip install torchao`.")
    if device.type != "cpu" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        raise ValueError(f"--float8 needs a GPU of compute capability 8.9 or newer, and this is {device}; omit it.")


def _try_attention(backend, head_dim, device, dtype):
    """A tiny attention, forwards and back: some backends say only then that they are for other devices."""
    query = torch.ones(1, 16, 2, head_dim, device=device, dtype=dtype, requires_grad=True)
    dispatch_attention_fn(query, query, query, backend=AttentionBackendName(backend)).sum().backward()


def use_float8(transformer: PackagedModel, emulated: bool) -> None:
    """
    Lets attention and feed-forward compute their products in float8, scaled by tensor; weights and gradients stay.

    Args:
        transformer (`DiTTransformer2DModel`): Changed in place.
        emulated (`bool`): Whether the device has no float8, and computes slowly what it would give.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    if emulated:
        logger.warning("A CPU has no float8: it is emulated, which is slow, and shows its losses only.")

    def is_converted(module, name):
        sides = (module.in_features, module.out_features) if isinstance(module, torch.nn.Linear) else (1,)
        fits = not any(side % FLOAT8_MULTIPLE for side in sides)
        return fits and name.startswith(BLOCKS) and "modulation" not in name and "lora_" not in name

    # Padding is for products over a number of samples that is no multiple.
    config = Float8LinearConfig(emulate=emulated, pad_inner_dim=not emulated)
    convert_to_float8_training(transformer, module_filter_fn=is_converted, config=config)
