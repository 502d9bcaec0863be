"""The pipeline: golden trajectories, guidance, generators, autoencoders, outputs, saving."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, load_golden, predict, tiny_transformer
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)

from dit_hf import DiTClassCondPipeline, DiTTransformer2DModel, make_scheduler
from dit_hf.data.autoencoders import vae_statistics
from dit_hf.data.latents import normalise_latents


ID2LABEL = {0: "tench, Tinca tinca", 1: "goldfish, Carassius auratus", 2: "hen", 10: "crane"}


def tiny_vae(seed=0, **config):
    """Two resolutions, so one latent value covers 2 × 2 pixels."""
    torch.manual_seed(seed)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    options = {"block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 4, "sample_size": 16}
    return AutoencoderKL(**(blocks | options | config)).eval()


def tiny_pipeline(scheduler="ddim", vae=None, transformer=None, **config):
    scheduler = make_scheduler(scheduler) if isinstance(scheduler, str) else scheduler
    transformer = transformer or tiny_transformer(num_classes=11, **config)
    pipe = DiTClassCondPipeline(transformer, scheduler, vae, ID2LABEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators if len(generators) > 1 else generators[0]


def count_batches(pipe):
    """The list that each model evaluation appends its batch size to."""
    sizes = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    return sizes


@pytest.mark.parametrize(
    ("name", "scheduler", "options", "draws"),
    [
        ("sample_ddpm_10", "ddpm", {}, 9),
        ("sample_ddpm_50_cfg4", "ddpm", {"guidance_scale": 4.0, "guidance_channels": 3}, 49),
        ("sample_ddim_10", "ddim", {}, 0),
        ("sample_ddim_25_eta1", "ddim", {"eta": 1.0}, 25),
    ],
)
def test_golden_trajectory(name, scheduler, options, draws, monkeypatch):
    """The original's loops, fed with the noise they drew: 5e-6 apart with guidance, 3e-7 without."""
    golden = load_golden(name)
    noise = iter(golden["noise"])
    for module in ("scheduling_ddpm", "scheduling_ddim"):
        monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", lambda *args, **kwargs: next(noise))
    transformer = DiTTransformer2DModel.from_single_file(FIXTURES / "dit_p2.pt", num_attention_heads=4)
    pipe = tiny_pipeline(scheduler, transformer=transformer)
    options = {
        "guidance_scale": 1.0,
        "num_inference_steps": len(golden["timesteps"]),
        "latents": golden["z"],
    } | options
    latents = pipe(golden["y"], output_type="latent", **options).images
    assert pipe.scheduler.timesteps.tolist() == golden["timesteps"].tolist()
    assert len(list(noise)) == len(golden["noise"]) - draws
    error = ((latents - golden["sample"]).norm() / golden["sample"].norm()).item()
    print(f"{name}: {error:.1e}")
    assert error <= 2e-5


@pytest.mark.parametrize(
    ("scale", "channels", "interval", "guided_steps"),
    [
        (4.0, None, (0.0, 1.0), range(10)),
        (4.0, 3, (0.0, 1.0), range(10)),
        (1.5, 1, (0.2, 0.5), [2, 3, 4]),
        (4.0, None, (0.3, 1.0), range(3, 10)),
        (4.0, None, (0.0, 0.45), range(5)),
        (1.0, None, (0.0, 1.0), []),
        (0.0, 3, (0.0, 1.0), range(10)),
        (0.5, None, (0.0, 1.0), range(10)),
    ],
)
def test_guidance_by_hand(scale, channels, interval, guided_steps):
    """Conditional and null predictions from calls of their own, DDIM by its scheduler; and what is paid for."""
    pipe = tiny_pipeline()
    labels = torch.tensor([3, 7])
    latents = torch.randn(2, 4, 8, 8, generator=seeded(0))
    scheduler, expected = make_scheduler("ddim"), latents
    scheduler.set_timesteps(10)
    with torch.no_grad():
        for index, timestep in enumerate(scheduler.timesteps):
            prediction = pipe.transformer(expected, timestep, labels).sample[:, :4].clone()
            if index in guided_steps:
                null = pipe.transformer(expected, timestep, torch.full_like(labels, 11)).sample[:, :4]
                count = channels or 4
                guided = null + scale * (prediction - null)
                prediction[:, :count] = guided[:, :count]
            expected = scheduler.step(prediction, timestep, expected).prev_sample
    sizes = count_batches(pipe)
    guidance = {"guidance_scale": scale, "guidance_channels": channels, "guidance_interval": interval}
    output = pipe(labels, num_inference_steps=10, latents=latents, output_type="latent", **guidance)
    assert sizes == [4 if index in guided_steps else 2 for index in range(10)]
    error = (output.images - expected).norm() / expected.norm()
    assert error < 1e-5, f"{error:.1e}"
    assert (pipe.guidance_scale, pipe.num_timesteps) == (scale, 10)


