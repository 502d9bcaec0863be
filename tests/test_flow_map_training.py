"""Training of flow maps: MeanFlow's and SoFlow's objectives against the originals, and their runs as commands."""

import json
import os
import shutil
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import FIXTURES, load_golden, tiny_transformer
from safetensors import safe_open
from safetensors.torch import load_file
from testing_utils.training_runs import kill_after, losses, read_log, refused, run, train, train_command

from dit_hf import DiTClassCondPipeline, DiTTransformer2DModel, make_scheduler, optimize, restore
from dit_hf.checkpoints.meanflow import MEANFLOW
from dit_hf.checkpoints.saving import original_state_dict
from dit_hf.checkpoints.soflow import SOFLOW
from dit_hf.seeds import seeded_generator
from dit_hf.training.alignment import AlignmentHead, check_alignment
from dit_hf.training.finetuning import add_interval, drop_interval, record_guidance
from dit_hf.training.lora import add_lora
from dit_hf.training.losses import adaptive_loss
from dit_hf.training.model import pretrained_transformer
from dit_hf.training.objectives import (
    OBJECTIVES,
    DistillationObjective,
    MeanFlowObjective,
    SoFlowObjective,
    VelocityObjective,
)
from dit_hf.training.objectives.flow_maps import Points
from dit_hf.training.settings import SETTINGS_FILE


KINDS = {"meanflow": MeanFlowObjective, "soflow": SoFlowObjective}
WEIGHTS = "pipeline/transformer/diffusion_pytorch_model.safetensors"


def metadata(name):
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        return {key: json.loads(value) for key, value in file.metadata().items() if key != "source"}


def recorded(name, case):
    """The tensors of one case, and the options of the original."""
    golden = load_golden(f"{name}_losses")
    parts = {key.removeprefix(f"{case}."): value for key, value in golden.items() if key.startswith(f"{case}.")}
    return parts, metadata(f"{name}_losses")["losses"][case.partition(".")[0]]


def original_gradients(model, family):
    """Gradients under the original's names, in its layout."""
    gradients = tiny_transformer(**{key: value for key, value in model.config.items() if not key.startswith("_")})
    gradients.load_state_dict({name: weight.grad for name, weight in model.named_parameters()})
    return original_state_dict(gradients, family)


def backward(model, objective, golden, until):
    """The losses of a recorded batch by sample, with gradients of their mean in the model."""
    dropped = golden.get("drop", golden.get("cfg_mask")).bool()
    batch = {
        "x_start": golden["x"],
        "noise": golden["noise"],
        "time": torch.stack([golden["t"], until], dim=1),
        "label": golden["y"],
        "drop": dropped,
        "progress": torch.full_like(golden["t"], golden["progress"]),
    }
    loss = objective.loss(model.train(), batch)
    loss.mean().backward()
    every = torch.arange(len(golden["t"]))
    return loss.detach(), objective.guide(model, objective.points(batch), every).velocity


