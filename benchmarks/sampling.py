"""Time and quality of sampling: diffusers' DiTPipeline and ours on the bundled weights, setting by setting.

The bundled model is sampled by jumps, with guidance in its weights, and by its velocity as an ordinary flow-matching
model. DDIM of such a model is the first-order solver: 50 steps of it, guided at 5, are the baseline. The stock
pipeline gets the same weights in its own format, with its timestep embedding set right and the latents' statistics
inside the decoder, so that it generates the same images.
"""

import copy
import sys
from functools import partial
from typing import NamedTuple

import torch
from diffusers import DiTPipeline, FirstBlockCacheConfig, TaylorSeerCacheConfig
from diffusers import DiTTransformer2DModel as StockDiT
from timing import compare

from dit_hf import DiTClassCondPipeline, make_scheduler, optimize
from dit_hf.checkpoints.diffusers_dit import DIFFUSERS, stock_config
from dit_hf.data.fingerprints import checksum
from dit_hf.evaluation.extractors import Features, extract, load_extractor
from dit_hf.evaluation.metrics import compute_metrics
from dit_hf.evaluation.samples import sample_images
from dit_hf.evaluation.sources import ImageSource
from dit_hf.optimization import (
    SPEED_PRESETS,
    compile_network,
    compiled_networks,
    quantize_blocks,
    use_modulation_table,
)
from dit_hf.training.finetuning import drop_interval


GUIDANCE = 5.0
METRICS = ["fd_efficientnet_lite0", "kid", "precision", "recall"]
DDIM = {"solver_order": 1}
ALL = (0.0, 1.0)


class Setting(NamedTuple):
    """How to sample: solver with its options, steps, guidance interval, what is switched on."""

    solver: str = "flow_dpm++"
    options: dict = DDIM
    steps: int = 50
    interval: tuple[float, float] = ALL
    on: str = ""


_BALANCED, _FASTEST = SPEED_PRESETS["balanced"], SPEED_PRESETS["fastest"]
SETTINGS = {
    "DDIM": Setting(),
    "DDIM, modulation ahead": Setting(on="table"),
    "DDIM, compiled (exact)": Setting(on="exact"),
    "DDIM, int8": Setting(on="int8 eager"),
    "DDIM, int8 compiled (int8)": Setting(on="int8"),
    "DDIM, bfloat16 compiled": Setting(on="bfloat16"),
    "DDIM, guided halves in two calls": Setting(on="two calls"),
    "DDIM, guided in (0, 0.5)": Setting(interval=(0.0, 0.5)),
    "DDIM, first-block cache 0.1": Setting(on="first block"),
    "DDIM, TaylorSeer every 4th": Setting(on="taylorseer"),
    "DDIM, 18 steps": Setting(steps=18),
    "DDIM, 13 steps": Setting(steps=13),
    "DPM-Solver++, 12 steps": Setting(options={}, steps=12),
    "UniPC, 12 steps": Setting("flow_unipc", {}, 12),
    "UniPC, 8 steps": Setting("flow_unipc", {}, 8),
    "UniPC, 8 steps, shift 0.7": Setting("flow_unipc", {"flow_shift": 0.7}, 8),
    "UniPC, 8 steps, shift 1.5": Setting("flow_unipc", {"flow_shift": 1.5}, 8),
    "UniPC, 6 steps": Setting("flow_unipc", {}, 6),
    "UniPC, 5 steps": Setting("flow_unipc", {}, 5),
    "balanced, eager float32": Setting("flow_unipc", {}, _BALANCED.num_inference_steps, _BALANCED.guidance_interval),
    "balanced": Setting("flow_unipc", {}, _BALANCED.num_inference_steps, _BALANCED.guidance_interval, "balanced"),
    "fastest, eager float32": Setting("flow_unipc", {}, _FASTEST.num_inference_steps, _FASTEST.guidance_interval),
    "fastest": Setting("flow_unipc", {}, _FASTEST.num_inference_steps, _FASTEST.guidance_interval, "fastest"),
    "fastest, int8": Setting("flow_unipc", {}, _FASTEST.num_inference_steps, _FASTEST.guidance_interval, "int8"),
    "4 jumps, eager float32": Setting("flow_lcm", {}, 4),
    "4 jumps": Setting("flow_lcm", {}, 4, on="fastest"),
    "2 jumps": Setting("flow_lcm", {}, 2, on="fastest"),
    "1 jump": Setting("flow_lcm", {}, 1, on="fastest"),
}
# Those that only round differently from another row have its values of quality.
ROUNDING = {
    "DDIM, modulation ahead": "DDIM",
    "DDIM, compiled (exact)": "DDIM",
    "DDIM, guided halves in two calls": "DDIM",
    "DDIM, int8": "DDIM, int8 compiled (int8)",
}