def test_guidance_leaves_the_variance_conditional():
    """The variance that DDPM takes is never extrapolated: guiding no channel apart, it is the conditional half's."""
    pipe = tiny_pipeline("ddpm")
    latents, labels = torch.randn(2, 4, 8, 8, generator=seeded(0)), torch.tensor([3, 7])
    guided = predict(pipe, latents, 500, labels, scale=4.0)
    with torch.no_grad():
        conditional = pipe.transformer(latents, 500, labels).sample
    torch.testing.assert_close(guided[:, 4:], conditional[:, 4:], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(guided[:, :4], conditional[:, :4], atol=1e-2)


STOCHASTIC = {
    "ddpm": (lambda: make_scheduler("ddpm"), {}),
    "euler_ancestral": (EulerAncestralDiscreteScheduler, {}),
    "ddim_eta_1": (lambda: make_scheduler("ddim"), {"eta": 1.0}),
    "dpm++_sde": (lambda: make_scheduler("dpm++", algorithm_type="sde-dpmsolver++"), {}),
    "flow_stochastic": (lambda: make_scheduler("flow_euler", stochastic_sampling=True), {}),
    "ddim": (lambda: make_scheduler("ddim"), {}),
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_each_image_depends_on_its_own_generator_only(name):
    build, options = STOCHASTIC[name]
    options = {"num_inference_steps": 4, "output_type": "latent"} | options

    def generate(labels, seeds, **kwargs):
        pipe = tiny_pipeline(build())
        return pipe(labels, generator=[torch.Generator().manual_seed(s) for s in seeds], **options, **kwargs).images

    def assert_same(actual, expected):
        assert (actual - expected).norm() < 1e-4 * expected.norm()  # the batch size changes the order of sums

    batch = generate([3, 5, 3], [11, 12, 13])
    assert not torch.allclose(batch[0], batch[2], rtol=0.1)
    for index, (label, seed) in enumerate([(3, 11), (5, 12), (3, 13)]):
        assert_same(generate(label, [seed])[0], batch[index])
    assert_same(generate([3, 3, 5], [13, 11, 12])[[1, 2, 0]], batch)
    pairs = generate([5, 3], [21, 12, 11, 13], num_images_per_label=2)
    assert_same(pairs[[2, 1, 3]], batch)
    assert_same(generate([3, 5, 3], [11, 12, 99])[:2], batch[:2])


@pytest.mark.parametrize("name", STOCHASTIC)
def test_one_generator_decides_everything(name):
    build, options = STOCHASTIC[name]
    options = {"num_inference_steps": 4, "output_type": "latent"} | options
    pipe = tiny_pipeline(build())
    images = []
    for global_seed, seed in [(1, 5), (2, 5), (2, 6)]:
        torch.manual_seed(global_seed)
        images.append(pipe([3, 5], generator=seeded(seed), **options).images)
    assert torch.equal(images[0], images[1])
    assert not torch.allclose(images[1], images[2], rtol=0.1)


@pytest.mark.parametrize(
    "statistics",
    [
        {"scaling_factor": 0.5},
        {"scaling_factor": 0.5, "shift_factor": 0.3},
        {"scaling_factor": 2.0, "latents_mean": [0.1, 0.2, -0.3, 0.4], "latents_std": [0.5, 1.5, 2.0, 1.0]},
    ],
)
def test_latent_statistics_come_from_the_autoencoder(statistics):
    pipe = tiny_pipeline(vae=tiny_vae(**statistics))
    options = {"num_inference_steps": 2, "guidance_scale": 1.0}
    latents = pipe([1, 2], generator=seeded(0), output_type="latent", **options).images
    mean = torch.tensor(statistics.get("latents_mean", [0.0] * 4)).view(1, 4, 1, 1)
    std = torch.tensor(statistics.get("latents_std", [1.0] * 4)).view(1, 4, 1, 1)
    decoded = latents / statistics["scaling_factor"] * std + mean + statistics.get("shift_factor", 0.0)
    with torch.no_grad():
        expected = (pipe.vae.decode(decoded).sample / 2 + 0.5).clamp(0, 1)
    images = pipe([1, 2], generator=seeded(0), output_type="pt", **options).images
    torch.testing.assert_close(images, expected)
    assert images.std() > 0.01
    torch.testing.assert_close(normalise_latents(decoded, *vae_statistics(pipe.vae)), latents)  # as training does


def test_slicing_and_tiling():
    pipe = tiny_pipeline(vae=tiny_vae())
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "pt", "height": 32, "width": 48}
    plain = pipe([1, 2], generator=seeded(0), **options).images
    pipe.vae.enable_slicing()
    torch.testing.assert_close(pipe([1, 2], generator=seeded(0), **options).images, plain, atol=1e-5, rtol=1e-4)
    pipe.vae.enable_tiling()
    tiled = pipe([1, 2], generator=seeded(0), **options).images
    assert tiled.shape == plain.shape == (2, 3, 32, 48)
    assert not torch.equal(tiled, plain)  # tiles overlap, and each has its own statistics
    assert (tiled - plain).abs().mean() < 0.1


def test_other_autoencoders():
    """AutoencoderDC tells its compression under another name."""
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        upsampling_scaling_factor=2,
    )
    deep = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=["ResBlock"] * 2,
        decoder_block_types=["ResBlock"] * 2,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        upsample_block_type="interpolate",
        downsample_block_type="stride_conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41,
    )
    for vae in (tiny, deep):
        pipe = tiny_pipeline(vae=vae.eval())
        assert pipe.vae_scale_factor == 2
        assert pipe(1, num_inference_steps=1).images[0].size == (16, 16)


