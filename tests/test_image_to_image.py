"""Images as the start of sampling, by `image` and `strength`."""

import numpy as np
import pytest
import torch
from conftest import tiny_transformer, tiny_vae
from diffusers import AdaptiveProjectedGuidance
from PIL import Image

from dit_hf import DiTClassCondPipeline, make_scheduler
from dit_hf.schedulers import RECIPES


LABELS = [3, 7]
NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def build(recipe="flow_euler", vae=True, **options):
    options = {"learn_sigma": False} | options
    return DiTClassCondPipeline(
        tiny_transformer(**options), make_scheduler(recipe, **VARIANCE.get(recipe, {})), tiny_vae() if vae else None
    )


VARIANCE = {"ddpm": {"variance_type": "fixed_small"}}


def sample(pipe, **options):
    call = {"latents": NOISE, "num_inference_steps": 10, "output_type": "latent"} | options
    return pipe(LABELS, generator=torch.Generator().manual_seed(0), **call).images


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_a_strength_of_one_is_sampling_without_an_image(recipe):
    pipe = build(recipe)
    pipe.register_to_config(recommended_call={"guidance_interval": (0.0, 0.3)})
    expected = sample(pipe)
    assert torch.equal(sample(pipe, image=IMAGES, strength=1), expected)
    assert torch.equal(sample(pipe), expected)
    whole = {"guidance_interval": (0.0, 1.0)}
    assert torch.equal(sample(pipe, image=IMAGES), sample(pipe, image=IMAGES, **whole))
    assert not torch.allclose(sample(pipe, image=IMAGES, strength=0.5), expected, atol=1e-2)
    # The first input of the model is the image with the noise of its timestep.
    inputs = []
    hook = lambda module, args, kwargs: inputs.append((kwargs["hidden_states"], kwargs["timestep"][0]))  # noqa: E731
    pipe.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    sample(pipe, image=IMAGES, strength=0.5, guidance_scale=1.0)
    latents, time = inputs[0]
    if pipe.is_flow_matching:
        sigma = time / 1000
        expected = (1 - sigma) * pipe.encode_images(IMAGES) + sigma * NOISE
        tolerance = 2e-3  # some solvers floor the timestep
    else:
        alpha = pipe.scheduler.alphas_cumprod[int(time)]
        expected, tolerance = alpha.sqrt() * pipe.encode_images(IMAGES) + (1 - alpha).sqrt() * NOISE, 1e-5
    assert (latents - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize(("strength", "steps"), [(0.8, 8), (0.55, 5), (0.1, 1), (None, 8)])
def test_flow_matching_by_hand(strength, steps):
    """Euler's last steps from (1 − sigma)·image + sigma·noise, guided in the part of all steps that is asked for."""
    pipe, calls = build(), []
    sigmas = torch.linspace(1, 0, 11)[-steps - 1 :]
    latents = (1 - sigmas[0]) * pipe.encode_images(IMAGES) + sigmas[0] * NOISE
    labels, null = torch.tensor(LABELS), torch.tensor([10, 10])
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        with torch.no_grad():
            prediction = pipe.transformer(latents, 1000 * sigma, labels).sample
            if sigma > 0.61:  # the first four of ten steps
                weak = pipe.transformer(latents, 1000 * sigma, null).sample
                prediction = weak + 4 * (prediction - weak)
        latents = latents + (following - sigma) * prediction
    output = sample(
        pipe,
        image=IMAGES,
        strength=strength,
        guidance_interval=(0.0, 0.4),
        callback_on_step_end=lambda pipe, index, timestep, tensors: calls.append((index, round(float(timestep)))),
    )
    assert (output - latents).norm() / latents.norm() < 1e-5
    assert calls == [(index, round(1000 * sigma)) for index, sigma in enumerate(sigmas[:-1].tolist())]
    assert pipe.num_timesteps == steps


def test_images_of_any_kind_are_the_same_start():
    pipe = build()
    arrays = (IMAGES.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
    exact = torch.from_numpy(arrays).permute(0, 3, 1, 2) / 255
    expected = sample(pipe, image=exact)
    for image in ([Image.fromarray(array) for array in arrays], arrays / 255.0, pipe.encode_images(exact)):
        torch.testing.assert_close(sample(pipe, image=image), expected, atol=1e-5, rtol=1e-5)
    one = sample(pipe, image=Image.fromarray(arrays[0]))
    torch.testing.assert_close(one[0], expected[0])
    assert not torch.allclose(one[1], expected[1], atol=1e-2)
    twice = pipe(
        LABELS, image=exact, num_images_per_label=2, latents=NOISE.repeat_interleave(2, 0), output_type="latent"
    ).images
    assert torch.equal(twice[0], twice[1]) and not torch.equal(twice[1], twice[2])


def test_transparent_and_grey_images_are_on_white_in_rgb():
    pipe = build()
    rgba = Image.new("RGBA", (32, 32), (255, 0, 0, 255))
    rgba.paste((0, 0, 0, 0), (0, 0, 16, 32))
    rgb = Image.new("RGB", (32, 32), (255, 0, 0))
    rgb.paste((255, 255, 255), (0, 0, 16, 32))
    assert torch.equal(pipe.encode_images(rgba), pipe.encode_images(rgb))
    assert torch.equal(pipe.encode_images(rgb.convert("L")), pipe.encode_images(rgb.convert("L").convert("RGB")))
    for height in (33, 0, "a"):
        with pytest.raises(ValueError, match="`height` is"):
            pipe.encode_images(rgb, height=height)


def test_an_encoder_that_overflows_is_run_in_float32():
    pipe = build().to(torch.float16)
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.mul_(1e4)
    latents = pipe.encode_images(IMAGES)
    assert torch.isfinite(latents).all() and pipe.vae.dtype == torch.float16


def test_a_guider_with_momentum_begins_with_the_first_of_all_steps():
    """Or it would have no buffer of its momentum, and say nothing."""
    pipe = build()
    options = {"adaptive_projected_guidance_rescale": 0.0}
    images = [
        sample(pipe, image=IMAGES, strength=0.5, guider=AdaptiveProjectedGuidance(3.0, momentum, **options))
        for momentum in (None, -0.5)
    ]
    assert not torch.allclose(*images, atol=1e-3)


def test_encoding_undoes_decoding_with_statistics():
    pipe = build()
    for options in (
        {"scaling_factor": 0.5, "shift_factor": 0.1},
        {"latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 0.5, 0.7]},
    ):
        pipe.vae.register_to_config(**options)
        latents = pipe.encode_images(IMAGES)
        with torch.no_grad():
            raw = pipe.vae.encode(2 * IMAGES - 1).latent_dist.mode()
        torch.testing.assert_close(pipe._denormalize(latents), raw)


def test_a_pixel_model_starts_from_pixels():
    pipe = build(vae=False, in_channels=3, sample_size=32, patch_size=8)
    torch.testing.assert_close(pipe.encode_images(IMAGES), 2 * IMAGES - 1)
    noise = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    near = sample(pipe, image=IMAGES, strength=0.1, latents=noise)
    assert (near - (2 * IMAGES - 1)).abs().mean() < 0.3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strength": 0.5}, "no `image` was given"),
        ({"image": IMAGES, "strength": 0}, "`strength` is 0; it must be a number above 0"),
        ({"image": IMAGES, "strength": 1.5}, "at most 1"),
        ({"image": IMAGES, "strength": "half"}, "`strength` is 'half'"),
        (
            {"image": IMAGES, "strength": 0.05},
            "leaves none of 10 steps; give more steps or a strength of at least 0.1",
        ),
        ({"image": "sloth.png"}, "`image` can't be read"),
        ({"image": IMAGES[:, :2]}, "`image` has shape"),
        ({"image": IMAGES.repeat(2, 1, 1, 1)}, "for 2 labels; these arguments need one, or one per label"),
        ({"image": IMAGES * float("nan")}, "values beyond .0, 1. or that are not finite"),
        ({"image": (255 * IMAGES).to(torch.uint8)}, "divide 8-bit values by 255"),
        ({"image": "nonsense", "strength": 1}, "`image` can't be read"),
        ({"image": NOISE[:, :, :4]}, "`image` has shape .2, 4, 4, 8."),
    ],
)
def test_what_can_not_be_a_start_is_refused(options, words):
    pipe = build()
    pipe.transformer.register_forward_pre_hook(lambda *args: pytest.fail("computed"))
    with pytest.raises(ValueError, match=words):
        sample(pipe, **options)
