"""Whether a GPU computes what a CPU does: golden forwards, a guided trajectory, resumed training, compiled blocks."""

import json
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file

from dit_hf import (
    DDTTransformer2DModel,
    DiTClassCondPipeline,
    DiTTransformer2DModel,
    JiTTransformer2DModel,
    make_scheduler,
)
from dit_hf.data.latents import CachedLatents
from dit_hf.training.config import TrainingConfig
from dit_hf.training.objectives import VelocityObjective
from dit_hf.training.settings import LOG_FILE
from dit_hf.training.trainer import Trainer


FIXTURES = Path(__file__).parents[2] / "tests" / "fixtures"
# Fixture -> the model's class, what its weights don't tell, and whether its time 1 is the data.
MODELS = {
    "dit_p2": (DiTTransformer2DModel, {"num_attention_heads": 4, "family": "dit"}, False),
    "dit_p4_fixed_sigma": (DiTTransformer2DModel, {"num_attention_heads": 4, "family": "dit"}, False),
    "sit_p2": (DiTTransformer2DModel, {"num_attention_heads": 4, "family": "sit"}, True),
    "lightningdit_0": (DiTTransformer2DModel, {"num_attention_heads": 4}, True),
    "jit_p4": (JiTTransformer2DModel, {"in_context_start": 1, "noise_scale": 1.0}, True),
    "ddt_lightning": (DDTTransformer2DModel, {"num_encoder_blocks": 2}, True),
    "rae_dh": (DDTTransformer2DModel, {}, False),
}


def _forward(name, device, dtype):
    """A model's output on its recorded inputs, computed on a device, in float32 on the CPU."""
    model_class, hints, _ = MODELS[name]
    model = model_class.from_single_file(FIXTURES / f"{name}.pt", dtype=dtype, **hints).to(device)
    recorded = load_file(FIXTURES / f"{name}.io.safetensors")
    with torch.no_grad():
        timestep = recorded["t"].float() * (1 if name.startswith("dit_p") else 1000)
        output = model(recorded["x"].to(device, dtype), timestep.to(device), recorded["y"].to(device)).sample
    return output.float().cpu()


def forwards(device: torch.device) -> dict:
    """
    Errors against the same model on the CPU in float32, which the tests compare with the original: the largest of a
    value for float32, the relative one of the whole output for bfloat16.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    errors = {}
    for name in MODELS:
        expected = _forward(name, torch.device("cpu"), torch.float32)
        exact, rounded = (_forward(name, device, dtype) - expected for dtype in (torch.float32, torch.bfloat16))
        relative = (rounded.norm() / expected.norm()).item()
        errors[name] = {"float32": exact.abs().max().item(), "bfloat16": relative}
    worst = {kind: max(error[kind] for error in errors.values()) for kind in ("float32", "bfloat16")}
    return {"errors": errors, "worst": worst, "holds": worst["float32"] <= 1e-4 and worst["bfloat16"] <= 2e-2}


def trajectory(device: torch.device) -> dict:
    """A guided trajectory of the original, recorded in the fixtures, sampled on the device."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    with safe_open(FIXTURES / "sit_p2.io.safetensors", "pt") as file:
        recorded = {key: file.get_tensor(key) for key in file.keys() if key.startswith("ode_")}  # noqa: SIM118
    model = DiTTransformer2DModel.from_single_file(FIXTURES / "sit_p2.pt", **MODELS["sit_p2"][1])
    pipe = DiTClassCondPipeline(model, make_scheduler("flow_euler")).to(device)
    pipe.set_progress_bar_config(disable=True)
    samples = pipe(
        recorded["ode_y"],
        latents=recorded["ode_z"].to(device),
        num_inference_steps=int(recorded["ode_steps"]),
        guidance_scale=float(recorded["ode_cfg"]),
        output_type="latent",
    ).images.cpu()
    error = ((samples - recorded["ode_sample"]).norm() / recorded["ode_sample"].norm()).item()
    return {"relative_error": error, "holds": error <= 1e-4}


def train(folder, steps, compile_blocks, stop_at=None):
    """Losses of a small run on recorded latents; with `stop_at` it is ended there and resumed."""
    for last in filter(None, (stop_at, steps)):
        torch.manual_seed(0)
        model = DiTTransformer2DModel(
            sample_size=16,
            num_layers=4,
            num_attention_heads=6,
            attention_head_dim=64,
            num_classes=10,
            learn_sigma=False,
        )
        settings = {"lr_scheduler": "constant", "checkpointing_steps": 10, "ema_decay": 0.9, "logging_steps": 5}
        config = TrainingConfig(folder, 32, max_train_steps=last, compile_blocks=compile_blocks, **settings)
        latents = CachedLatents(FIXTURES / "emoji_latents")
        trainer = Trainer(config, model, latents, VelocityObjective(), accelerator=Accelerator(mixed_precision="bf16"))
        trainer.train()
    losses = [json.loads(line)["loss"] for line in (Path(folder) / LOG_FILE).read_text().splitlines()]
    return losses, [weight.float().cpu() for weight in trainer.ema.shadow_params]


def training(device: torch.device) -> dict:
    """20 steps, unbroken and resumed after 10, to the bit; compiled blocks against eager ones."""
    del device  # accelerate chooses it
    with tempfile.TemporaryDirectory() as folder:
        whole, weights = train(f"{folder}/whole", 20, compile_blocks=False)
        repeated, _ = train(f"{folder}/repeated", 20, compile_blocks=False)
        resumed, others = train(f"{folder}/resumed", 20, compile_blocks=False, stop_at=10)
        compiled, _ = train(f"{folder}/compiled", 20, compile_blocks=True)
    same = whole == resumed and all(torch.equal(weight, other) for weight, other in zip(weights, others, strict=True))
    apart = max(abs(one - other) / one for one, other in zip(whole, compiled, strict=True))
    result = {"resumed_is_equal": same, "repeated_is_equal": whole == repeated, "compiled_loss_apart": apart}
    # A kernel that is not deterministic makes two equal runs differ, and says nothing of the resumed one.
    return result | {"losses": whole, "holds": (same or whole != repeated) and apart < 1e-2}


def waiting(device: torch.device) -> dict:
    """A step for which the host does not wait, by torch's own check, and one of NaN that changes no weight."""
    with tempfile.TemporaryDirectory() as folder:
        model = DiTTransformer2DModel.from_preset("DiT-S/8", sample_size=16, num_classes=10, learn_sigma=False)
        config = TrainingConfig(folder, 32, max_train_steps=10, logging_steps=50, float8=False)
        latents = CachedLatents(FIXTURES / "emoji_latents")
        trainer = Trainer(config, model, latents, VelocityObjective(), accelerator=Accelerator(mixed_precision="bf16"))
        batch = {name: values.to(device) for name, values in trainer.draw(0).items()}
        trainer._step(0, batch)
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            trainer._step(1, batch)
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        before = [weight.detach().clone() for weight in (*trainer.trainable(), *trainer.ema.shadow_params)]
        trainer._step(2, batch | {"x_start": batch["x_start"] * float("nan")})
        after = [*trainer.trainable(), *trainer.ema.shadow_params]
        kept = all(torch.equal(weight, other) for weight, other in zip(before, after, strict=True))
        return {"nan_changes_nothing": kept, "skipped": trainer.guard.skipped, "holds": kept}