def build(setting: Setting, device: torch.device) -> DiTClassCondPipeline:
    """The bundled pipeline under a setting; without its jumps for samplers of the velocity."""
    pipe = DiTClassCondPipeline.from_bundled("emoji64").to(device)
    pipe.set_progress_bar_config(disable=True)
    if setting.solver != "flow_lcm":
        pipe.transformer = drop_interval(pipe.transformer)
    pipe.scheduler = make_scheduler(setting.solver, **setting.options)
    if setting.on in SPEED_PRESETS:
        optimize(pipe, setting.on)  # with its own solver, if it has one
    elif setting.on == "bfloat16":
        for network in compiled_networks(pipe):
            compile_network(network, device.type, bfloat16=True)
    elif setting.on == "int8 eager":
        quantize_blocks(pipe.transformer)
    elif setting.on == "table":
        use_modulation_table(pipe)
    elif setting.on == "two calls":
        pipe.transformer.forward = partial(in_two_calls, pipe.transformer.forward)
    elif setting.on == "first block":
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    elif setting.on == "taylorseer":
        pipe.transformer.enable_cache(TaylorSeerCacheConfig(cache_interval=4, disable_cache_before_step=3))
    return pipe


def in_two_calls(forward, hidden_states, timestep, class_labels, return_dict):
    """A guided step's unconditional rows, then its conditional ones."""
    halves = [each.chunk(2) for each in (hidden_states, timestep, class_labels)]
    return (torch.cat([forward(*half, return_dict=False)[0] for half in zip(*halves, strict=True)]),)


def call(setting: Setting) -> dict:
    """What the pipeline is called with under a setting."""
    return {
        "guidance_scale": 1.0 if setting.solver == "flow_lcm" else GUIDANCE,
        "num_inference_steps": setting.steps,
        "guidance_interval": setting.interval,
    }


