"""Adversarial distillation: the discriminator on a copy of the teacher."""

import json
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_transformer
from testing_utils.training_runs import train
from torch.utils.data import default_collate

from dit_hf.seeds import seeded_generator
from dit_hf.training.config import TrainingConfig
from dit_hf.training.objectives import DistillationObjective
from dit_hf.training.objectives.flow_maps import Points
from dit_hf.training.plan import training_plan
from dit_hf.training.speed import prepare_teachers


def adversarial(**config):
    """A student, an adversarial objective from another model, and its discriminator."""
    student = tiny_transformer(interval_embedding=True, seed=1, **({"learn_sigma": False} | config)).train()
    teacher = tiny_transformer(**({"learn_sigma": False} | config))
    objective = DistillationObjective(teacher, 0.5, guidance_scale=3.0, adversarial_weight=1.0)
    torch.manual_seed(0)
    return student, objective, objective.auxiliary_loss()


def adversarial_batch(objective, count=4):
    generator = seeded_generator(0)
    batch = {"x_start": torch.randn(count, 4, 8, 8, generator=generator), "label": torch.arange(count)}
    batch |= {"noise": torch.randn(count, 4, 8, 8, generator=generator), "time": objective.draw_time(count, generator)}
    batch |= {"drop": torch.zeros(count, dtype=torch.bool)}
    return batch | default_collate([objective.draw_sample((4, 8, 8), time, generator) for time in batch["time"]])


@pytest.mark.parametrize(
    "config", [{}, {"learn_sigma": True}, {"conditioning": "in_context"}, {"num_layers": 6}], ids=str
)
def test_a_discriminator_learns_and_teaches_the_student(config):
    student, objective, discriminator = adversarial(**config)
    batch = adversarial_batch(objective)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3)
    found = []
    while not found or (found[-1] > 1 and len(found) < 100):
        objective.loss(student, batch)
        losses = discriminator(batch)
        found.append(losses.sum().item() / 2)
        assert (losses[objective.is_velocity(4)] == 0).all()
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
    assert found[0] == pytest.approx(2) and 0.1 < found[-1] < 1  # 2 is what scores of 0 give
    assert not any(part.requires_grad or part.grad is not None for part in objective.teacher.parameters())
    # A step along the student's negative gradient makes its samples harder to tell, and raises the loss.
    student.zero_grad()
    objective.loss(student, batch)
    before = discriminator(batch).sum()
    before.backward()
    with torch.no_grad():
        for part in student.parameters():
            part -= 1e-3 * (0 if part.grad is None else part.grad)
        objective.loss(student, batch)
        assert discriminator(batch).sum() > before + 1e-5


def test_the_student_gets_the_gradient_that_the_discriminator_gets_reversed():
    student, objective, discriminator = adversarial()
    for head in discriminator.heads:
        torch.nn.init.normal_(head[-1].weight)
    batch = adversarial_batch(objective)
    objective.loss(student, batch)
    ((rows, of_student, of_teacher),) = objective.ends
    discriminator(batch).sum().backward(retain_graph=True)
    found = [part.grad.clone() for part in (student.proj_out.weight, *discriminator.heads.parameters())]
    found.append(discriminator.backbone.transformer_blocks[0].attn.to_q.weight.grad.clone())
    student.zero_grad()
    discriminator.zero_grad()
    hinge = (1 + discriminator.scores(of_student)).relu() + (1 - discriminator.scores(of_teacher)).relu()
    (hinge.mean(dim=(0, 2, 3)).sum() / 4).backward()  # four jumps of each
    expected = [part.grad for part in (student.proj_out.weight, *discriminator.heads.parameters())]
    expected.append(discriminator.backbone.transformer_blocks[0].attn.to_q.weight.grad)
    assert all(part.abs().max() > 0 for part in expected[:1] + expected[-1:])
    for index, (part, other) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(part, -other if index == 0 else other, atol=1e-6, rtol=1e-4)


def test_the_copied_blocks_learn_at_a_third_of_the_rate_and_nothing_else_of_the_copy():
    _, _, discriminator = adversarial()
    blocks, heads = discriminator.parameter_groups(3e-4)
    assert (heads["lr"], blocks["lr"]) == (3e-4, pytest.approx(1e-4, rel=0.02))
    trained = {id(part) for group in (heads, blocks) for part in group["params"]}
    assert trained == {id(part) for part in discriminator.parameters() if part.requires_grad}
    names = {name.split(".")[0] for name, part in discriminator.backbone.named_parameters() if part.requires_grad}
    assert names == {"transformer_blocks"}


