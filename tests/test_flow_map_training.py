"""Training of flow maps: MeanFlow's and SoFlow's objectives against the originals, and their runs as commands."""

import json
import os
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import FIXTURES, load_golden, tiny_transformer
from diffusers import ClassifierFreeGuidance
from safetensors import safe_open
from safetensors.torch import load_file
from testing_utils.training_runs import kill_after, losses, refused, run, train, train_command

from dit_hf import DiTClassCondPipeline, DiTTransformer2DModel, make_scheduler, optimize, restore
from dit_hf.checkpoints.meanflow import MEANFLOW
from dit_hf.checkpoints.saving import original_state_dict
from dit_hf.checkpoints.soflow import SOFLOW
from dit_hf.commands.sample import guidance_kind
from dit_hf.seeds import seeded_generator
from dit_hf.training.alignment import AlignmentHead
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
    call = {"num_inference_steps": 3, "num_jumps": 2, "guidance_scale": 4.0}
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
        assert pipe.resolve_call()["num_inference_steps"] == 2 and guidance_kind(pipe, 1.0) == "in the weights"
        assert pipe.resolve_call()["guidance_scale"] == 1.0 and pipe.resolve_call()["guidance_interval"] == (0, 1)
        assert pipe(1, num_inference_steps=1, **options).images.isfinite().all()
        with pytest.raises(ValueError, match="would be guided twice.*flow_euler"):
            pipe(1, guidance_scale=4.0)
    assert "is for models of few steps" not in caplog.text
    pipe.scheduler = make_scheduler("flow_euler")
    assert guidance_kind(pipe, 1.0) == "none"
    optimize(pipe, "fastest")
    assert pipe.resolve_call()["num_inference_steps"] == 2 and pipe.resolve_call()["guidance_scale"] == 1
    restore(pipe)
    assert pipe.resolve_call()["num_inference_steps"] == 3 and pipe.resolve_call()["guidance_scale"] == 4
    optimize(pipe, "fastest")
    optimize(pipe, "balanced")  # in the place of the other
    assert type(pipe.scheduler).__name__ == "UniPCMultistepScheduler" and pipe.resolve_call()["guidance_scale"] == 4
    restore(pipe)
    pipe.scheduler = make_scheduler("flow_lcm")
    with pytest.raises(ValueError, match="guided twice; omit the guider, or set a sampler of the velocity"):
        pipe(1, guider=ClassifierFreeGuidance(3.0), **options)
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
    assert pipe.config.recommended_call == {"num_jumps": 1} and pipe.resolve_call()["num_inference_steps"] == 1
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
