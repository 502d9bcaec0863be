"""What a step shows the transformer and asks of it, and that every flag of a training reaches its loss or weights."""

import json

import pytest
import torch
from conftest import FIXTURES, ROOT, tiny_transformer
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from testing_utils.training_runs import losses, read_log, run, train_command

from dit_hf import make_scheduler
from dit_hf.data.autoencoders import vae_statistics
from dit_hf.data.latents import CachedLatents
from dit_hf.seeds import seeded_generator
from dit_hf.training.batches import SeededBatches, draw_batch
from dit_hf.training.data import open_latents
from dit_hf.training.ema import WeightAverage
from dit_hf.training.losses import diffusion_loss, min_snr_weight, velocity_loss
from dit_hf.training.objectives import EpsilonObjective, LogitNormal, MinSNR, Uniform, VelocityObjective
from dit_hf.training.validation import averaged_weights


WEIGHTS = "pipeline/transformer/diffusion_pytorch_model.safetensors"


def shown(objective):
    """A batch, its loss, and what the transformer was called with and gave."""
    transformer, seen = tiny_transformer(learn_sigma=objective.learn_sigma, in_channels=8), []
    transformer.register_forward_hook(lambda module, inputs, output: seen.append((*inputs, output[0])))
    latents = CachedLatents(FIXTURES / "emoji_latents")
    batch = draw_batch(latents, objective, SeededBatches(126, 3), 0, slice(0, 3), 0.0, 0.0)
    batch = {name: part[..., :8, :8] if part.ndim == 4 else part for name, part in batch.items()}
    with torch.no_grad():
        loss = objective.loss(transformer, batch)
    return batch, loss, seen[0]


@pytest.mark.parametrize("beta_end", [0.02, 0.01])
def test_epsilon_adds_the_diffusions_noise(beta_end):
    diffusion = make_scheduler("ddpm", beta_end=beta_end)
    batch, loss, (noisy, timestep, labels, output) = shown(EpsilonObjective(diffusion))
    remaining = (
        (1 - torch.linspace(1e-4, beta_end, 1000, dtype=torch.float64)).cumprod(0)[batch["time"]].view(3, 1, 1, 1)
    )
    expected = remaining.sqrt() * batch["x_start"] + (1 - remaining).sqrt() * batch["noise"]
    torch.testing.assert_close(noisy, expected.float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(timestep, batch["time"]) and torch.equal(labels, batch["label"])
    terms = diffusion_loss(output, batch["x_start"], batch["noise"], batch["time"], diffusion)
    torch.testing.assert_close(loss, terms["loss"])
    weighted = shown(EpsilonObjective(diffusion, MinSNR(1e-4)))[1]
    torch.testing.assert_close(weighted, min_snr_weight(batch["time"], diffusion, 1e-4) * terms["mse"] + terms["vb"])
    assert not torch.allclose(weighted, loss)


def test_velocity_goes_from_data_to_noise():
    batch, loss, (noisy, timestep, _, output) = shown(VelocityObjective())
    sigma = batch["time"].view(3, 1, 1, 1)
    torch.testing.assert_close(noisy, batch["x_start"].lerp(batch["noise"], sigma))
    torch.testing.assert_close(timestep, 1000 * batch["time"])
    terms = velocity_loss(output, batch["x_start"], batch["noise"])
    torch.testing.assert_close(loss, terms["loss"])
    torch.testing.assert_close(shown(VelocityObjective(cosine_loss=True))[1], terms["loss"] + terms["cosine"])


def test_times_are_drawn_as_asked():
    quartiles, normal = torch.tensor([0.25, 0.5, 0.75]), torch.tensor([-0.6745, 0.0, 0.6745])
    for sampler, expected in (
        (Uniform(), quartiles),
        (LogitNormal(), normal.sigmoid()),
        (LogitNormal(1.0, 2.0), (1 + 2 * normal).sigmoid()),
    ):
        times = VelocityObjective(sampler).draw_time(4000, seeded_generator(0))
        torch.testing.assert_close(times.quantile(quartiles), expected, rtol=0, atol=0.03)
    assert [str(sampler) for sampler in (Uniform(), LogitNormal())] == ["uniform", "logit_normal"]
    steps = EpsilonObjective(make_scheduler("ddpm", num_train_timesteps=10)).draw_time(500, seeded_generator(0))
    assert steps.unique().tolist() == list(range(10))


def test_the_average_takes_the_models_place_for_a_while():
    transformer = tiny_transformer().train()
    raw = [parameter.detach().clone() for parameter in transformer.parameters()]
    average = WeightAverage(transformer.parameters(), decay=0.75)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(1.0)
    average.step(transformer.parameters())
    with averaged_weights(average, transformer):
        assert not transformer.training
        for parameter, first in zip(transformer.parameters(), raw, strict=True):
            torch.testing.assert_close(parameter, first + 0.25)
    assert transformer.training
    for parameter, first in zip(transformer.parameters(), raw, strict=True):
        assert torch.equal(parameter, first + 1.0)


def test_every_flag_reaches_the_loss_or_the_weights(workspace, tmp_path):
    def train(name, **flags):
        """The fifth step's record: at first, head and modulation are zero, and labels mean nothing."""
        run(train_command(workspace, tmp_path / name, max_train_steps=5, learning_rate=0.05, **flags))
        return read_log(tmp_path / name)[-1]

    plain, epsilon = train("plain"), train("epsilon", objective="epsilon")
    for name, flags, base in (
        ("cosine", {"cosine_loss": ""}, plain),
        ("uniform", {"time_sampling": "uniform"}, plain),
        ("balanced", {"balance_classes": ""}, plain),
        ("unflipped", {"flip_probability": 0}, plain),
        ("dropped", {"class_dropout_prob": 0.9}, plain),
        ("snr", {"snr_gamma": 0.001, "objective": "epsilon"}, epsilon),
    ):
        assert train(name, **flags)["loss"] != base["loss"], name
    aligned = [train(f"aligned {coeff}", proj_coeff=coeff, alignment_depth=1) for coeff in (0.5, 0.25)]
    assert aligned[0]["grad_norm"] != pytest.approx(aligned[1]["grad_norm"], rel=1e-3)  # Adam hides the weight

    train("watched", validation_steps=1)  # looking changes nothing
    train("averaged", ema_decay=0.0)
    for name in ("watched", "averaged"):
        assert torch.equal(losses(tmp_path / name), losses(tmp_path / "plain"))
    weights = [load_file(tmp_path / name / WEIGHTS)["proj_out.weight"] for name in ("plain", "averaged", "watched")]
    assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[1])


def test_a_pretrained_model_keeps_its_statistics():
    """Those of the new latents would move everything it has learnt."""
    vae = AutoencoderKL.from_pretrained(
        ROOT / "src" / "dit_hf" / "bundled" / "emoji64" / "vae", torch_dtype=torch.float32
    )
    vae.register_to_config(latents_mean=[1.0, 2.0] * 4, latents_std=[0.5] * 8)
    folder = FIXTURES / "emoji_latents"
    kept = open_latents(folder, vae, 64, keep_statistics=True)
    assert kept.statistics == vae_statistics(vae) == ([1.0, 2.0] * 4, [0.5] * 8)
    index = json.loads((folder / "index.json").read_text())
    assert open_latents(folder, vae, 64).statistics == (index["latents_mean"], index["latents_std"])
    assert vae.config.latents_mean == index["latents_mean"]
