"""Training scripts end to end on small data: cache, resume after SIGKILL, samples of EMA weights, saved pipeline."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import FIXTURES, ROOT, tiny_transformer, tiny_vae
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from testing_utils.hub_server import HubServer
from testing_utils.scripts import run_forked
from testing_utils.training_runs import kill_after, losses, read_log, run, train_command

from dit_hf import DiTClassCondPipeline
from dit_hf.data.images import load_image_dataset
from dit_hf.data.latents import CachedLatents, normalise_latents
from dit_hf.data.pixels import normalize_pixels
from dit_hf.seeds import seeded_generator
from dit_hf.training.batches import SeededBatches, draw_batch
from dit_hf.training.checkpointing import list_checkpoints, save_checkpoint
from dit_hf.training.objectives import VelocityObjective
from dit_hf.training.records import truncate_log


TRAIN_AUTOENCODER = ROOT / "examples" / "train_autoencoder" / "train_autoencoder.py"


def test_resume_after_sigkill_is_exact(workspace, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run(train_command(workspace, straight))
    kill_after(train_command(workspace, killed), killed / "checkpoint-4")
    assert list_checkpoints(killed)[-1].name == "checkpoint-4"
    run(train_command(workspace, killed))

    for part in ("transformer", "vae"):
        file = f"pipeline/{part}/diffusion_pytorch_model.safetensors"
        weights, resumed = load_file(straight / file), load_file(killed / file)
        assert all(torch.equal(weights[key], resumed[key]) for key in weights), part
    logs = [[(line["step"], line["loss"]) for line in read_log(folder)] for folder in (straight, killed)]
    assert logs[0] == logs[1]  # a step that was done twice is in the log once
    assert [step for step, _ in logs[0]] == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in list_checkpoints(killed)] == ["checkpoint-4", "checkpoint-6"]
    assert not list(killed.glob(".dit_hf-partial-*"))

    assert (straight / "samples" / "step-000006.png").exists()
    saved = json.loads((straight / "training_config.json").read_text())
    assert saved["transformer"]["num_classes"] == 2
    pipe = DiTClassCondPipeline.from_pretrained(straight / "pipeline")
    assert pipe.labels == {"dark": 0, "light": 1}
    assert len(pipe.vae.config.latents_mean) == 4
    assert pipe("light", num_inference_steps=2).images[0].size == (32, 32)


def test_micro_batches_and_processes_do_not_change_the_result(workspace, tmp_path):
    """Two processes, two micro-batches each, or one process and one batch: the same losses."""
    flags = {"max_train_steps": 12, "checkpointing_steps": 12, "validation_steps": 12, "class_dropout_prob": 0.5}
    run(train_command(workspace, tmp_path / "one", **flags))
    run(train_command(workspace, tmp_path / "micro", **flags, gradient_accumulation_steps=2))
    per_process = {"total_batch_size": None, "train_batch_size": 1, "gradient_accumulation_steps": 2}
    best = {"validation_split": "test", "validation_metrics": "kid", "metric_for_best_model": "kid"}
    best |= {"load_best_model_at_end": ""}
    command = train_command(workspace, tmp_path / "two", **flags, **per_process, **best)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    # `accelerate launch --cpu --num_processes 2` would start one process.
    result = run([*launch, *command[1:]], env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"})
    assert "2 processes" in result.stdout
    assert f"Best kid: {read_log(tmp_path / 'two')[-1]['kid']:.6g} at step 12, kept as checkpoint-12." in result.stdout
    assert json.loads((tmp_path / "two" / "training_config.json").read_text())["total_batch_size"] == 4
    for folder in ("micro", "two"):
        torch.testing.assert_close(losses(tmp_path / folder), losses(tmp_path / "one"), rtol=1e-6, atol=1e-6)
    pipe = DiTClassCondPipeline.from_pretrained(tmp_path / "two" / "pipeline")
    assert pipe.labels == {"dark": 0, "light": 1}


def test_labels_are_dropped_as_drawn():
    """Never once more by the model in training mode, whose draw would depend on processes and micro-batches."""
    transformer, seen = tiny_transformer(learn_sigma=False, in_channels=8).train(), []
    transformer.class_embed.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    latents, objective = CachedLatents(FIXTURES / "emoji_latents"), VelocityObjective()
    batches = SeededBatches(len(latents.labels), 2)
    for step in range(60):
        batch = draw_batch(latents, objective, batches, step, slice(0, 2), 0.5, 0.3)
        objective.loss(transformer, batch)
        assert torch.equal(seen[-1], torch.where(batch["drop"], 10, batch["label"]))
    assert 0.2 < (torch.cat(seen) == 10).float().mean() < 0.4
    batch = draw_batch(latents, objective, batches, 60, slice(0, 2), 0.5, 0.0)
    objective.loss(transformer, batch)
    assert torch.equal(seen[-1], batch["label"])  # the model does not draw by itself either


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_with_the_shells_exit_code(workspace, tmp_path, number):
    flags = {"max_train_steps": 400, "checkpointing_steps": 400, "validation_steps": 400}
    process = subprocess.Popen(train_command(workspace, tmp_path, **flags), stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "train_log.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert f"by {number.name}; run the same command again to resume" in output
    (checkpoint,) = list_checkpoints(tmp_path)
    assert read_log(tmp_path)[-1]["step"] == int(checkpoint.name.split("-")[1]) < 400


def test_a_finished_run_changes_nothing_and_a_batch_must_divide(workspace, tmp_path):
    flags = {"max_train_steps": 2, "validation_steps": 2}
    run(train_command(workspace, tmp_path, **flags))
    weights = (tmp_path / "pipeline/transformer/diffusion_pytorch_model.safetensors").read_bytes()
    log = (tmp_path / "train_log.jsonl").read_text()
    run(train_command(workspace, tmp_path, **flags))
    assert (tmp_path / "pipeline/transformer/diffusion_pytorch_model.safetensors").read_bytes() == weights
    assert (tmp_path / "train_log.jsonl").read_text() == log
    command = train_command(workspace, tmp_path / "other", gradient_accumulation_steps=3)
    result = run_forked(command)
    assert result.returncode == 2
    assert "--total_batch_size 4 can't be split evenly over 1 processes" in result.stderr


def test_training_publishes_its_model(workspace, tmp_path):
    with HubServer() as hub:
        flags = {"max_train_steps": 1, "hub_model_id": "user/trained", "license": "apache-2.0"}
        environment = os.environ | hub.environment(tmp_path / "home")
        run([*train_command(workspace, tmp_path / "run", **flags), "--push_to_hub"], env=environment)
        files = hub.files("user/trained")
        card = files["README.md"].decode()
        assert "license: apache-2.0" in card
        assert "| learning_rate | 0.001 |" in card
        assert "(samples.png)" in card
        assert "samples.png" in files
        hub.fail("POST", "/repos/create", 500, times=20)
        result = subprocess.run(
            [*train_command(workspace, tmp_path / "down", **flags), "--push_to_hub"],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 2
        assert "Nothing is lost: repeat the same command or call" in result.stderr
        assert "step-000001.png was not sent to user/trained" in result.stderr
        assert (tmp_path / "down" / "pipeline" / "model_index.json").exists()
        hub.faults.clear()
        log = (tmp_path / "down" / "train_log.jsonl").read_text()
        again = run([*train_command(workspace, tmp_path / "down", **flags), "--push_to_hub"], env=environment)
        assert "Published: http" in again.stdout
        assert (tmp_path / "down" / "train_log.jsonl").read_text() == log  # no step was trained again


def test_resume_with_other_settings_is_refused(workspace, tmp_path_factory, tmp_path):
    other_data = tmp_path_factory.mktemp("moved") / "workspace"  # first the same data, then other ones in its place
    shutil.copytree(workspace, other_data)
    workspace = other_data
    run(train_command(workspace, tmp_path, max_train_steps=2))
    settings = (tmp_path / "training_config.json").read_text()
    command = train_command(workspace, tmp_path, max_train_steps=4, learning_rate=0.5)
    result = run_forked(command)
    assert result.returncode == 2
    assert "learning_rate was 0.001 and is 0.5" in result.stderr
    assert (tmp_path / "training_config.json").read_text() == settings
    run(train_command(workspace, tmp_path, max_train_steps=3, validation_steps=1))
    load_image_dataset(str(workspace / "data")).select(range(12)).to_parquet(workspace / "data" / "train.parquet")
    result = run_forked(train_command(workspace, tmp_path, max_train_steps=4))
    assert result.returncode == 2
    assert "have changed (latents" in result.stderr


def test_no_label_dropout_and_a_shifted_autoencoder(workspace, tmp_path):
    """Latents are normalised from raw posteriors, so the autoencoder's own shift must not come back in decoding."""
    shifted = tiny_vae()
    shifted.register_to_config(shift_factor=0.3, scaling_factor=0.5)
    shifted.save_pretrained(tmp_path / "vae")
    run(train_command(workspace, tmp_path, vae=tmp_path / "vae", class_dropout_prob=0.0, max_train_steps=1))
    pipe = DiTClassCondPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe.transformer.config.class_dropout_prob == 0
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    posterior = pipe.vae.encode(normalize_pixels(images)).latent_dist.mean
    normal = normalise_latents(posterior, pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    expected = pipe.vae.decode(posterior).sample / 2 + 0.5
    assert ((expected > 0) & (expected < 1)).float().mean() > 0.9
    torch.testing.assert_close(pipe.decode_latents(normal, output_type="pt"), expected.clamp(0, 1))


def test_a_configuration_that_contradicts_the_flags_is_refused(workspace, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"learn_sigma": True, "num_layers": 1}))
    command = train_command(workspace, tmp_path / "run", transformer_config=tmp_path / "config.json")
    result = run_forked(command)
    assert result.returncode == 2
    assert "learn_sigma" in result.stderr


