"""Training that can be trusted: kills, full disks, sharded weights, damaged data, and a pinned curve of losses."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from conftest import FIXTURES, ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from testing_utils.training_runs import kill_after, losses, read_log, run, train_command

from dit_hf import DiTClassCondPipeline
from dit_hf.data.shards import file_checksum
from dit_hf.training.batches import SeededBatches
from dit_hf.training.checkpointing import list_checkpoints


WEIGHTS = "pipeline/transformer/diffusion_pytorch_model.safetensors"
LATENTS = FIXTURES / "emoji_latents"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
SHARDED_ON_CPU = ROOT / "tests" / "testing_utils" / "sharded_on_cpu.py"
TWO_PROCESSES = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def assert_same_run(first, second):
    """The same weights to the bit, and a log with each step once."""
    weights, others = load_file(first / WEIGHTS), load_file(second / WEIGHTS)
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[key], others[key]) for key in weights)
    logs = [[(line["step"], line["loss"], line["grad_norm"]) for line in read_log(run)] for run in (first, second)]
    assert logs[0] == logs[1]


def test_a_kill_while_a_checkpoint_is_written_loses_nothing(workspace, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    flags = {
        "ema_profiles": "",
        "mixed_precision": "bf16",
        "layer_decay": 0.8,
        "proj_coeff": 0.5,
        "alignment_depth": 1,
    }
    run(train_command(workspace, straight, **flags))
    kill_after(train_command(workspace, killed, **flags), killed / ".dit_hf-partial-checkpoint-4")
    assert [path.name for path in list_checkpoints(killed)] == ["checkpoint-2"]
    run(train_command(workspace, killed, **flags))
    assert_same_run(straight, killed)
    assert not list(killed.glob(".dit_hf-partial-*"))
    for snapshot in (straight / "ema").iterdir():
        kept, again = load_file(snapshot), load_file(killed / "ema" / snapshot.name)
        assert all(torch.equal(kept[key], again[key]) for key in kept)


def test_a_full_disk_leaves_the_last_checkpoint(workspace, tmp_path):
    straight, filled = tmp_path / "straight", tmp_path / "filled"
    run(train_command(workspace, straight))
    kill_after(train_command(workspace, filled), filled / "checkpoint-2")
    shutil.rmtree(filled / "checkpoint-4", ignore_errors=True)
    limit = 20_000  # bytes a file
    result = subprocess.run(
        train_command(workspace, filled),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert result.returncode == 2
    assert re.search(r"error: \S+/checkpoint-4 can't be written: File too large \(", result.stderr)
    assert "checkpoint-2 is whole" in result.stderr
    assert not list(filled.glob(".dit_hf-partial-*"))
    run(train_command(workspace, filled))
    assert_same_run(straight, filled)


FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "DiTBlock",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "DS_ACCELERATOR": "cpu"}


@pytest.mark.parametrize(
    ("environment", "shards"),
    [
        (FSDP, "pytorch_model_fsdp_0"),
        pytest.param(
            DEEPSPEED,
            "pytorch_model/zero_pp_rank_1_mp_rank_00_optim_states.pt",
            marks=pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed"),
        ),
    ],
    ids=["fsdp2", "zero2"],
)
def test_sharded_training_is_the_same_and_saves_an_ordinary_pipeline(workspace, tmp_path, environment, shards):
    """FSDP2 or DeepSpeed on two CPU processes, killed and resumed, against DDP; with micro-batches."""
    flags = {"max_train_steps": 4, "validation_steps": 4, "total_batch_size": 8, "gradient_accumulation_steps": 2}
    for name, settings in (("ddp", TWO_PROCESSES), ("sharded", TWO_PROCESSES | environment)):
        script = train_command(workspace, tmp_path / name, **flags)[1:]
        command = [*TORCHRUN, *([SHARDED_ON_CPU] if name == "sharded" else []), *script]
        if name == "sharded":
            kill_after(command, tmp_path / name / "checkpoint-2", env=os.environ | settings)
            shutil.rmtree(tmp_path / name / "checkpoint-4", ignore_errors=True)
        result = run(command, env=os.environ | settings)
        assert "2 processes" in result.stdout
    assert (tmp_path / "sharded" / "checkpoint-4" / shards).exists()  # it was sharded indeed
    torch.testing.assert_close(losses(tmp_path / "sharded"), losses(tmp_path / "ddp"), rtol=1e-5, atol=1e-5)
    weights, sharded = (load_file(tmp_path / name / WEIGHTS) for name in ("ddp", "sharded"))
    assert weights.keys() == sharded.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(sharded[name], weight, rtol=1e-4, atol=1e-5)
    pipe = DiTClassCondPipeline.from_pretrained(tmp_path / "sharded" / "pipeline")
    assert pipe("light", num_inference_steps=2).images[0].size == (32, 32)


def curve_command(output_dir, latents, **flags):
    """A small model on 126 cached emoji latents."""
    flags = {"dataset_name": None, "latents_dir": latents, "resolution": None, "total_batch_size": 2} | flags
    flags |= {"vae": ROOT / "src/dit_hf/bundled/emoji64/vae", "validation_classes": 1, "validation_steps": 1000}
    return train_command(output_dir.parent, output_dir, **flags)


@pytest.fixture
def small_config(tmp_path):
    config = {"patch_size": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))


def test_the_curve_of_losses_is_the_pinned_one(small_config, tmp_path):
    """Whatever changes data order, draws, losses, optimizer or schedule changes this curve."""
    flags = {"total_batch_size": 16, "max_train_steps": 200, "checkpointing_steps": 200, "lr_warmup_steps": 20}
    run(curve_command(tmp_path / "run", LATENTS, **flags))
    pinned = torch.tensor(json.loads((FIXTURES / "loss_curve.json").read_text()), dtype=torch.float64)
    torch.testing.assert_close(losses(tmp_path / "run"), pinned, rtol=1e-3, atol=0)


def spoil(folder, step, factor, seed=0):
    """A cache in which the sample that a step draws first is multiplied; each step draws two of 126."""
    shutil.copytree(LATENTS, folder)
    with safe_open(folder / "shard-00000.safetensors", "pt") as shard:
        tensors, metadata = {name: shard.get_tensor(name) for name in shard.keys()}, shard.metadata()  # noqa: SIM118
    tensors |= {name: tensor.float() for name, tensor in tensors.items() if name != "label"}  # from half precision
    sample = SeededBatches(126, 2, seed).indices(step - 1)[0]
    for name in ("mean", "mean_flipped"):
        tensors[name][sample] *= factor
    save_file(tensors, folder / "shard-00000.safetensors", metadata)
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["sha256"] = file_checksum(folder / "shard-00000.safetensors")
    (folder / "index.json").write_text(json.dumps(index))
    return sample.item()


@pytest.mark.parametrize(("factor", "policy"), [(1e30, "stop"), (300.0, "rewind")])
def test_a_bad_sample_does_not_end_the_run(small_config, tmp_path, factor, policy):
    """The draw of step 58 is not finite, and left out; or it leaps, and the run goes back and on with other draws."""
    sample = spoil(tmp_path / "latents", 58, factor)
    flags = {"max_train_steps": 60, "checkpointing_steps": 55, "on_spike": policy}
    output = run(curve_command(tmp_path / "run", tmp_path / "latents", **flags)).stdout
    assert re.search(rf"{'rewind' if policy == 'rewind' else 'skip'} at step 58: .*samples \[{sample}, ", output)
    lines = read_log(tmp_path / "run")
    assert [line["step"] for line in lines] == [*range(1, 61)]
    assert [line["step"] for line in lines if line.get("skipped")] == ([58] if policy == "stop" else [])
    if policy == "rewind":
        run(curve_command(tmp_path / "whole", LATENTS, **flags))
        whole, rewound = losses(tmp_path / "whole"), losses(tmp_path / "run")
        assert torch.equal(rewound[:55], whole[:55])
        assert (rewound[55:] != whole[55:]).all()  # other draws
        assert rewound.max() < 10
    assert all(torch.isfinite(weight).all() for weight in load_file(tmp_path / "run" / WEIGHTS).values())