def test_a_discriminator_sees_tokens_of_noisy_samples():
    student, objective, discriminator = adversarial()
    batch = adversarial_batch(objective)
    objective.loss(student, batch)
    ((rows, of_student, of_teacher),) = objective.ends
    start = objective.points(batch).at(rows)
    # The second half starts from noisy ends of the student's jumps.
    first = start.noisy - objective.predict(student, start)
    jumps = objective.jumps(start)
    sigma = jumps.time[2 * len(rows)].item()
    restart = replace(start, noisy=(1 - sigma) * first + sigma * batch["restart_noise"][rows], time=start.time * sigma)
    jumps = Points.cat([jumps.at(torch.arange(2 * len(rows))), objective.jumps(restart, first=4)])
    assert jumps.time[:: len(rows)].tolist() == pytest.approx([1, 0.75, 0.5, 0.25], abs=1e-3)
    level, noise = (batch[name][rows].transpose(0, 1).flatten(0, 1) for name in ("end_level", "end_noise"))
    assert level.min() >= 0 and level.max() <= 0.6 and level.median() < 0.3 and torch.equal(of_student.time, level)
    ends = jumps.noisy - jumps.time[:, None, None, None] * jumps.velocity
    for half in ends.chunk(2):  # both jumps of a trajectory end in its sample
        assert torch.allclose(*half.chunk(2), atol=1e-5)
    assert not torch.allclose(*ends.chunk(2), atol=1e-2)
    level = level[:, None, None, None]
    assert torch.allclose(of_teacher.noisy, (1 - level) * ends + level * noise, atol=1e-5)
    ends = jumps.noisy - jumps.time[:, None, None, None] * objective.predict(student, jumps)
    assert torch.allclose(of_student.noisy, (1 - level) * ends + level * noise, atol=1e-5)
    seen = []
    for block in discriminator.backbone.transformer_blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(output))
    tokens = discriminator.tokens(of_student)
    assert len(tokens) == len(seen) == len(discriminator.heads) == 2  # the model has two blocks
    expected = torch.nn.functional.layer_norm(seen[1], seen[1].shape[-1:])
    assert torch.equal(tokens[1][:, :, 1, 2], expected[:, tokens[1].shape[-1] + 2])


def test_adversarial_losses_do_not_depend_on_micro_batches():
    student, objective, discriminator = adversarial()
    for head in discriminator.heads:
        torch.nn.init.normal_(head[-1].weight)
    batch = adversarial_batch(objective)
    objective.loss(student, batch)
    whole = discriminator(batch)
    parts = []
    for row in range(4):
        part = {name: value[row : row + 1] for name, value in batch.items()}
        objective.loss(student, part)
        parts.append(discriminator(part))  # of the velocities, no jump
    assert torch.allclose(whole, torch.cat(parts), rtol=1e-4)


def test_the_heads_depend_on_the_seed_of_the_run_alone(tmp_path):
    model = {"interval_embedding": True}
    teacher = tiny_transformer(sample_size=16, in_channels=8, learn_sigma=False, **model)
    heads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        objective = DistillationObjective(teacher, 0.5, adversarial_weight=1.0)
        trainer = train(tmp_path / str(seed), objective, model=model, max_train_steps=1)
        heads.append(torch.cat([weight.flatten() for weight in trainer.auxiliary.parameters()]))
    assert torch.equal(*heads)


def test_the_plan_counts_what_the_discriminator_trains(tmp_path):
    student, objective, discriminator = adversarial(num_layers=12)
    config = TrainingConfig(str(tmp_path), total_batch_size=4, max_train_steps=1)
    plain = DistillationObjective(objective.teacher, 0.5, guidance_scale=3.0)
    plans = [training_plan(student, part, config, Accelerator(cpu=True)) for part in (plain, objective)]
    memory = [plan["memory without activations (GB)"] for plan in plans]
    count = sum((16 if part.requires_grad else 4) * part.numel() for part in discriminator.parameters())
    assert memory[1] - memory[0] == pytest.approx(count / 1e9, abs=0.0011) and count > 9e6


@pytest.mark.parametrize("option", ["gradient_checkpointing", "compile_blocks"])
def test_options_of_speed_do_not_change_the_losses(option, tmp_path):
    teacher = tiny_transformer(sample_size=16, in_channels=8, learn_sigma=False, interval_embedding=True)
    found = []
    for value in (False, True):
        objective = DistillationObjective(teacher, 0.5, adversarial_weight=1.0)
        options = {"model": {"interval_embedding": True}, "max_train_steps": 2, option: value}
        trainer = train(tmp_path / str(value), objective, **options)
        backbone = trainer.auxiliary.backbone
        assert backbone.is_gradient_checkpointing == (value and option == "gradient_checkpointing")
        is_compiled = backbone.transformer_blocks[0]._compiled_call_impl is not None
        assert is_compiled == (value and option == "compile_blocks")
        log = [json.loads(line) for line in (tmp_path / str(value) / "train_log.jsonl").read_text().splitlines()]
        found.append([line[name] for line in log for name in ("loss", "adversarial")])
    assert found[1] == pytest.approx(found[0], rel=1e-4) and len(set(found[0])) > 2


def test_a_second_discriminator_has_a_copy_of_its_own():
    """Also if a trainer has prepared the teacher, whose `forward` is an attribute then."""
    student, objective, first = adversarial()
    prepare_teachers(objective, first, TrainingConfig("unused"), Accelerator(cpu=True))
    second = objective.auxiliary_loss()
    batch = adversarial_batch(objective)
    objective.loss(student, batch)
    second(batch).sum().backward()
    weights = [part.backbone.transformer_blocks[0].attn.to_q.weight for part in (second, first)]
    assert weights[0].grad is not None and weights[1].grad is None


def test_a_half_precision_teacher_is_copied_in_float32():
    teacher = tiny_transformer(learn_sigma=False, interval_embedding=True).half()
    discriminator = DistillationObjective(teacher, 0.5, adversarial_weight=1.0).auxiliary_loss()
    assert {part.dtype for part in discriminator.parameters()} == {torch.float32}
