"""Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685) for the layers of a DiT that a style or class needs."""

from pathlib import Path

from ..files import writing
from ..models import DiTTransformer2DModel
from ..pipeline import DiTClassCondPipeline


try:
    from peft import LoraConfig, get_peft_model_state_dict
except ModuleNotFoundError as error:
    raise ImportError(f"{__name__} needs {error.name}: pip install 'dit_hf[train]'.") from error


# Attention, feed-forward, modulation and the label table; a model has one kind of feed-forward.
LAYERS = (
    *("to_q", "to_k", "to_v", "to_out.0", "modulation", "class_embed"),
    *("ff.net.0.proj", "ff.net.2", "ff.gate_proj", "ff.up_proj", "ff.down_proj"),
)


def add_lora(model: DiTTransformer2DModel, rank: int, alpha: int) -> None:
    """
    Freezes a model and adds trainable LoRA adapters, which change nothing before training.

    Args:
        model (`DiTTransformer2DModel`): Changed in place.
        rank (`int`): Rank of the adapters.
        alpha (`int`): The adapters' output is scaled by alpha / rank.

    Raises:
        ValueError: if the rank or alpha is not positive.

    Example:

        >>> from dit_hf import DiTClassCondPipeline
        >>> from dit_hf.training.lora import add_lora
        >>> model = DiTClassCondPipeline.from_bundled("emoji64").transformer
        >>> add_lora(model, rank=8, alpha=8)
        >>> all("lora" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
        True
    """
    if rank < 1:
        raise ValueError(f"The rank of the adapters is {rank}; it must be at least 1.")
    if alpha < 1:
        raise ValueError(f"The alpha of the adapters is {alpha}; it must be at least 1.")
    names = [name for name, _ in model.named_modules()]
    targets = [layer for layer in LAYERS if any(name.endswith(layer) for name in names)]
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))


def save_lora(model: DiTTransformer2DModel, folder: str | Path) -> Path:
    """
    Writes a model's adapters, with rank and alpha in the metadata, for `pipe.load_lora_weights(folder)`.

    Args:
        model (`DiTTransformer2DModel`): With adapters.
        folder (`str` or `Path`): Created if it does not exist.

    Returns:
        `Path`: the file.
    """
    layers = get_peft_model_state_dict(model)
    metadata = model.peft_config["default"].to_dict()
    file = Path(folder) / "pytorch_lora_weights.safetensors"
    with writing(file) as partial:
        DiTClassCondPipeline.save_lora_weights(partial.parent, layers, transformer_lora_adapter_metadata=metadata)
    return file
