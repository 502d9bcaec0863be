"""Forward passes, training steps, loading and memory of the paper's sizes beside diffusers' own DiT."""

import sys
import tempfile
from functools import cache, partial
from pathlib import Path

import torch
import torch._inductor.config
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel as StockDiT
from timing import clock, compare, peak_memory

from dit_hf import DiTTransformer2DModel
from dit_hf.complexity import count_macs
from dit_hf.optimization import compile_network, quantize_blocks
from dit_hf.presets import preset_config


BATCHES = (1, 2, 8)
LATENT_SIZES = {256: 32, 512: 64}
# Of training at 512²: batches with more multiply-adds of a forward pass, XL/2's of one, take minutes a step on two
# cores.
MOST_MACS_AT_512 = 550e9
CLASS = {"our": DiTTransformer2DModel, "stock": StockDiT}


def stock_dit(preset: str, sample_size: int = 32, **options) -> StockDiT:
    """diffusers' DiT of a size of the paper."""
    options = {"num_embeds_ada_norm": 1000, "norm_type": "ada_norm_zero", "out_channels": 8} | options
    config = preset_config(preset) | options
    return StockDiT(**config, sample_size=sample_size, activation_fn="gelu-approximate")


def both(preset, sample_size, device, **overrides):
    """The stock model and ours with random weights, ours also where fresh ones are zero, and gradients would be."""
    torch.manual_seed(0)
    stock = stock_dit(preset, sample_size, **overrides).eval().to(device)
    ours = DiTTransformer2DModel.from_preset(preset, sample_size=sample_size, **overrides).eval().to(device)
    for parameter in ours.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return stock, ours


def inputs(batch, sample_size, device):
    latents = torch.randn(batch, 4, sample_size, sample_size, device=device)
    return latents, torch.full((batch,), 500, device=device), torch.arange(batch, device=device)


def eager_pass(models, product, batch, sample_size, device, seconds):
    """A forward pass of the stock model and of ours."""
    stock, ours = models
    latents, timestep, labels = inputs(batch, sample_size, device)
    candidates = {
        "stock": partial(stock, latents, timestep, class_labels=labels),
        "ours": partial(ours, latents, timestep, labels),
        "product": product,
    }
    with torch.no_grad():
        found = compare(candidates, device, seconds, least=3)
    return {"share_of_peak": product.share(2 * batch * count_macs(ours.config), found)} | found


def forward(presets, product, device, seconds, **overrides):
    """Eager float32 forward passes: ours over stock, and the fraction of the GEMM peak."""
    rows = []
    for preset in presets:
        for pixels, sample_size in LATENT_SIZES.items():
            models = both(preset, sample_size, device, **overrides)
            for batch in BATCHES:
                found = eager_pass(models, product, batch, sample_size, device, seconds)
                rows.append({"model": preset, "pixels": pixels, "batch": batch} | found)
                print(_line(rows[-1]), file=sys.stderr, flush=True)
    return {"rows": rows}


def compiled(preset, precisions, product, device, seconds, batch=2, **overrides):
    """
    Compiled forward passes with the modulation given, as in the pipeline, beside the eager one; relative errors of the
    output. Weights are random, and the modulation's gates of order 1, so that every block counts.
    """
    stock, ours = both(preset, 32, device, **overrides)
    latents, timestep, labels = inputs(batch, 32, device)
    rows = {}
    with torch.no_grad():
        modulation = torch.randn_like(ours.compute_modulation(timestep, labels))
        exact = ours(latents, timestep, labels, modulation=modulation).sample

        def call():
            return ours(latents, timestep, labels, modulation=modulation).sample.float()

        graphs = ("bfloat16, CUDA graphs",) if device.type == "cuda" else ()
        for name in (*precisions, *graphs):
            weights = quantize_blocks(ours) if name == "int8" else []
            compile_network(ours, device.type, name.startswith("bfloat16"))
            candidates = {
                "stock": partial(stock, latents, timestep, class_labels=labels),
                "eager": partial(ours.forward, latents, timestep, labels, modulation=modulation),
                "ours": call,
                "product": product,
            }
            with torch._inductor.config.patch({"triton.cudagraphs": name in graphs}):
                first = clock(call, device)
                error = ((call() - exact).norm() / exact.norm()).item()
                found = compare(candidates, device, seconds)
            found["ours"]["first_seconds"] = first
            share = product.share(2 * batch * count_macs(ours.config), found)
            rows[name] = {"share_of_peak": share, "relative_error": error} | found
            print(preset, name, _line(rows[name]), f"error {error:.1e}", file=sys.stderr, flush=True)
            for layer, weight in weights:
                layer.weight = weight
            torch.compiler.reset()
    return {"model": preset, "batch": batch, "rows": rows}


def training_step(model, latents, timestep, labels):
    """Forward and backward pass of a mean squared error."""
    output = model(latents, timestep, class_labels=labels).sample
    F.mse_loss(output[:, :4], latents).backward()
    model.zero_grad()


