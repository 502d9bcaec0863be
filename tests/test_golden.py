"""Our numbers equal those the original code recorded."""

import pytest
import torch
from conftest import FIXTURES, load_golden, predict

from dit_hf import DiTClassCondPipeline, DiTTransformer2DModel, make_scheduler
from dit_hf.training.losses import diffusion_loss, min_snr_weight, velocity_loss


CHECKPOINTS = {
    "dit_p2": "dit_p2.io",
    "dit_p4_fixed_sigma": "dit_p4_fixed_sigma.io",
    "dit_p8_in3": "dit_p8_in3.io",
    "dit_p2_train": "dit_p2_train.ema.io",
}


def load_original(name):
    return DiTTransformer2DModel.from_single_file(FIXTURES / f"{name}.pt", num_attention_heads=4)


@pytest.mark.parametrize("name", CHECKPOINTS)
@torch.no_grad()
def test_forward_equals_the_original(name):
    golden = load_golden(CHECKPOINTS[name])
    output = load_original(name)(golden["x"], golden["t"], golden["y"]).sample
    torch.testing.assert_close(output, golden["out"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CHECKPOINTS)
@torch.no_grad()
def test_guided_forward_equals_the_original(name):
    golden = load_golden(CHECKPOINTS[name])
    transformer = load_original(name)
    variance = "learned_range" if transformer.config.learn_sigma else "fixed_small"
    pipe = DiTClassCondPipeline(transformer, make_scheduler("ddpm", variance_type=variance))
    half = len(golden["cfg_x"]) // 2
    for index in range(half):
        row = slice(index, index + 1)
        inputs = golden["cfg_x"][row], golden["cfg_t"][index], golden["cfg_y"][row]
        output = predict(pipe, *inputs, scale=4.0, channels=3)
        torch.testing.assert_close(output, golden["cfg_out"][row], rtol=0, atol=3e-5)


@pytest.mark.parametrize("kind", ["learned_sigma", "fixed_sigma"])
def test_losses_equal_the_original(kind):
    golden = load_golden(f"losses_{kind}")
    terms = diffusion_loss(
        golden["model_output"], golden["x_start"], golden["noise"], golden["t"], make_scheduler("ddpm")
    )
    assert set(terms) == ({"mse", "vb", "loss"} if kind == "learned_sigma" else {"mse", "loss"})
    assert 0 in golden["t"]  # the decoder's likelihood is among them
    for name, values in terms.items():
        torch.testing.assert_close(values, golden[name], rtol=1e-5, atol=0)


def test_noisy_latents_equal_the_original():
    golden = load_golden("losses_learned_sigma")
    noisy = make_scheduler("ddpm").add_noise(golden["x_start"], golden["noise"], golden["t"])
    # diffusers multiplies the alphas in single precision: a few 1e-6 remain.
    torch.testing.assert_close(noisy, golden["x_t"], rtol=0, atol=1e-5)


def test_the_bound_trains_the_variance_only():
    golden = load_golden("losses_learned_sigma")
    output = golden["model_output"].clone().requires_grad_()
    terms = diffusion_loss(output, golden["x_start"], golden["noise"], golden["t"], make_scheduler("ddpm"))
    terms["vb"].sum().backward()
    assert output.grad[:, :4].abs().max() == 0
    assert output.grad[:, 4:].abs().min() > 0


def test_losses_refuse_other_channels():
    x_start = torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match="6 channels"):
        diffusion_loss(torch.zeros(1, 6, 8, 8), x_start, x_start, torch.tensor([3]), make_scheduler("ddpm"))


def test_velocity_loss_is_zero_for_noise_minus_data():
    data, noise = torch.randn(2, 3, 4, 8, 8).unbind(0)
    assert velocity_loss(noise - data, data, noise)["loss"].abs().max() == 0
    with pytest.raises(ValueError, match="9 channels; 4 or, with a learned variance, 8"):
        velocity_loss(torch.zeros(3, 9, 8, 8), data, noise)
    shifted = velocity_loss(noise - data + 0.5, data, noise)
    torch.testing.assert_close(shifted["loss"], torch.full((3,), 0.25))
    assert shifted.keys() == {"mse", "loss", "cosine"}
    turned = velocity_loss(-2 * (noise - data), data, noise)["cosine"]
    torch.testing.assert_close(turned, torch.full((3,), 2.0))  # the length does not count
    torch.testing.assert_close(velocity_loss(3 * (noise - data), data, noise)["cosine"], torch.zeros(3))


def test_min_snr_weights_hold_back_easy_steps():
    scheduler = make_scheduler("ddpm")
    weights = min_snr_weight(torch.tensor([0, 500, 999]), scheduler, gamma=5.0)
    signal = scheduler.alphas_cumprod[0]
    torch.testing.assert_close(weights[0], 5.0 * (1 - signal) / signal)
    assert (weights[1:] == 1).all()
