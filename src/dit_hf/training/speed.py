"""What makes a training step faster on a GPU: TF32, an attention backend, float8 matrix products, compiled blocks."""

import torch
from diffusers.utils import logging

from ..models import PackagedModel
from .config import TrainingConfig


logger = logging.get_logger(__name__)

# The parts whose layers compute in float8: most of the work, and no layer that is sensitive or small.
BLOCKS = ("transformer_blocks.", "decoder_blocks.")
# Sides of matrices that the float8 products of GPUs take are multiples of this.
FLOAT8_MULTIPLE = 16
# Batches of training and of samples each compile once; torch's default is 8.
RECOMPILE_LIMIT = 64


def speed_up(transformer: PackagedModel, config: TrainingConfig, device: torch.device) -> None:
    """
    Applies the settings of a run that concern speed alone, before the model is wrapped.

    Args:
        transformer (`DiTTransformer2DModel`): Changed in place; its weights and their names stay.
        config (`TrainingConfig`): `allow_tf32`, `attention_backend`, `float8` and `compile_blocks`.
        device (`torch.device`): Where it is trained; what is not set is chosen for it.

    Raises:
        ValueError: if the device has no float8, or there is no such attention backend here.
        ImportError: if torchao is needed and not installed.
    """
    is_cuda = device.type == "cuda"
    if is_cuda and config.allow_tf32 is not False:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    if config.attention_backend is not None:
        try:
            transformer.set_attention_backend(config.attention_backend)
        except (ValueError, RuntimeError, ImportError) as error:
            raise ValueError(f"--attention_backend {config.attention_backend}: {error}") from None
    if config.float8:
        use_float8(transformer, device)
    if is_cuda if config.compile_blocks is None else config.compile_blocks:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
        transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)


def use_float8(transformer: PackagedModel, device: torch.device) -> None:
    """
    Lets the blocks compute their matrix products in float8, scaled by tensor; weights and their gradients stay.

    Args:
        transformer (`DiTTransformer2DModel`): Changed in place.
        device (`torch.device`): A GPU of compute capability 8.9 or newer, or a CPU, which emulates it slowly.

    Raises:
        ValueError: if the device has no float8.
        ImportError: if torchao is not installed.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise ImportError("--float8 needs torchao: `pip install torchao`.") from None
    emulated = device.type == "cpu"
    if emulated:
        logger.warning("A CPU has no float8: it is emulated, which is slow, and shows its losses only.")
    elif device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(f"--float8 needs a GPU of compute capability 8.9 or newer, and this is {device}; omit it.")

    def is_converted(module, name):
        sides = (module.in_features, module.out_features) if isinstance(module, torch.nn.Linear) else (1,)
        return name.startswith(BLOCKS) and not any(side % FLOAT8_MULTIPLE for side in sides)

    convert_to_float8_training(transformer, module_filter_fn=is_converted, config=Float8LinearConfig(emulate=emulated))
