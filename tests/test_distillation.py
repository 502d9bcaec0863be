"""Distillation, and few-step models from a pretrained velocity pipeline."""

import json
import os
import shutil
import sys

import pytest
import torch
from conftest import tiny_transformer
from safetensors.torch import load_file
from testing_utils.training_runs import kill_after, losses, read_log, refused, run, train_command

from dit_hf import DiTClassCondPipeline, DiTTransformer2DModel, make_scheduler
from dit_hf.seeds import seeded_generator
from dit_hf.training.alignment import check_alignment
from dit_hf.training.lora import add_lora
from dit_hf.training.losses import adaptive_loss
from dit_hf.training.objectives import DistillationObjective
from dit_hf.training.objectives.flow_maps import Points
from dit_hf.training.settings import SETTINGS_FILE


WEIGHTS = "pipeline/transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def flow_flags(workspace, tmp_path_factory):
    """Flags of a run from a pretrained velocity pipeline."""
    folder = tmp_path_factory.mktemp("flow")
    run(train_command(workspace, folder))
    flow = DiTClassCondPipeline.from_pretrained(folder / "pipeline")
    flow.register_to_config(recommended_call={"num_inference_steps": 20, "guidance_scale": 4.5})
    flow.save_pretrained(folder / "pipeline")
    return {"transformer_config": None, "pretrained_model_name_or_path": folder / "pipeline", "vae": None}


def resumed_run(workspace, straight, killed, flags):
    """Weights of a run; another one that was killed and resumed has the same, to the bit."""
    run(train_command(workspace, straight, **flags))
    kill_after(train_command(workspace, killed, **flags), killed / "checkpoint-4")
    run(train_command(workspace, killed, **flags))
    weights, again = load_file(straight / WEIGHTS), load_file(killed / WEIGHTS)
    assert all(torch.equal(weights[key], again[key]) for key in weights)
    return weights


def test_distillation_resumes_with_the_same_teacher(flow_flags, workspace, tmp_path, monkeypatch, capsys):
    base = tmp_path / "base"
    shutil.copytree(flow_flags["pretrained_model_name_or_path"], base)
    flags = flow_flags | {"pretrained_model_name_or_path": base, "recipe": "distillation", "target_guidance_scale": 3}
    flags |= {"learning_rate": 1e-2, "ema_decay": 0.5, "total_batch_size": 8, "lr_warmup_steps": 1}
    flags |= {"validation_inference_steps": None}
    straight, killed, two = (tmp_path / name for name in ("straight", "killed", "two"))
    resumed_run(workspace, straight, killed, flags)
    assert not list(straight.glob("checkpoint-*/model_1*"))  # the teacher is in no checkpoint
    pipe = DiTClassCondPipeline.from_pretrained(straight / "pipeline")
    assert pipe.transformer.config.guidance_in_weights == "jumps"
    assert pipe.config.recommended_call["num_jumps"] == 4
    assert pipe("dark").images[0].size == (32, 32)
    assert "objective | distillation" in (straight / "pipeline" / "README.md").read_text()
    command = train_command(workspace, two, **flags, gradient_accumulation_steps=2)
    launch = [command[0], "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run([*launch, *command[1:]], env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"})
    torch.testing.assert_close(losses(straight), losses(two), rtol=1e-4, atol=1e-5)
    transformer = DiTTransformer2DModel.from_pretrained(base / "transformer")
    with torch.no_grad():
        transformer.proj_out.weight.mul_(1.5)
    transformer.save_pretrained(base / "transformer")
    assert "teacher" in refused(train_command(workspace, straight, **flags), monkeypatch, capsys)


def test_a_teacher_has_all_classes_and_the_null_class(flow_flags, workspace, tmp_path, monkeypatch, capsys):
    base = tmp_path / "base"
    shutil.copytree(flow_flags["pretrained_model_name_or_path"], base)
    flags = flow_flags | {"pretrained_model_name_or_path": base, "objective": "distillation"}
    command = train_command(workspace, tmp_path / "run", **flags)
    config = base / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"class_dropout_prob": 0.0}))
    assert "has no null class to distil; pass --class_dropout_prob 0" in refused(command, monkeypatch, capsys)
    index = base / "model_index.json"
    index.write_text(index.read_text().replace('"dark"', '"dim"'))
    assert "has no class 'dark', so it can't be distilled; fine-tune" in refused(command, monkeypatch, capsys)
    assert not (tmp_path / "run").exists()