def test_dry_run_prints_the_plan_and_writes_nothing(workspace, tmp_path):
    command = [*train_command(workspace, tmp_path / "run", max_train_steps=1000), "--dry_run"]
    output = run(command).stdout
    plan = json.loads(output[output.rindex("{") :])
    assert plan["steps"] == 1000
    assert plan["hours"] == pytest.approx(plan["seconds per step, forward and backward"] / 3.6, abs=0.01)
    assert plan["parameters (M)"] == plan["trained (M)"] > 0
    assert not (tmp_path / "run").exists()
    run(train_command(workspace, tmp_path / "run", max_train_steps=1))
    before = sorted((tmp_path / "run").rglob("*"))
    run([*train_command(workspace, tmp_path / "run", max_train_steps=1000), "--dry_run"])  # what going on would take
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_recipes_set_what_is_not_given(workspace, tmp_path):
    flags = {"recipe": "lightningdit", "total_batch_size": 4, "max_train_steps": 1, "lr_warmup_steps": None}
    run(train_command(workspace, tmp_path / "l", **flags))
    saved = json.loads((tmp_path / "l" / "training_config.json").read_text())
    expected = {"cosine_loss": True, "adam_beta2": 0.95, "learning_rate": 2e-4, "total_batch_size": 4}
    assert {name: saved[name] for name in expected} == expected
    flags |= {"recipe": "dit", "snr_gamma": 5.0, "learning_rate": 0.003}
    run(train_command(workspace, tmp_path / "d", **flags))
    saved = json.loads((tmp_path / "d" / "training_config.json").read_text())
    assert (saved["objective"], saved["lr_scheduler"], saved["learning_rate"]) == ("epsilon", "constant", 0.003)