@pytest.mark.parametrize("case", ["b2", "l2", "plain"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_meanflows_loss_and_gradients_equal_the_original(case, checkpointing):
    golden, options = recorded("meanflow", case)
    mix = 1 - options["cfg_kappa"]
    guidance = (options["cfg_omega"] / mix, mix, 0.0, options["cfg_max_t"])
    objective = MeanFlowObjective(0.75, *guidance, power=options["adaptive_p"])
    model = DiTTransformer2DModel.from_single_file(FIXTURES / "meanflow_p2.pt", 4)
    if checkpointing:
        model.enable_gradient_checkpointing()
    loss, velocity = backward(model, objective, golden | {"progress": 0.0}, golden["r"])
    torch.testing.assert_close(velocity, golden["v_g"], rtol=1e-5, atol=1e-5)
    values = golden["x"][0].numel()
    torch.testing.assert_close(loss, golden["squared_error"] / values, rtol=1e-5, atol=0)
    weighted = adaptive_loss(golden["squared_error"], 0.01, options["adaptive_p"])
    torch.testing.assert_close(weighted, golden["loss_official"])
    gradients = original_gradients(model, MEANFLOW)
    for name in (key.removeprefix("official_grad.") for key in golden if key.startswith("official_grad.")):
        torch.testing.assert_close(gradients[name], golden[f"official_grad.{name}"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["imagenet.vel", "imagenet.con", "nomix.vel", "nomix.con"])
def test_soflows_loss_and_gradients_equal_the_original(case):
    golden, options = recorded("soflow", case)
    guidance = (options["cfg_scale"], options["mix_ratio"], 0.0, options["cfg_decay_time"])
    objective = SoFlowObjective(0.75, *guidance)
    model = DiTTransformer2DModel.from_single_file(FIXTURES / "soflow_p2.pt", 4, has_null_class=True)
    # Two of the originals' schedules are another curve than ours; what matters is the distance that was recorded.
    step = ((golden["t"] - golden["l"]) / (golden["t"] - golden["s"])).min().item() if "l" in golden else 0.1
    objective = replace(objective, first_step=step, last_step=step)
    loss, velocity = backward(model, objective, golden | {"progress": 0.5}, golden.get("s", golden["t"]))
    torch.testing.assert_close(velocity, golden["target"], rtol=1e-5, atol=1e-5)
    expected = golden["squared_error" if case.endswith("vel") else "squared_quotient"]
    torch.testing.assert_close(loss, expected, rtol=2e-5, atol=0)
    gradients = original_gradients(model, SOFLOW)
    norms = torch.stack([gradients[name].norm() for name in metadata("soflow_losses")["grad_norms"]])
    torch.testing.assert_close(norms, golden["grad_norms"], rtol=1e-4, atol=1e-6)
    for name in (key.removeprefix("grad.") for key in golden if key.startswith("grad.")):
        torch.testing.assert_close(gradients[name], golden[f"grad.{name}"], rtol=1e-4, atol=1e-5)


def test_soflows_schedules_equal_the_original():
    objective = SoFlowObjective(guidance_end=0.8, guidance_scale=2.0)
    steps = [objective.step(torch.tensor(step / 1000)).item() for step in (0, 250, 500, 999, 1000)]
    assert steps == pytest.approx(metadata("soflow_losses")["l_ratios"]["Exponent"], rel=1e-5)
    golden = load_golden("soflow_losses")
    of_sample, of_label, of_null = objective.guidance(golden["decay_t"])
    torch.testing.assert_close(-of_null, golden["decay_0.8"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(of_sample + of_label + of_null, torch.ones_like(of_null))


def test_the_derivative_is_that_of_finite_differences():
    """In double precision but for the sinusoids of time, with checkpointing and compiled blocks."""
    model = tiny_transformer(interval_embedding=True, timestep_scale=0.001, learn_sigma=False).double().train()
    model.enable_gradient_checkpointing()
    model.compile_repeated_blocks()
    model.set_attention_backend("native")
    generator = seeded_generator(0)
    noisy, velocity = torch.randn(2, 3, 4, 8, 8, generator=generator, dtype=torch.float64)
    time, until = torch.tensor([[0.9, 0.5, 0.7], [0.1, 0.4, 0.7]], dtype=torch.float64)
    labels, keep = torch.tensor([1, 2, 10]), torch.zeros(3, dtype=torch.bool)
    objective = MeanFlowObjective()
    points = Points(noisy, time, until, velocity, labels, keep)
    derivative = objective.total_derivative(model, points)
    step = 0.02
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        near, far = (
            objective.predict(model, replace(points, noisy=noisy + by * velocity, time=time + by))
            - objective.predict(model, replace(points, noisy=noisy - by * velocity, time=time - by))
            for by in (step, 2 * step)
        )
    assert model.transformer_blocks[0].attn.processor._attention_backend is not None  # as before
    torch.testing.assert_close(derivative, (8 * near - far) / (12 * step), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS.values())
def test_times_are_in_order_and_a_fixed_part_is_equal(kind):
    times = kind(0.75).draw_time(4000, seeded_generator(0))
    equal = times[:, 0] == times[:, 1]
    assert (times[:, 0] >= times[:, 1]).all() and times.min() > 0 and times.max() < 1
    assert equal.view(-1, 4).sum(dim=1).unique().tolist() == [3]  # of every four, so of every process's slice
    for ratio, count in ((0.0, 0), (0.3, 300), (1.0, 1000)):
        assert kind(ratio).is_velocity(1000).sum() == count


def test_times_have_the_originals_distributions():
    quartiles, normal = torch.tensor([0.25, 0.5, 0.75]), torch.tensor([-0.6745, 0.0, 0.6745])
    drawn = SoFlowObjective().draw_time(40_000, seeded_generator(0))
    equal = drawn[:, 0] == drawn[:, 1]
    for times, mean, std in ((drawn[equal, 0], -0.2, 1.0), (drawn[~equal, 0], 0.2, 0.8)):
        torch.testing.assert_close(times.quantile(quartiles), (mean + std * normal).sigmoid(), rtol=0, atol=0.01)
    drawn = MeanFlowObjective(0.0).draw_time(20_000, seeded_generator(0)).flatten()
    torch.testing.assert_close(drawn.quantile(quartiles), (-0.4 + normal).sigmoid(), rtol=0, atol=0.01)


def test_a_velocity_model_becomes_a_flow_map_of_the_same_output():
    model = tiny_transformer()  # with channels of a variance, as SiT's
    flow_map = add_interval(model)
    noisy, labels = torch.randn(4, 4, 8, 8, generator=seeded_generator(0)), torch.tensor([0, 1, 2, 10])
    times, ends = torch.tensor([[1000.0, 700.0, 20.0, 0.0], [0.0, 300.0, 20.0, 0.0]])
    with torch.no_grad():
        expected = model(noisy, times, labels).sample
        assert torch.equal(flow_map(noisy, times, labels, r_timestep=ends).sample, expected)
    assert flow_map.config.interval_embedding and not model.config.interval_embedding
    for objective in (MeanFlowObjective(), SoFlowObjective()):
        drop = torch.zeros(4, dtype=torch.bool)
        batch = {
            "x_start": noisy,
            "noise": -noisy,
            "time": torch.rand(4, 2, generator=seeded_generator(1)).sort(dim=1)[0].flip(1),
        }
        batch |= {"label": labels, "drop": drop, "progress": torch.zeros(4)}
        objective.loss(flow_map.train(), batch).sum().backward()
        assert flow_map.interval_embed.linear_2.weight.grad.abs().max() > 0  # it learns from the first step


@pytest.mark.parametrize("kind", KINDS.values())
def test_jumps_alone_are_guided(kind):
    """By the network's own guided velocity, mixed with the sample's; samples without label keep theirs."""
    model = tiny_transformer(interval_embedding=True, learn_sigma=False).train()
    objective = kind(guidance_scale=3.0, guidance_mix=0.25, guidance_start=0.5, guided="jumps")
    latents, noise = torch.randn(2, 5, 4, 8, 8, generator=seeded_generator(0))
    time = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.1], [0.9, 0.9], [0.7, 0.6]])
    drop = torch.tensor([False, True, False, False, False])
    batch = {"x_start": latents, "noise": noise, "time": time, "label": torch.arange(5), "drop": drop}
    points = objective.points(batch)
    guided = objective.guide(model, points, torch.tensor([0, 1, 2, 4])).velocity
    keep = torch.zeros(5, dtype=torch.bool)
    with torch.no_grad():
        label, null = (
            model(points.noisy, 1000 * points.time, batch["label"], force_drop_ids=ids)[0] for ids in (keep, ~keep)
        )
    mixed = 0.25 * points.velocity + 0.75 * label
    expected = torch.where(time[:, :1, None, None] < 0.5, mixed, null + 3 * (mixed - null))
    expected[[1, 3]] = points.velocity[[1, 3]]
    torch.testing.assert_close(guided, expected, rtol=1e-5, atol=1e-5)
    assert objective.guidance_in_weights == "jumps" and kind(guided="jumps").guidance_in_weights is False
    distilled = kind(guidance_mix=0.0, guided="jumps").guide(model, points, torch.tensor([0, 2, 4])).velocity
    torch.testing.assert_close(distilled[[0, 2, 4]], label[[0, 2, 4]], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match='pass a larger one, or `guided="jumps"`'):
        kind(guidance_mix=0.0)


def test_a_flow_map_becomes_a_velocity_model_of_the_same_output(tmp_path):
    model = tiny_transformer(interval_embedding=True, learn_sigma=False, guidance_in_weights="jumps").eval()
    velocity_model = drop_interval(model)
    assert velocity_model.interval_embed is None and velocity_model.config.guidance_in_weights is False
    latents, time = torch.randn(3, 4, 8, 8, generator=seeded_generator(0)), torch.tensor([10.0, 500.0, 1000.0])
    with torch.no_grad():
        outputs = [part(latents, time, torch.tensor([0, 1, 2]))[0] for part in (model, velocity_model)]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    DiTClassCondPipeline(model, make_scheduler("flow_euler")).save_pretrained(tmp_path)
    names = [str(index) for index in range(model.config.num_classes)]
    assert pretrained_transformer(tmp_path, names, 0.1).interval_embed is None
    assert pretrained_transformer(tmp_path, names, 0.1, interval_embedding=True).interval_embed is not None
    # Adapters keep the jumps of the model that they are for.
    adapted = pretrained_transformer(tmp_path, names, 0.1, lora_rank=2)
    record_guidance(adapted, False)
    assert adapted.config.guidance_in_weights == "jumps" and adapted.interval_embed is not None


def test_a_model_of_guided_jumps_keeps_its_velocity(caplog):
    """Any scheduler and guidance scale of the velocity, as before; jumps are not guided once more."""
    model = tiny_transformer(learn_sigma=False)
    flow_map = add_interval(model)
    flow_map.register_to_config(guidance_in_weights="jumps")
    call = {"num_inference_steps": 3, "guidance_scale": 4.0}
    options = {"output_type": "latent", "generator": [seeded_generator(0)]}
    pipes = [DiTClassCondPipeline(part, make_scheduler("flow_euler"), None, None, call) for part in (model, flow_map)]
    expected, latents = (pipe(1, **options | {"generator": [seeded_generator(0)]}).images for pipe in pipes)
    assert torch.equal(latents, expected)
    pipes[0].scheduler = make_scheduler("flow_lcm")
    with caplog.at_level("WARNING"):
        pipes[0](1, num_inference_steps=1, **options)
    assert "is for models of few steps" in caplog.text
    caplog.clear()
    pipe = pipes[1]
    for recipe in ("flow_lcm", "flow_map"):
        pipe.scheduler = make_scheduler(recipe)
        assert pipe.resolve_call() == pipe.resolve_call(num_inference_steps=3, guidance_scale=1.0)
        assert pipe(1, num_inference_steps=1, **options).images.isfinite().all()
        with pytest.raises(ValueError, match="would be guided twice"):
            pipe(1, guidance_scale=4.0)
    assert "is for models of few steps" not in caplog.text
    pipe.scheduler = make_scheduler("flow_euler")
    optimize(pipe, "fastest")
    assert pipe.resolve_call()["num_inference_steps"] == 4 and pipe.resolve_call()["guidance_scale"] == 1
    restore(pipe)
    assert pipe.resolve_call()["num_inference_steps"] == 3 and pipe.resolve_call()["guidance_scale"] == 4
    with pytest.raises(ValueError, match="`guidance_in_weights` is 'some'; it must be True, False or 'jumps'"):
        tiny_transformer(guidance_in_weights="some")


@pytest.mark.parametrize("name", KINDS)
def test_compilation_and_checkpointing_do_not_change_the_loss(name, tmp_path):
    """The blocks are compiled for forward and backward, the derivative is taken without."""
    model = {"interval_embedding": True, "timestep_scale": 0.001}
    variants = {"plain": {}, "compiled": {"compile_blocks": True}, "checkpointed": {"gradient_checkpointing": True}}
    runs = {}
    for variant, settings in variants.items():
        train(tmp_path / variant, KINDS[name](0.5, 2.0, 0.5), model=model, max_train_steps=3, **settings)
        runs[variant] = losses(tmp_path / variant)
    torch.testing.assert_close(runs["compiled"], runs["plain"], rtol=1e-3, atol=0)
    torch.testing.assert_close(runs["checkpointed"], runs["plain"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", KINDS)
def test_a_run_resumes_to_the_bit_and_samples_in_one_step(name, workspace, tmp_path):
    flags = {
        "recipe": name,
        "learning_rate": 1e-2,
        "ema_decay": 0.5,
        "mixed_precision": "bf16",
        "validation_inference_steps": None,
    }
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run(train_command(workspace, straight, **flags))
    kill_after(train_command(workspace, killed, **flags), killed / "checkpoint-4")
    run(train_command(workspace, killed, **flags))
    assert torch.equal(losses(straight), losses(killed))
    weights, again = load_file(straight / WEIGHTS), load_file(killed / WEIGHTS)
    assert all(torch.equal(weights[key], again[key]) for key in weights)
    pipe = DiTClassCondPipeline.from_pretrained(straight / "pipeline")
    assert pipe.transformer.config.guidance_in_weights and pipe.transformer.config.timestep_scale == 0.001
    assert type(pipe.scheduler) is type(make_scheduler(KINDS[name].sampler))
    assert pipe.config.recommended_call == {"num_inference_steps": 1}
    assert pipe("light").images[0].size == (32, 32)
    card = (straight / "pipeline" / "README.md").read_text()
    assert f"objective | {name}" in card and "target_guidance_scale" in card and "time_sampling" not in card


@pytest.mark.parametrize("name", KINDS)
def test_processes_and_micro_batches_do_not_change_the_result(name, workspace, tmp_path):
    flags = {"recipe": name, "total_batch_size": 16, "max_train_steps": 3, "learning_rate": 1e-2, "ema_decay": 0.5}
    run(train_command(workspace, tmp_path / "one", **flags))
    flags |= {"gradient_accumulation_steps": 2}
    command = train_command(workspace, tmp_path / "two", **flags)
    launch = [command[0], "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = run([*launch, *command[1:]], env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"})
    assert "2 processes" in result.stdout
    torch.testing.assert_close(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=1e-4, atol=1e-5)


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
    assert pipe.config.recommended_call["num_inference_steps"] == 1
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
    assert pipe.config.recommended_call == {"num_inference_steps": 1, "guidance_scale": 4.5}
    assert pipe.resolve_call()["guidance_scale"] == 1.0
    pipe.scheduler = make_scheduler("flow_euler")
    assert pipe.resolve_call()["guidance_scale"] == 4.5
    pipe.scheduler = make_scheduler("flow_lcm")
    assert pipe("dark").images[0].size == (32, 32)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"objective": "soflow", "time_sampling": "uniform"}, "--time_sampling has no effect on soflow"),
        ({"target_guidance_scale": 2}, "--target_guidance_scale has no effect on velocity"),
        (
            {"objective": "meanflow", "target_guidance_scale": 2, "class_dropout_prob": 0},
            "--target_guidance_scale 2.0 needs the null class",
        ),
        ({"objective": "meanflow", "target_guidance_mix": 0, "target_guidance_scale": 2}, "`guidance_mix` is 0"),
        ({"objective": "soflow", "target_guidance_mix": 0.5}, "--target_guidance_mix has no effect without"),
        ({"objective": "soflow", "target_guidance_start": 0.5}, "--target_guidance_start has no effect without"),
        ({"objective": "soflow", "target_guided": "jumps"}, "--target_guided has no effect without"),
        ({"objective": "distillation"}, "distillation needs --pretrained_model_name_or_path"),
        ({"objective": "meanflow", "float8": ""}, "--float8 can't be differentiated as --objective meanflow needs"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(flags, message, workspace, tmp_path, monkeypatch, capsys):
    assert message in refused(train_command(workspace, tmp_path / "run", **flags), monkeypatch, capsys)


@pytest.mark.parametrize("kind", KINDS.values())
def test_alignment_reaches_the_model(kind, tmp_path):
    """It is of the forward pass with gradient, not of those for the targets."""
    model = tiny_transformer(interval_embedding=True, learn_sigma=False, in_channels=8, sample_size=16)
    head = AlignmentHead(model, 1, 16)
    generator = seeded_generator(0)
    batch = {"x_start": torch.randn(8, 8, 16, 16, generator=generator), "label": torch.arange(8)}
    objective = kind(guidance_scale=2.0, guidance_mix=0.5)
    batch |= {"noise": torch.randn(8, 8, 16, 16, generator=generator), "time": objective.draw_time(8, generator)}
    batch |= {"drop": torch.zeros(8, dtype=torch.bool), "progress": torch.zeros(8)}
    objective.loss(model.train(), batch)
    head({"features": torch.randn(8, 16, 4, 4, generator=generator)}).sum().backward()
    assert model.pos_embed.proj.weight.grad.abs().max() > 0


def test_a_run_whose_loss_rises_by_its_schedule_ends(tmp_path):
    """The rate of change of ever shorter distances is no sign of a training that made things worse."""
    assert not SoFlowObjective().loss_falls and MeanFlowObjective().loss_falls
    model = tiny_transformer(interval_embedding=True, learn_sigma=False)
    assert (
        DistillationObjective(model).loss_falls and not DistillationObjective(model, adversarial_weight=1.0).loss_falls
    )
    model = {"interval_embedding": True}
    trainer = train(
        tmp_path, SoFlowObjective(0.0, guidance_scale=2.0), model=model, max_train_steps=200, learning_rate=0
    )
    recorded = losses(tmp_path)
    assert recorded[-50:].mean() > 1.2 * recorded[:50].mean()
    assert trainer.transformer.config.guidance_in_weights is True


def test_adapters_cannot_change_where_guidance_is(tmp_path):
    model = tiny_transformer(interval_embedding=True, learn_sigma=False)
    add_lora(model, 2, 2)
    record_guidance(model, False)
    with pytest.raises(ValueError, match="which adapters can't; train all weights"):
        record_guidance(model, True)


def test_settings_are_those_of_the_objective():
    settings = SoFlowObjective(guidance_scale=2.0).settings()
    assert settings["objective"] == "soflow" and settings["target_guidance_scale"] == 2.0
    assert "guidance_scale" not in settings  # of the samples
    assert settings["until_time_sampler"] == "logit_normal(-1.0, 0.8)"
    json.dumps(settings)
    assert not VelocityObjective().guidance_in_weights and SoFlowObjective(guidance_scale=2.0).guidance_in_weights
    for kind in KINDS.values():
        for wrong, message in (
            ({"guidance_end": 1.5}, "guidance_end"),
            ({"guidance_start": 0.9, "guidance_end": 0.1}, "nothing is guided"),
            ({"flow_matching_ratio": 1.0, "guided": "jumps"}, "there are no jumps"),
        ):
            with pytest.raises(ValueError, match=message):
                kind(**wrong)


def test_the_flags_of_few_step_objectives_reach_them():
    flags = {"flow_matching_ratio": 0.5, "target_guidance_scale": 2.0}
    flags |= {"target_guidance_start": 0.2, "target_guidance_end": 0.9}
    model = tiny_transformer(interval_embedding=True, learn_sigma=False)
    build = partial(OBJECTIVES["soflow"].build, None, model, target_guidance_mix=1.0, target_guided="all", **flags)
    objective = build(solution_steps=[0.2, 0.05])
    assert objective.step(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.2, 0.05])
    assert build(solution_steps=[0.1, 0.002]) == SoFlowObjective(0.5, 2.0, 1.0, 0.2, 0.9)
    scheduler = make_scheduler("flow_lcm", shift=2.0)
    distillation = OBJECTIVES["distillation"].build(scheduler, model, **flags, adversarial_weight=0.3)
    assert distillation == DistillationObjective(model, 0.5, 2.0, 0.2, 0.9, 2.0, 0.3)
    json.dumps(distillation.settings())
    assert distillation.settings()["shift"] == 2.0 and distillation.guidance_in_weights == "jumps"


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
