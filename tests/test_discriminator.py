"""Adversarial distillation: the discriminator on the teacher's features."""

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_transformer
from testing_utils.training_runs import train
from torch.utils.data import default_collate

from dit_hf.seeds import seeded_generator
from dit_hf.training.config import TrainingConfig
from dit_hf.training.objectives import DistillationObjective
from dit_hf.training.plan import training_plan


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


def test_a_certain_discriminator_still_teaches_the_student():
    student, objective, discriminator = adversarial()
    for head in discriminator.heads:
        torch.nn.init.normal_(head[-1].weight)
        torch.nn.init.constant_(head[-1].bias, -5)
    batch = adversarial_batch(objective)
    objective.loss(student, batch)
    discriminator(batch).sum().backward()
    assert student.proj_out.weight.grad.abs().max() > 0


def test_a_discriminator_sees_the_teachers_tokens_of_noisy_samples():
    student, objective, discriminator = adversarial()
    batch = adversarial_batch(objective)
    objective.loss(student, batch)
    ((rows, of_student, of_teacher),) = objective.ends
    jumps = objective.jumps(objective.points(batch).at(rows))
    level, noise = (batch[name][rows].transpose(0, 1).flatten(0, 1) for name in ("end_level", "end_noise"))
    assert level.min() >= 0 and level.max() <= 0.6 and level.median() < 0.3 and torch.equal(of_student.time, level)
    ends = jumps.noisy - jumps.time[:, None, None, None] * jumps.velocity
    assert torch.allclose(ends, ends[: len(rows)].repeat(4, 1, 1, 1), atol=1e-5)  # all jumps end in the sample
    level = level[:, None, None, None]
    assert torch.allclose(of_teacher.noisy, (1 - level) * ends + level * noise, atol=1e-5)
    ends = jumps.noisy - jumps.time[:, None, None, None] * objective.predict(student, jumps)
    assert torch.allclose(of_student.noisy, (1 - level) * ends + level * noise, atol=1e-5)
    seen = []
    for block in objective.teacher.transformer_blocks:
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


def test_the_plan_counts_the_heads(tmp_path):
    student, objective, discriminator = adversarial()
    config = TrainingConfig(str(tmp_path), total_batch_size=4, max_train_steps=1)
    plain = DistillationObjective(objective.teacher, 0.5, guidance_scale=3.0)
    plans = [training_plan(student, part, config, Accelerator(cpu=True)) for part in (plain, objective)]
    memory = [plan["memory without activations (GB)"] for plan in plans]
    heads = sum(part.numel() for part in discriminator.parameters())
    assert memory[1] - memory[0] == pytest.approx(16 * heads / 1e9, abs=0.0011) and 16 * heads > 2e6
