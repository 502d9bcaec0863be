"""Whether what is about to be saved will load again."""

from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers.models.modeling_utils import ModelMixin
from torch.distributed.tensor import DTensor


def check_loads_again(components: Mapping[str, Any]) -> None:
    """
    Refuses models that were changed in place: their weights have keys that their class does not load.

    Args:
        components (`Mapping[str, Any]`): What will be saved, by name; what is no diffusers model is not looked at.

    Raises:
        ValueError: naming the component, a key and what undoes the change.
    """
    guider = components.get("guider")
    if guider is not None and getattr(diffusers, type(guider).__name__, None) is not type(guider):
        raise ValueError(
            f"The guider is a {type(guider).__name__}, which `import diffusers` does not have: the folder would not "
            "load again; pass it as `guider=` to the calls instead."
        )
    for name, component in components.items():
        model = getattr(component, "_orig_mod", component)  # diffusers saves what `torch.compile(model)` wraps
        if not isinstance(model, ModelMixin) or getattr(model, "hf_quantizer", None) is not None:
            continue
        weights = {*map(type, model.parameters()), *map(type, model.buffers())}
        if not weights <= {torch.Tensor, torch.nn.Parameter, DTensor}:
            raise ValueError(
                f"The {name} was quantized in place and its weights can't be saved: load it again with a "
                "`quantization_config`, or call `dit_hf.restore(pipe)`."
            )
        with torch.device("meta"):
            fresh = type(model).from_config(dict(model.config))
        changed = sorted(model.state_dict().keys() ^ fresh.state_dict().keys())
        if changed:
            raise ValueError(
                f"The {name} was changed in place and its weights would not load again: the key {changed[0]!r} is of "
                f"that change ({len(changed)} such keys). {_how_to_undo(model, changed)}"
            )


def _how_to_undo(model, changed):
    if getattr(model, "peft_config", None):
        return (
            "It has LoRA adapters: call `pipe.unload_lora_weights()` first, after `pipe.fuse_lora()` if their effect "
            "is to stay in the weights."
        )
    if any("_orig_mod." in key for key in changed):
        return "A part of it is wrapped by `torch.compile`: put the part back, and compile with `part.compile()`."
    if any(".to_qkv." in key or ".to_kv." in key for key in changed):
        return "Call `unfuse_qkv_projections()` on it first."
    return "Undo the change first."
