"""The stochastic sampler of flow matching; its recorded trajectories are in test_repae.py."""

import subprocess
import sys

import pytest
import torch
from conftest import tiny_transformer

from dit_hf import DiTClassCondPipeline, FlowMatchSDEScheduler, make_scheduler


FRESH = """
import sys, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "dit_hf" not in sys.modules
assert type(pipe.scheduler).__name__ == "FlowMatchSDEScheduler"
call = {"num_inference_steps": 3, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
torch.save(pipe([1, 2], **call).images, sys.argv[2])
"""
FLOW = {"learn_sigma": False, "timestep_scale": 0.001}


def sample(pipe, **settings):
    call = {"num_inference_steps": 3, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    return pipe([1, 2], **(call | settings)).images


def test_a_saved_folder_brings_its_scheduler_along(tmp_path):
    pipe = DiTClassCondPipeline(tiny_transformer(**FLOW), make_scheduler("flow_sde", shift=2.0))
    pipe.save_pretrained(tmp_path / "pipe")
    assert (tmp_path / "pipe" / "scheduler" / "scheduling_flow_match_sde.py").is_file()
    again = DiTClassCondPipeline.from_pretrained(tmp_path / "pipe")
    assert isinstance(again.scheduler, FlowMatchSDEScheduler) and again.scheduler.config.shift == 2
    expected = sample(pipe)
    assert torch.equal(sample(again), expected)
    subprocess.run([sys.executable, "-c", FRESH, tmp_path / "pipe", tmp_path / "images.pt"], check=True)
    assert torch.equal(torch.load(tmp_path / "images.pt"), expected)
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(sample(DiTClassCondPipeline.from_pretrained(tmp_path / "again")), expected)


def test_each_image_depends_on_its_own_generator():
    pipe = DiTClassCondPipeline(tiny_transformer(**FLOW), make_scheduler("flow_sde"))
    both = sample(pipe, generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)])
    alone = pipe([2], num_inference_steps=3, output_type="latent", generator=[torch.Generator().manual_seed(1)]).images
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-5)


def test_the_schedule_ends_with_a_longer_step_without_noise():
    scheduler = make_scheduler("flow_sde")
    scheduler.set_timesteps(25)
    assert scheduler.timesteps[-1] == pytest.approx(40) and scheduler.sigmas[-1] == 0
    scheduler.set_timesteps(sigmas=[1.0, 0.5])
    assert scheduler.timesteps.tolist() == [1000, 500]
    ones, noise = torch.ones(1, 1, 2, 2), torch.randn(1, 1, 2, 2)
    scheduler.set_begin_index(1)
    # On the line from noise to data, with the velocity noise − data, the last step meets the mean of the data.
    last = scheduler.step(noise - ones, 500.0, 0.5 * ones + 0.5 * noise).prev_sample
    torch.testing.assert_close(last, 0.5 * (0.5 * ones + 0.5 * noise) - 0.75 * (noise - ones))
    with pytest.raises(ValueError, match="`last_step_size` is 0"):
        make_scheduler("flow_sde", last_step_size=0)
    with pytest.raises(ValueError, match="`shift` is -1"):
        make_scheduler("flow_sde", shift=-1)
