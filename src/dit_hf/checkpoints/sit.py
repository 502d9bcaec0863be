"""SiT (https://github.com/willisma/SiT): DiT's keys, trained as flow matching from noise at 0 to data at 1."""

from dataclasses import replace

from .dit import DIT


# Training arguments of the flow-matching code bases, and what they must be for the model to be what we compute.
LINEAR_VELOCITY = {"path_type": ("Linear", "linear"), "prediction": ("velocity", "v")}

SIT = replace(
    DIT,
    name="sit",
    options=DIT.options | {"timestep_scale": (0.001,)},  # time in [0, 1)
    predictions=("velocity",),
    scheduler="flow_euler",
    argument_marks=("path_type",),
    trained_with=LINEAR_VELOCITY,
    data_at_one=True,
    # Its `forward_with_cfg` guides three channels, as DiT's.
    recommended_call={"num_inference_steps": 250, "guidance_scale": 1.5, "guidance_channels": 3},
    published_license=None,
)