def training(presets, product, device, seconds, **overrides):
    """Training steps without the optimizer, which is torch's for both; float32."""
    rows = []
    for preset in presets:
        for pixels, sample_size in LATENT_SIZES.items():
            stock, ours = both(preset, sample_size, device, **overrides)
            for batch in BATCHES:
                macs = batch * count_macs(ours.config)
                if pixels == 512 and macs > MOST_MACS_AT_512:
                    continue
                batch_inputs = inputs(batch, sample_size, device)
                candidates = {
                    "stock": partial(training_step, stock.train(), *batch_inputs),
                    "ours": partial(training_step, ours.train(), *batch_inputs),
                    "product": product,
                }
                found = compare(candidates, device, seconds, least=3)
                # The backward pass is two products for each of the forward's.
                share = product.share(3 * 2 * macs, found)
                rows.append({"model": preset, "pixels": pixels, "batch": batch, "share_of_peak": share} | found)
                print("training", _line(rows[-1]), file=sys.stderr, flush=True)
    return {"rows": rows}


# Run by a fresh interpreter: an action, a folder or preset, and options.
ACTIONS = """
import sys, torch
from diffusers import DiTTransformer2DModel as StockDiT, TorchAoConfig
from dit_hf import DiTClassCondPipeline, DiTTransformer2DModel, make_scheduler, optimize
action, what, option = sys.argv[1:]
if action == "load":
    model = {"our": DiTTransformer2DModel, "stock": StockDiT}[option].from_pretrained(what, torch_dtype=torch.float32)
    with torch.no_grad():  # weights are mapped from the file, and come into memory when they are used
        model(torch.randn(1, 4, 32, 32), torch.tensor([500]), class_labels=torch.tensor([1]))
elif action == "train":
    model = DiTTransformer2DModel.from_preset(what).train()
    if option == "checkpointing":
        model.enable_gradient_checkpointing()
    model(torch.randn(8, 4, 32, 32), torch.full((8,), 500), torch.arange(8)).sample.square().mean().backward()
elif action == "draw":
    pipe = DiTClassCondPipeline(DiTTransformer2DModel.from_preset(what).eval(), make_scheduler("ddim"))
    if option != "plain":
        optimize(pipe, option)
    pipe([1], num_inference_steps=1, output_type="latent")
"""


def memory(preset, folder, seconds):
    """Peak of resident memory beyond the imports, the mapped file included, of loading and a first forward pass."""
    resident = ("RssAnon", "RssFile")
    imports = imported(resident)
    measured = {}
    for name, model in (("our", DiTTransformer2DModel.from_preset(preset)), ("stock", stock_dit(preset))):
        model.save_pretrained(folder / name, max_shard_size="100GB")
        parameters = model.num_parameters()
        del model
        size = next((folder / name).glob("*.safetensors")).stat().st_size
        load = run_action("load", folder / name, name, resident) - imports
        times = compare({"load": partial(first_pass, folder / name, name)}, torch.device("cpu"), seconds, least=3)
        measured[name] = {"parameters": parameters, "file_bytes": size, "load_over_file": load / size}
        measured[name]["load_seconds"] = times["load"]["seconds"]
    full = measured["our"]["file_bytes"]
    save_int8(folder / "our", folder / "int8")
    load = run_action("load", folder / "int8", "our", resident) - imports
    measured["int8"] = {
        "file_over_float32_file": folder_size(folder / "int8") / full,
        "load_over_float32_file": load / full,
    }
    return {"model": preset} | measured


def private_memory(action, presets, options):
    """
    Peak of private memory beyond the imports, in GB: of a training step of 8 with gradients, without an optimizer, or
    of the first image under a speed preset, guided, its compilation included.
    """
    return {
        preset: {option: (run_action(action, preset, option) - imported()) / 1e9 for option in options}
        for preset in presets
    }


def run_action(action, what="", option="", kinds=("RssAnon",)):
    """Peak of memory of one of `ACTIONS` in a separate interpreter."""
    return peak_memory([sys.executable, "-c", ACTIONS, action, what, option], kinds)


@cache
def imported(kinds=("RssAnon",)):
    """What the imports take."""
    return run_action("nothing", kinds=kinds)


def first_pass(folder, name):
    """Loads a model and calls it once: weights are mapped from the file, and read when they are used."""
    model = CLASS[name].from_pretrained(folder, torch_dtype=torch.float32)
    with torch.no_grad():
        model(torch.randn(1, 4, 32, 32), torch.tensor([500]), class_labels=torch.tensor([1]))


def save_int8(source, target):
    """Saves an int8 copy with diffusers' quantization config, as the guide on speed tells."""
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    config = TorchAoConfig(Int8DynamicActivationInt8WeightConfig(), modules_to_not_convert=["time_embed", "proj_out"])
    model = DiTTransformer2DModel.from_pretrained(source, torch_dtype=torch.float32, quantization_config=config)
    model.save_pretrained(target, max_shard_size="100GB")


def folder_size(folder):
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def measure_memory(preset, seconds):
    with tempfile.TemporaryDirectory() as folder:
        return memory(preset, Path(folder), seconds)


def _line(row):
    name = f"{row.get('model', '')} {row.get('pixels', '')} batch {row.get('batch', '')}"
    shares = {key: row[key] for key in row if key.startswith("share")}
    share = " ".join(f"{value:.0%} of peak" for value in shares.values())
    return f"{name}: stock {row['stock']['seconds']:.3f} s, ours {row['ours']['ratio']:.3f} of it {share}"