def stock_pipeline(device: torch.device) -> DiTPipeline:
    """diffusers' DiTPipeline with the bundled velocity and its first 1,000 classes, generating what ours generates."""
    pipe = DiTClassCondPipeline.from_bundled("emoji64")
    ours = drop_interval(pipe.transformer)
    weights = dict(ours.state_dict())
    table = torch.zeros(1001, weights["class_embed.weight"].shape[1])  # 1000 is the only null class it knows
    table[:1000], table[1000] = weights["class_embed.weight"][:1000], weights["class_embed.weight"][-1]
    weights["class_embed.weight"] = table
    layers = ours.config.num_layers
    config = stock_config(dict(ours.config)) | {"num_embeds_ada_norm": 1000, "norm_type": "ada_norm_zero"}
    stock = StockDiT(**config, activation_fn="gelu-approximate").eval()
    stock.load_state_dict(DIFFUSERS.to_original(weights, {"num_layers": layers}), strict=False)
    for block in stock.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    vae = copy.deepcopy(pipe.vae)
    mean, std = (torch.tensor(vae.config[name]) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        layer = vae.post_quant_conv
        layer.bias += layer.weight[:, :, 0, 0] @ mean
        layer.weight *= std.view(1, -1, 1, 1)
    stock_pipe = DiTPipeline(stock, vae, make_scheduler("flow_dpm++", **DDIM)).to(device)
    stock_pipe.set_progress_bar_config(disable=True)
    return stock_pipe


def draw_stock(pipe, labels, generator=None, steps=50):
    call = {"guidance_scale": GUIDANCE, "num_inference_steps": steps, "output_type": "np"}
    return pipe(labels, generator=generator, **call).images


def times(device, seconds, names, quick=False, batches=(1, 8)):
    """Seconds a call of every setting over the stock pipeline's, and that both generate the same."""
    stock = stock_pipeline(device)
    chosen = {name: SETTINGS[name] for name in ("DDIM", *names)}  # the baseline always
    chosen = dict(list(chosen.items())[:2]) if quick else chosen
    pipes = {name: build(setting, device) for name, setting in chosen.items()}
    found = {}
    for batch in batches[: 1 if quick else None]:
        labels = [index % 9 for index in range(batch)]
        candidates = {"stock": partial(draw_stock, stock, labels)}
        for name, setting in chosen.items():
            candidates[name] = partial(pipes[name], labels, **call(setting), output_type="np")
        found[str(batch)] = compare(candidates, device, seconds * len(candidates), least=3)
        for name, row in found[str(batch)].items():
            print(f"batch {batch}, {name}: {1 / row['ratio']:.2f} times as fast", file=sys.stderr, flush=True)
    seeds = [torch.Generator(device).manual_seed(0) for _ in range(2)]
    few = SETTINGS["DDIM"]._replace(steps=10)  # each step amplifies rounding
    ours = pipes["DDIM"]([0, 3], **call(few), generator=seeds[0], output_type="np").images
    difference = float(abs(ours - draw_stock(stock, [0, 3], seeds[1], few.steps)).max())
    return {"rows": found, "largest_difference_of_pixels": difference}


def growth(device, seconds, quick=False):
    """How a call grows with images, steps and size, over its own smallest."""
    small = {"class_labels": [0], "num_inference_steps": 8, "height": 64, "width": 64}
    changes = {"1 image, 8 steps, 64 px": {}}
    changes |= {f"{count} images": {"class_labels": [0] * count} for count in (2, 8, 32)}
    changes |= {f"{steps} steps": {"num_inference_steps": steps} for steps in (16, 32)}
    changes |= {f"{size} px": {"height": size, "width": size} for size in (128, 256)}
    if quick:
        changes = dict(list(changes.items())[:2])
    pipe = build(SETTINGS["DDIM"], device)
    candidates = {
        cell: partial(pipe, **(small | change), guidance_scale=GUIDANCE, output_type="np")
        for cell, change in changes.items()
    }
    return {"rows": compare(candidates, device, seconds * len(candidates), least=3)}


def quality(device, reference, num_samples, names, known, save, quick=False):
    """
    Fréchet distance and more of every setting's samples to held-out images with the same class frequencies. `save` is
    given what there is after each setting; what `known`, an earlier run, has of the same setting is not measured
    again.
    """
    source = ImageSource(reference)
    extractor = load_extractor("efficientnet-lite0")
    held_out = Features.join([extract(batch, extractor) for batch in source.batches()])
    pipe = build(Setting(), device)
    classes = [pipe.labels[name] for name in source.labels()]
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor(classes).repeat(1 + num_samples // len(classes))[:num_samples][order]
    # The baseline's images are generated compiled, which only rounds differently.
    chosen = {"DDIM": SETTINGS["DDIM" if quick else "DDIM, compiled (exact)"]}
    stand_ins = [ROUNDING.get(name, name) for name in names]
    chosen |= {name: SETTINGS[name] for name in stand_ins if name != "DDIM"}
    found = {
        "num_samples": num_samples,
        "extractor": "efficientnet-lite0",
        "seed": 0,
        "held_out": len(held_out.features),
        "images": source.digest()[:12],
        "weights": [checksum(network)[:12] for network in (pipe.transformer, pipe.vae)],
    }
    same = all(known.get(key) == value for key, value in found.items())
    rows = found["rows"] = dict(known["rows"]) if same else {}
    for name, setting in chosen.items():
        recipe = setting._asdict() | {"interval": list(setting.interval)}  # as JSON gives it back
        if setting.on in SPEED_PRESETS:
            preset = SPEED_PRESETS[setting.on]
            solver = None if setting.solver == "flow_lcm" else preset.solver
            recipe["on"] = f"{setting.on}: {preset.precision}, {solver}"
        if rows.get(name, {}).get("setting") == recipe:
            continue
        images = sample_images(build(setting, device), labels, 0, min(100, num_samples), **call(setting))
        figures = compute_metrics(extract(images, extractor), held_out, METRICS)
        rows[name] = {"setting": recipe} | {metric: figures[metric]["value"] for metric in METRICS}
        print(name, {metric: rows[name][metric] for metric in METRICS}, file=sys.stderr, flush=True)
        save(found)
    return found