def test_output_types():
    pipe = tiny_pipeline(vae=tiny_vae())
    options = {"num_inference_steps": 2, "num_images_per_label": 2}
    outputs = {
        kind: pipe(["hen", 3], generator=seeded(0), output_type=kind, **options).images
        for kind in ("pil", "np", "pt", "latent")
    }
    assert len(outputs["pil"]) == 4 and outputs["pil"][0].size == (16, 16) and outputs["pil"][0].mode == "RGB"
    assert outputs["np"].shape == (4, 16, 16, 3) and 0 <= outputs["np"].min() < outputs["np"].max() <= 1
    assert outputs["pt"].shape == (4, 3, 16, 16) and outputs["latent"].shape == (4, 4, 8, 8)
    array = torch.from_numpy(outputs["np"]).permute(0, 3, 1, 2)
    torch.testing.assert_close(array, outputs["pt"])
    pixels = torch.tensor(list(outputs["pil"][1].tobytes())).view(16, 16, 3).permute(2, 0, 1)
    assert (pixels - 255 * outputs["pt"][1]).abs().max() <= 1
    as_tuple = pipe(["hen", 3], generator=seeded(0), output_type="pt", return_dict=False, **options)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 1 and torch.equal(as_tuple[0], outputs["pt"])


def test_images_of_a_label_are_neighbours():
    pipe = tiny_pipeline()
    options = {"latents": torch.randn(4, 4, 8, 8, generator=seeded(0)), "output_type": "latent"}
    pairs = pipe([2, 7], num_images_per_label=2, num_inference_steps=2, **options).images
    assert torch.equal(pairs, pipe([2, 2, 7, 7], num_inference_steps=2, **options).images)