def test_a_separate_teacher_is_checked(flow_flags, workspace, tmp_path, monkeypatch, capsys):
    """Its class, classes, autoencoder and kind of model; its shift is that of the trajectories."""
    teacher = tmp_path / "teacher"
    flags = flow_flags | {"objective": "distillation", "pretrained_teacher_model": teacher, "max_train_steps": 2}
    command = train_command(workspace, tmp_path / "run", **flags)

    def change(file, **values):
        shutil.rmtree(teacher, ignore_errors=True)
        shutil.copytree(flow_flags["pretrained_model_name_or_path"], teacher)
        path = teacher / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    change("model_index.json", id2label={"0": "dim", "1": "light"})
    assert "has no class 'dark'" in refused(command, monkeypatch, capsys)
    change("transformer/config.json", _class_name="DDTTransformer2DModel")
    assert "is a DDTTransformer2DModel, which can't teach a DiT" in refused(command, monkeypatch, capsys)
    change("vae/config.json", scaling_factor=0.5)
    assert "has another autoencoder than the new model" in refused(command, monkeypatch, capsys)
    change("scheduler/scheduler_config.json", prediction_type="epsilon", _class_name="DDPMScheduler")
    assert "teacher predicts epsilon; only a velocity model can be distilled" in refused(command, monkeypatch, capsys)
    assert not (tmp_path / "run").exists()
    change("scheduler/scheduler_config.json", shift=3.0)
    index = json.loads((teacher / "model_index.json").read_text()) | {"vae": [None, None]}
    (teacher / "model_index.json").write_text(json.dumps(index))  # as converted without one
    shutil.rmtree(teacher / "vae")
    run(command)
    settings = json.loads((tmp_path / "run" / SETTINGS_FILE).read_text())
    assert settings["shift"] == 3.0
    flags |= {"pretrained_model_name_or_path": None, "transformer_config": workspace / "config.json"}
    flags |= {"vae": workspace / "vae"}
    message = "needs --pretrained_model_name_or_path, the weights to start from"
    assert message in refused(train_command(workspace, tmp_path / "other", **flags), monkeypatch, capsys)


def test_the_teacher_runs_as_the_model_does(flow_flags, workspace, tmp_path):
    """In its precision, compiled if it is, in a dry run too."""
    folder = str(flow_flags["pretrained_model_name_or_path"] / "transformer")
    script = f"""
import torch
from accelerate import Accelerator
from dit_hf import DiTTransformer2DModel
from dit_hf.training.config import TrainingConfig
from dit_hf.training.speed import prepare_teacher

model = DiTTransformer2DModel.from_pretrained({folder!r})
config = TrainingConfig({str(tmp_path)!r}, compile_blocks=True)
prepare_teacher(model, config, Accelerator(cpu=True, mixed_precision="bf16"))
size = model.config.sample_size
output = model(torch.zeros(1, model.config.in_channels, size, size), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
print(output[0].dtype, model.transformer_blocks[0]._compiled_call_impl is not None)
"""
    result = run([sys.executable, "-c", script], env=dict(os.environ))
    assert result.stdout.split()[-2:] == ["torch.bfloat16", "True"]
    flags = flow_flags | {"objective": "distillation", "adversarial_weight": 1, "dry_run": ""}
    assert "seconds per step" in run(train_command(workspace, tmp_path, **flags)).stdout


def test_a_velocity_pipeline_becomes_one_of_few_steps(flow_flags, workspace, tmp_path):
    flags = dict(flow_flags)
    flags |= {"recipe": "soflow", "ema_decay": 0.5, "validation_inference_steps": None, "target_guided": "jumps"}
    result = run(train_command(workspace, tmp_path / "map", **flags))
    assert "FlowMatchEulerDiscreteScheduler is for models of many steps" in result.stderr
    pipe = DiTClassCondPipeline.from_pretrained(tmp_path / "map" / "pipeline")
    assert pipe.transformer.config.interval_embedding and pipe.transformer.config.timestep_scale == 1
    assert pipe.transformer.config.guidance_in_weights == "jumps"
    assert pipe.config.recommended_call == {"num_inference_steps": 20, "num_jumps": 1, "guidance_scale": 4.5}
    assert pipe.resolve_call()["guidance_scale"] == 1.0 and pipe.resolve_call()["num_inference_steps"] == 1
    pipe.scheduler = make_scheduler("flow_euler")
    assert pipe.resolve_call()["guidance_scale"] == 4.5 and pipe.resolve_call()["num_inference_steps"] == 20
    pipe.scheduler = make_scheduler("flow_lcm")
    assert pipe("dark").images[0].size == (32, 32)


