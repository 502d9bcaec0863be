"""Every family of checkpoints: the same numbers as the original code computes, and back to a file it loads."""

import pytest
import torch
from conftest import FIXTURES, load_golden

from dit_hf import DiTClassCondPipeline, DiTTransformer2DModel, make_scheduler


# Fixture -> family, its model's time for the original's, and the sign of its velocity.
FLOW = {
    "sit_p2": ("sit", lambda time: 1 - time, -1),
    "repa_sit_p2": ("repa", lambda time: time, 1),
    "lightningdit_0": ("lightningdit", lambda time: 1 - time, -1),
    "lightningdit_1": ("lightningdit", lambda time: 1 - time, -1),
}


def load(name, **options):
    return DiTTransformer2DModel.from_single_file(FIXTURES / f"{name}.pt", num_attention_heads=4, **options)


@pytest.mark.parametrize("name", FLOW)
def test_forward_equals_the_original(name):
    family, our_time, sign = FLOW[name]
    golden = load_golden(f"{name}.io")
    model = load(name, family=family)
    with torch.no_grad():
        output = model(golden["x"], our_time(golden["t"]) * 1000, golden["y"]).sample[:, : golden["x"].shape[1]]
    torch.testing.assert_close(output, sign * golden["out"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FLOW)
def test_euler_sampling_equals_the_original(name):
    golden = load_golden(f"{name}.io")
    pipe = DiTClassCondPipeline(load(name, family=FLOW[name][0]), make_scheduler("flow_euler"))
    sample = pipe(
        golden["ode_y"],
        latents=golden["ode_z"],
        guidance_scale=float(golden["ode_cfg"]),
        num_inference_steps=int(golden["ode_steps"]),
        output_type="latent",
    ).images
    error = (sample - golden["ode_sample"]).norm() / golden["ode_sample"].norm()
    assert error < 1e-4
    print(f"{name}: relative error {error:.1e}")