def test_height_and_width():
    pipe = tiny_pipeline(vae=tiny_vae())
    assert pipe(1, num_inference_steps=1, height=24, width=40, output_type="np").images.shape == (1, 24, 40, 3)
    assert pipe(1, num_inference_steps=1, width=8).images[0].size == (8, 16)  # the other side is the model's own
    latents = torch.randn(1, 4, 4, 10, generator=seeded(0))
    assert pipe(1, num_inference_steps=1, latents=latents).images[0].size == (20, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheduler", ["ddpm", "flow_euler"])
def test_half_precision_transformer_with_float32_vae(dtype, scheduler):
    pipe = tiny_pipeline(scheduler, vae=tiny_vae())
    options = {"num_inference_steps": 3, "output_type": "latent"}
    full = pipe([1, 2], generator=seeded(0), **options).images
    pipe.transformer.to(dtype)
    latents = pipe([1, 2], generator=seeded(0), **options).images
    assert latents.dtype == torch.float32 and torch.isfinite(latents).all()
    assert (latents - full).norm() < 0.1 * full.norm()
    images = pipe([1, 2], num_inference_steps=3, output_type="np").images
    assert (images >= 0).all() and (images <= 1).all()  # no NaN either
    pipe.vae.to(dtype)
    assert (pipe([1, 2], num_inference_steps=3, output_type="np").images >= 0).all()


class FreedCount(DiTClassCondPipeline):
    freed = 0

    def maybe_free_model_hooks(self):
        self.freed += 1
        super().maybe_free_model_hooks()


@pytest.mark.parametrize(("conditioning", "tolerance"), [("cross_attention", 0.0), ("adaln_zero", 1e-6)])
def test_model_offload(conditioning, tolerance):
    """Without an accelerator the CPU stands in: hooks move models in the order given and are freed after a call."""
    transformer = tiny_transformer(conditioning=conditioning)
    pipe = FreedCount(transformer, make_scheduler("ddim"), tiny_vae())
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(1, num_inference_steps=2, generator=seeded(0), output_type="pt").images
    assert pipe.freed == 1
    assert pipe.model_cpu_offload_seq == "transformer->guide->vae"
    pipe.enable_model_cpu_offload(device="cpu")
    assert [hook.model for hook in pipe._all_hooks] == [pipe.transformer, pipe.vae]
    images = pipe(1, num_inference_steps=2, generator=seeded(0), output_type="pt").images
    # Where there is modulation, an offloaded model computes it step by step, which rounds differently.
    torch.testing.assert_close(images, expected, atol=tolerance, rtol=0)
    pipe(1, num_inference_steps=2, output_type="latent")
    assert pipe.freed == 3 and len(pipe._all_hooks) == 2


def test_progress_bar(capsys):
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=False, desc="denoise")
    pipe(1, num_inference_steps=3, output_type="latent")
    assert "denoise" in (captured := capsys.readouterr().err) and "3/3" in captured
    pipe.set_progress_bar_config(disable=True)
    pipe(1, num_inference_steps=3, output_type="latent")
    assert capsys.readouterr().err == ""


RELOAD = """
import sys, torch
from dit_hf import DiTClassCondPipeline
pipe = DiTClassCondPipeline.from_pretrained(sys.argv[1])
assert pipe.id2label == {0: "tench, Tinca tinca", 1: "goldfish, Carassius auratus", 2: "hen", 10: "crane"}
assert pipe.get_label_ids("Carassius auratus") == [1]
noise = torch.Generator().manual_seed(7)
image = pipe(["goldfish", 10], num_inference_steps=3, generator=noise, output_type="pt").images
torch.save(image, sys.argv[2])
"""


@pytest.mark.parametrize("kind", ["latent space", "pixel space"])
def test_save_and_load(kind, tmp_path):
    latent_space = kind == "latent space"
    pipe = tiny_pipeline("ddpm", tiny_vae() if latent_space else None, in_channels=4 if latent_space else 3)
    options = {"num_inference_steps": 3, "output_type": "pt"}
    expected = pipe(["goldfish", 10], generator=seeded(7), **options).images
    assert expected.shape == ((2, 3, 16, 16) if latent_space else (2, 3, 8, 8)) and expected.std() > 0.01
    pipe.save_pretrained(tmp_path / "pipe")

    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logging.getLogger("diffusers").addHandler(handler)
    try:
        loaded = DiTClassCondPipeline.from_pretrained(tmp_path / "pipe")
        DiTClassCondPipeline.from_pretrained(tmp_path / "pipe", id2label={3: "cock"})
    finally:
        logging.getLogger("diffusers").removeHandler(handler)
    assert [record.getMessage() for record in records] == []
    loaded.set_progress_bar_config(disable=True)
    assert loaded.id2label == ID2LABEL and (loaded.vae is not None) == latent_space
    assert loaded.scheduler.config.variance_type == "learned_range"
    assert torch.equal(loaded(["goldfish", 10], generator=seeded(7), **options).images, expected)

    loaded.save_pretrained(tmp_path / "again")  # what was loaded saves as what was made
    command = [sys.executable, "-c", RELOAD, str(tmp_path / "again"), str(tmp_path / "images.pt")]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "Expected types" not in process.stderr
    assert torch.equal(torch.load(tmp_path / "images.pt"), expected)