def test_distillation_checks_what_it_is_given():
    model = tiny_transformer(interval_embedding=True, learn_sigma=False).train()
    objective = DistillationObjective(model)
    assert model.training and not objective.teacher.training and next(model.parameters()).requires_grad
    assert not any(part.requires_grad for part in objective.teacher.parameters())
    assert objective.guidance_in_weights is False
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert DistillationObjective(model).settings()["teacher"] != objective.settings()["teacher"]
    time, until = DistillationObjective(model, 0.25).draw_time(400, seeded_generator(0)).unbind(dim=1)
    velocities = time == until
    assert velocities.sum() == 100 and (time[~velocities] == 1).all() and (until[~velocities] == 0).all()
    assert time[velocities].median() == pytest.approx(0.5, abs=0.1)
    for wrong, message in (
        ({"flow_matching_ratio": 1.0}, "nothing to distil"),
        ({"flow_matching_ratio": 2.0}, "flow_matching_ratio"),
        ({"guidance_start": 0.9, "guidance_end": 0.1}, "nothing is guided"),
        ({"adversarial_weight": -1.0}, "`adversarial_weight` is -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            DistillationObjective(model, **wrong)
    unguided = tiny_transformer(interval_embedding=True, learn_sigma=False, class_dropout_prob=0.0)
    with pytest.raises(ValueError, match="has no null class; pass 1"):
        DistillationObjective(unguided, guidance_scale=2.0)
    with pytest.raises(ValueError, match="--proj_coeff 0.5 has no effect on distillation"):
        check_alignment(objective, 0.5)
    model.register_to_config(guidance_in_weights=True)
    assert DistillationObjective(model).guidance_in_weights is True
    model.register_to_config(guidance_in_weights="jumps")
    assert DistillationObjective(model).guidance_in_weights is False  # its velocity is not guided
    model.register_to_config(guidance_in_weights=True)
    adapted = tiny_transformer(interval_embedding=True, learn_sigma=False)
    add_lora(adapted, 2, 2)
    objective = DistillationObjective(adapted)
    assert "base_layer" not in " ".join(objective.teacher.state_dict()) and adapted.peft_config
    half = tiny_transformer(interval_embedding=True, learn_sigma=False).to(torch.bfloat16)
    assert DistillationObjective(half).teacher.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="has guidance in its weights; pass 1"):
        DistillationObjective(model, guidance_scale=2.0)


@pytest.mark.parametrize(("shift", "levels"), [(1.0, [1.0, 0.75, 0.5, 0.25]), (3.0, [1.0, 0.9, 0.75, 0.5])])
def test_the_teacher_samples_as_the_pipeline_does(shift, levels):
    """The jumps of a trajectory lead from its points to the sample of the pipeline, guided where it is."""
    model = tiny_transformer(interval_embedding=True, learn_sigma=False).eval()
    # The first step of 8 is not guided, nor are the last four.
    scheduler = make_scheduler("flow_unipc", flow_shift=shift)
    scheduler.set_timesteps(8)
    bounds = {
        "guidance_start": scheduler.timesteps[3] / 1000 - 0.01,
        "guidance_end": scheduler.timesteps[1] / 1000 + 0.01,
    }
    objective = DistillationObjective(
        model, guidance_scale=3.0, shift=shift, **{k: float(v) for k, v in bounds.items()}
    )
    noise = torch.randn(3, 4, 8, 8, generator=seeded_generator(0))
    label, drop = torch.tensor([1, 2, 5]), torch.tensor([False, False, True])
    one = torch.ones(3)
    jumps = objective.jumps(Points(noise, one, one, noise, label, drop))
    pipe = DiTClassCondPipeline(model, make_scheduler("flow_unipc", flow_shift=shift))
    pipe.set_progress_bar_config(disable=True)
    call = {"guidance_scale": 3.0, "guidance_interval": (0.125, 0.5), "output_type": "latent"}
    sample = pipe([1, 2, None], latents=noise, num_inference_steps=8, **call).images
    assert jumps.time.view(4, 3)[:, 0].tolist() == pytest.approx(levels, abs=1e-3)
    assert (jumps.until == 0).all() and jumps.label.tolist() == [1, 2, 5] * 4
    ends = jumps.noisy - jumps.time[:, None, None, None] * jumps.velocity
    assert (ends - sample.repeat(4, 1, 1, 1)).abs().max() < 1e-4 * sample.abs().max()
    assert torch.equal(jumps.noisy[:3], noise)


def test_distillation_is_a_mean_over_samples_whatever_the_micro_batches():
    model = tiny_transformer(interval_embedding=True, learn_sigma=False).eval()
    objective = DistillationObjective(model, 0.5, guidance_scale=3.0)
    generator = seeded_generator(0)
    model.proj_out.weight.data.add_(torch.randn(model.proj_out.weight.shape, generator=generator))
    batch = {"x_start": torch.randn(6, 4, 8, 8, generator=generator), "label": torch.arange(6)}
    batch |= {"noise": torch.randn(6, 4, 8, 8, generator=generator), "time": objective.draw_time(6, generator)}
    batch |= {"drop": torch.tensor([False, False, False, False, True, True])}
    whole = objective.loss(model, batch)
    parts = [objective.loss(model, {name: value[row : row + 1] for name, value in batch.items()}) for row in range(6)]
    assert torch.allclose(whole, torch.cat(parts), rtol=1e-4)
    rows = objective.is_velocity(6)
    flows = objective.points(batch).at(rows.nonzero()[:, 0])
    velocity = objective.predict_teacher(flows)
    error = (objective.predict(model, flows) - velocity).square().flatten(1).mean(dim=1)
    assert torch.allclose(whole[rows], error, rtol=1e-4)
    jumps = objective.jumps(objective.points(batch).at((~rows).nonzero()[:, 0]))
    errors = (objective.predict(model, jumps) - jumps.velocity).square().flatten(1).mean(dim=1)
    assert torch.allclose(whole[~rows], errors.view(4, 3).mean(dim=0), rtol=1e-4)
    # The gradient is that of the adaptive losses.
    (gradient,) = torch.autograd.grad(whole.mean(), model.proj_out.weight)
    of_jumps = adaptive_loss(errors, 0.01, 1.0).view(4, 3).mean(dim=0)
    of_flows = adaptive_loss(error, 0.01, 1.0)
    (expected,) = torch.autograd.grad((of_jumps.sum() + of_flows.sum()) / 6, model.proj_out.weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


def test_adversarial_training_resumes_and_has_its_own_teacher(flow_flags, workspace, tmp_path, monkeypatch, capsys):
    flags = flow_flags | {"recipe": "distillation", "target_guidance_scale": 3, "ema_decay": 0.5, "lr_warmup_steps": 1}
    flags |= {"validation_inference_steps": None, "total_batch_size": 8, "learning_rate": 1e-2}
    run(train_command(workspace, tmp_path / "first", **flags))
    flags |= {"pretrained_teacher_model": flags["pretrained_model_name_or_path"], "adversarial_weight": 0.5}
    flags |= {"pretrained_model_name_or_path": tmp_path / "first" / "pipeline"}
    straight, killed, two = (tmp_path / name for name in ("straight", "killed", "two"))
    weights = resumed_run(workspace, straight, killed, flags)
    found = [line["adversarial"] for line in read_log(straight)]
    assert found[0] == pytest.approx(1.0, abs=1e-4)  # half of the samples are trajectories, of 2 each
    assert all(abs(value - 1) > 1e-4 for value in found[2:])  # the heads learn
    settings = {name: json.loads((tmp_path / name / SETTINGS_FILE).read_text()) for name in ("first", "straight")}
    assert settings["first"]["teacher"] == settings["straight"]["teacher"]
    cards = [(folder / "pipeline" / "README.md").read_text() for folder in (tmp_path / "first", straight)]
    assert "adversarial_weight" not in cards[0] and "pretrained_teacher_model | pipeline" in cards[1]
    assert "adversarial_weight | 0.5" in cards[1]
    command = train_command(workspace, two, **flags, gradient_accumulation_steps=2)
    launch = [command[0], "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run([*launch, *command[1:]], env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"})
    torch.testing.assert_close(losses(straight), losses(two), rtol=1e-4, atol=1e-5)
    assert [line["adversarial"] for line in read_log(two)] == pytest.approx(found, rel=1e-4)
    run(train_command(workspace, tmp_path / "lighter", **flags | {"adversarial_weight": 0.25}))
    lighter = load_file(tmp_path / "lighter" / WEIGHTS)
    assert not all(torch.equal(weights[key], lighter[key]) for key in weights)
    assert "adversarial_weight was 0.5" in refused(
        train_command(workspace, straight, **flags | {"adversarial_weight": 0.25}), monkeypatch, capsys
    )
    flags |= {"objective": "velocity", "recipe": None, "adversarial_weight": None, "target_guidance_scale": None}
    message = "--pretrained_teacher_model has no effect without --objective distillation"
    assert message in refused(train_command(workspace, tmp_path / "other", **flags), monkeypatch, capsys)
