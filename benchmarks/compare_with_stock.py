#!/usr/bin/env python
"""Measures what diffusers' own DiT computes differently from ours; the README's table holds these values.

    python benchmarks/compare_with_stock.py

Expected: half a minute on 2 cores. Everything is run, nothing is quoted.
"""

import json
from importlib.metadata import version

import torch
from diffusers import AutoencoderKL, DiTPipeline, EulerDiscreteScheduler
from diffusers import DiTTransformer2DModel as StockDiT

from dit_hf import DiTClassCondPipeline, DiTTransformer2DModel, make_scheduler


TINY = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "num_attention_heads": 4}
STOCK_TINY = TINY | {"attention_head_dim": 12, "out_channels": 8, "norm_type": "ada_norm_zero"}
STOCK_TINY |= {"num_embeds_ada_norm": 1000, "activation_fn": "gelu-approximate"}


def stock_model(**overrides):
    torch.manual_seed(0)
    return StockDiT(**(STOCK_TINY | overrides)).eval()


def our_model(**overrides):
    torch.manual_seed(0)
    return DiTTransformer2DModel(**(TINY | {"attention_head_dim": 12} | overrides)).eval()


def timestep_embedding_errors():
    """Relative error of the sinusoidal embedding against cos and sin of t · 10000^(-k/128), DiT's own."""
    stock = stock_model().transformer_blocks[0].norm1.emb.time_proj
    ours = our_model().time_proj
    errors = {}
    for timestep in (100, 500, 999):
        angles = timestep * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
        true = torch.cat([angles.cos(), angles.sin()])
        errors[timestep] = [
            ((embed(torch.tensor([timestep]))[0].double() - true).norm() / true.norm()).item()
            for embed in (stock, ours)
        ]
    return {timestep: dict(zip(("stock", "ours"), pair, strict=True)) for timestep, pair in errors.items()}


def xl2_parameters():
    """Millions of parameters of DiT-XL/2, counted without allocating them."""
    with torch.device("meta"):
        size = {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "sample_size": 32}
        counts = {
            "stock": stock_model(**size).num_parameters(),
            "ours": DiTTransformer2DModel.from_preset("DiT-XL/2").num_parameters(),
        }
    return {name: round(count / 1e6, 2) for name, count in counts.items()}


def null_labels(model, tables, null_class, samples):
    """For every look-up in a label table during one training forward: which samples' labels were dropped."""
    seen = []
    for table in tables:
        table.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0] == null_class))
    labels = torch.zeros(samples, dtype=torch.long)
    with torch.no_grad():
        model.train()(hidden_states=torch.zeros(samples, 4, 2, 2), timestep=torch.zeros(samples), class_labels=labels)
    return torch.stack(seen)


def label_dropout(samples=4096):
    """Look-ups a forward, and the fractions of samples that mix real and null labels or are wholly unconditional."""
    stock, ours = stock_model(num_layers=28), our_model(num_layers=28)
    embedders = [module for module in stock.modules() if type(module).__name__ == "LabelEmbedding"]
    tables = {"stock": (stock, [module.embedding_table for module in embedders]), "ours": (ours, [ours.class_embed])}
    result = {}
    for name, (model, table) in tables.items():
        null = null_labels(model, table, 1000, samples)
        mixed = null.any(dim=0) & ~null.all(dim=0)
        shares = {"mixed": mixed, "unconditional": null.all(dim=0)}
        result[name] = {"draws": len(null)} | {key: round(v.float().mean().item(), 3) for key, v in shares.items()}
    return result


def outcome(action):
    """What an action gives: its result, or the error's name."""
    try:
        with torch.no_grad():
            return action()
    except Exception as error:
        return type(error).__name__


def class_counts_and_sizes():
    """Ten classes, and latents that are not square."""
    label, wide, narrow = torch.tensor([3]), torch.zeros(1, 4, 8, 16), torch.zeros(1, 4, 4, 16)
    ten = stock_model(num_embeds_ada_norm=10)
    ours = our_model(num_classes=10)
    return {
        "null class of 10 classes": {
            "stock": outcome(
                lambda: ten(label_input(), torch.tensor([1]), class_labels=torch.tensor([1000])) and "runs"
            ),
            "ours": outcome(lambda: ours(label_input(), 1, torch.tensor([10])) and "runs"),
        },
        "8×16 latents": {
            "stock": outcome(lambda: list(stock_model()(wide, torch.tensor([1]), class_labels=label).sample.shape)),
            "ours": outcome(lambda: list(our_model()(wide, 1, label).sample.shape)),
        },
        "4×16 latents": {
            "stock": outcome(lambda: list(stock_model()(narrow, torch.tensor([1]), class_labels=label).sample.shape)),
            "ours": outcome(lambda: list(our_model()(narrow, 1, label).sample.shape)),
        },
    }


def label_input():
    return torch.zeros(1, 4, 8, 8)


def pipelines():
    """A learned variance, and a scheduler that starts from a larger noise."""
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    learned = make_scheduler("ddpm")
    stock = DiTPipeline(stock_model(), vae, learned)
    ours = DiTClassCondPipeline(our_model(), learned, vae)
    stock.set_progress_bar_config(disable=True)
    ours.set_progress_bar_config(disable=True)
    start = {name: std_of_first_input(pipe) for name, pipe in (("stock", stock), ("ours", ours))}
    return {
        "learned variance": {
            "stock": outcome(lambda: stock([1], num_inference_steps=2, output_type="pt") and "runs"),
            "ours": outcome(lambda: ours([1], num_inference_steps=2, output_type="pt") and "runs"),
        },
        "Euler: std of the model's first input, 1 is right": start,
        "get_label_ids of one name": {
            "stock": outcome(lambda: labelled(DiTPipeline, stock).get_label_ids("goldfish")),
            "ours": outcome(lambda: labelled(DiTClassCondPipeline, ours).get_label_ids("goldfish")),
        },
    }


def std_of_first_input(pipe):
    """What the model gets at an Euler sampler's first step; it was trained on inputs of standard deviation 1."""
    seen, scheduler = [], pipe.scheduler

    def record(module, args, kwargs):
        seen.append((args[0] if args else kwargs["hidden_states"]).std().item())

    handle = pipe.transformer.register_forward_pre_hook(record, with_kwargs=True)
    pipe.scheduler = EulerDiscreteScheduler.from_config(scheduler.config)
    pipe([1] * 4, num_inference_steps=2, guidance_scale=1.0, output_type="pt", generator=torch.manual_seed(0))
    pipe.scheduler = scheduler
    handle.remove()
    return round(seen[0], 3)


def labelled(pipeline_class, pipe):
    return pipeline_class(pipe.transformer, vae=pipe.vae, scheduler=pipe.scheduler, id2label={1: "goldfish"})


def measure():
    """Everything, as one dictionary."""
    return {
        "relative error of the timestep embedding": timestep_embedding_errors(),
        "DiT-XL/2 parameters (M)": xl2_parameters(),
        "label dropout": label_dropout(),
        **class_counts_and_sizes(),
        **pipelines(),
        "versions": {name: version(name) for name in ("torch", "diffusers")},
    }


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2, ensure_ascii=False))