def test_scheduler_can_be_exchanged():
    """The documented idiom, from the learned-variance recipe to a fast solver."""
    pipe = tiny_pipeline("ddpm")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    latents = pipe([1, 2], num_inference_steps=4, generator=seeded(0), output_type="latent").images
    plain = tiny_pipeline("dpm++")
    expected = plain([1, 2], num_inference_steps=4, generator=seeded(0), output_type="latent").images
    torch.testing.assert_close(latents, expected)


def test_caches_skip_work_in_the_pipeline():
    """diffusers' caches, with the pipeline's own contexts: fewer attention calls, and a timestep to decide by."""
    pipe = DiTClassCondPipeline(tiny_transformer(), make_scheduler("ddim"))
    calls = []
    pipe.transformer.transformer_blocks[-1].attn.to_q.register_forward_hook(lambda *args: calls.append(1))

    def generate():
        calls.clear()
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        return pipe([3], num_inference_steps=8, latents=latents, output_type="latent").images, len(calls)

    plain, count = generate()
    assert count == 8
    configs = (
        FirstBlockCacheConfig(threshold=10.0),
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 1001),
            spatial_attention_block_identifiers=["transformer_blocks"],
            current_timestep_callback=lambda: pipe.current_timestep,
        ),
    )
    for config in configs:
        pipe.transformer.enable_cache(config)
        cached, fewer = generate()
        assert fewer < count, type(config).__name__
        assert cached.isfinite().all()
        pipe.transformer.disable_cache()
        assert torch.equal(generate()[0], plain)
    assert pipe.current_timestep is None


def test_a_broken_off_call_leaves_nothing_to_the_next():
    pipe = DiTClassCondPipeline(tiny_transformer(), make_scheduler("ddim"))
    pipe.transformer.enable_cache(TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1))
    options = {"num_inference_steps": 6, "output_type": "latent"}
    expected = pipe(3, generator=seeded(0), **options).images

    def stop(pipe, step, timestep, tensors):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(5, generator=seeded(1), **options, callback_on_step_end=stop)
    assert pipe.current_timestep is None
    assert torch.equal(pipe(3, generator=seeded(0), **options).images, expected)


def test_own_folders_code_goes_before_a_custom_pipeline(tmp_path):
    """diffusers prefers the code that a folder names; stock folders get the entry (`test_families.py`)."""
    pipe = DiTClassCondPipeline(tiny_transformer(), make_scheduler("ddpm"), id2label={3: "cat"})
    pipe.save_pretrained(tmp_path)
    folder = Path(__file__).parents[1] / "pipelines" / "dit_class_cond"
    loaded = DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=str(folder), trust_remote_code=True)
    assert loaded.labels == {"cat": 3}
    options = {"num_inference_steps": 2, "output_type": "latent"}
    images = [p("cat", generator=torch.manual_seed(0), **options).images for p in (pipe, loaded)]
    assert torch.equal(*images)


def test_a_callback_may_return_nothing():
    pipe = DiTClassCondPipeline(tiny_transformer(), make_scheduler("ddim"))
    seen = []
    pipe(3, num_inference_steps=3, output_type="latent", callback_on_step_end=lambda *args: seen.append(args[1]))
    assert seen == [0, 1, 2]


def test_a_model_in_training_mode_is_refused():
    pipe = DiTClassCondPipeline(tiny_transformer().train(), make_scheduler("ddim"))
    with pytest.raises(ValueError, match="training mode"):
        pipe(3)