def test_epsilon_objective_trains_a_learned_variance(workspace, tmp_path):
    run(train_command(workspace, tmp_path, objective="epsilon", max_train_steps=2))
    pipe = DiTClassCondPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe.transformer.config.learn_sigma
    assert pipe.scheduler.config.variance_type == "learned_range"
    assert all(line["loss"] > 0 for line in read_log(tmp_path))


def test_autoencoder_script_trains_and_resumes(workspace, tmp_path):
    def flags(steps):
        values = {"dataset_name": workspace / "data", "output_dir": tmp_path, "resolution": 32, "train_batch_size": 4}
        values |= {"max_train_steps": steps, "checkpointing_steps": 1, "validation_images": 8, "lr_warmup_steps": 1}
        return [str(part) for name, value in values.items() for part in (f"--{name}", value)]

    script = [
        sys.executable,
        TRAIN_AUTOENCODER,
        "--block_out_channels",
        "8",
        "8",
        "8",
        "--perceptual_resolution",
        "32",
    ]
    run([*script, *flags(1)])
    run([*script, *flags(3)])
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2, 3]
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mean.shape == (1, 4, 8, 8)
    assert (tmp_path / "reconstruction-000003.png").exists()


def test_batches_are_a_function_of_the_step():
    batches, other = SeededBatches(10, 3, seed=1), SeededBatches(10, 3, seed=2)
    epoch = torch.cat([batches.indices(step) for step in range(3)])
    assert len(set(epoch.tolist())) == 9
    assert torch.equal(SeededBatches(10, 3, seed=1).indices(7), batches.indices(7))
    assert not torch.equal(other.indices(0), batches.indices(0))
    draws = [torch.rand(2, generator=batches.generator(step)) for step in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    with pytest.raises(ValueError, match="batch of 11.*10 samples"):
        SeededBatches(10, 11)


def test_balanced_batches_draw_every_class_equally_often():
    labels = torch.tensor([0] * 90 + [1] * 9 + [2])
    batches = SeededBatches(100, 10, labels=labels)
    drawn = torch.cat([labels[batches.indices(step)] for step in range(300)])
    assert (drawn.bincount() / 3000 - 1 / 3).abs().max() < 0.04
    assert torch.equal(SeededBatches(100, 10, labels=labels).indices(25), batches.indices(25))


def test_checkpoint_limit_keeps_the_newest(tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator()
    accelerator.prepare(torch.nn.Linear(2, 2))
    for step in (5, 10, 100):
        save_checkpoint(accelerator, tmp_path, step, total_limit=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-100"]


def test_log_is_cut_back_to_the_checkpoint(tmp_path):
    """Steps after the checkpoint are done again, and a line that a kill cut in half is no line."""
    log = tmp_path / "train_log.jsonl"
    truncate_log(log, 3)
    assert not log.exists()
    log.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 6)) + '{"step": 6, "lo')
    truncate_log(log, 3)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["train_log.jsonl"]


def test_generators_depend_on_every_number():
    keys = [(0,), (1,), (0, 7), (0, 7, 0), (0, 7, 1), (7, 0), (2**32 + 5, 3), (5, 1, 3)]
    draws = {torch.rand(1, generator=seeded_generator(*key)).item() for key in keys}
    assert len(draws) == len(keys)
