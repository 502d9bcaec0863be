"""MeanFlow (https://github.com/zhuyu-cs/MeanFlow): SiT with a second time, running as diffusers' does."""

import math
from dataclasses import replace

from .sit import LINEAR_VELOCITY, SIT


# Shared with SoFlow, which calls its second embedder otherwise.
INTERVAL_LAYERS = {
    f"mlp.{ours_index}.{kind}": f"interval_embed.linear_{layer}.{kind}"
    for layer, ours_index in ((1, 0), (2, 2))
    for kind in ("weight", "bias")
}
OPTIONS = SIT.options | {
    "learn_sigma": (False,),
    "interval_embedding": (True,),
    "guidance_in_weights": (True, False),
}


def trained_guidance(arguments: dict) -> dict:
    """The effective scale of the guided velocity that a run was trained for, ω/(1 − κ), is 1 without guidance."""
    if arguments.get("cfg_omega") is None:
        return {}
    omega, kappa = (arguments.get(name, 0.0) for name in ("cfg_omega", "cfg_kappa"))
    if not all(isinstance(number, int | float) for number in (omega, kappa)):
        raise ValueError(
            f"its cfg_omega is {str(omega)[:50]!r} and its cfg_kappa {str(kappa)[:50]!r}; both are numbers."
        )
    return {"guidance_in_weights": not math.isclose(omega, 1 - kappa)}


MEANFLOW = replace(
    SIT,
    name="meanflow",
    keys=SIT.keys | {f"r_embedder.{layer}": ours for layer, ours in INTERVAL_LAYERS.items()},
    options=OPTIONS,
    marks=("r_embedder.",),
    argument_marks=(),
    trained_with={"path_type": LINEAR_VELOCITY["path_type"]},
    can_lack_marks=False,
    data_at_one=False,
    wrapper="ema",
    scheduler="flow_map",
    trained_options=trained_guidance,
    scaling_factor=0.18125,
    recommended_call={"num_jumps": 1, "guidance_scale": 1.0},
)
