#!/usr/bin/env python
"""Trains a class-conditional DiT on the latents of an image dataset, and writes a pipeline folder.

    accelerate launch examples/train_class_cond/train_dit.py --dataset_name outputs/emoji64 --vae outputs/autoencoder/vae \
        --transformer_config examples/train_class_cond/emoji64.json --output_dir outputs/dit

Expected: 0.62 s a step of 64 samples on 2 cores; times and figures of the bundled model are in docs/log.md. Run the same
command again to resume.

Shapes: `B` samples of a step, `C` latent channels, `h w` latent size.
"""

import json
import math
import shutil
import statistics
import time
from contextlib import contextmanager, nullcontext
from copy import copy

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from arguments import MAY_CHANGE, RECIPE_ON_CARD, parse_args
from diffusers import AutoencoderKL
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from safetensors.torch import load_file
from tqdm import tqdm

from dit_hf import DiTClassCondPipeline, DiTTransformer2DModel, make_scheduler
from dit_hf.command_line import run
from dit_hf.complexity import count_macs
from dit_hf.data.images import label_names, load_image_dataset, stack_images
from dit_hf.data.latents import cache_latents, latent_statistics, normalise_latents
from dit_hf.hub import CardFacts, publish_folder
from dit_hf.seeds import seeded_generator
from dit_hf.training.batches import SeededBatches
from dit_hf.training.checkpointing import (
    check_same_settings,
    list_checkpoints,
    resume_from,
    save_checkpoint,
    truncate_log,
)
from dit_hf.training.finetuning import load_for_classes
from dit_hf.training.guard import LossGuard
from dit_hf.training.lora import add_lora, save_lora
from dit_hf.training.losses import diffusion_loss, min_snr_weight, velocity_loss
from dit_hf.training.running import StopRequest, only_run


def load_latents(args, dataset, vae, accelerator):
    """The cached posteriors, normalised by statistics that are then in the VAE's config."""
    with accelerator.main_process_first():
        images = stack_images(dataset, args.resolution, args.image_column)
        labels = torch.tensor(dataset[args.label_column])
        cached = load_file(cache_latents(vae, images, labels, args.output_dir / "latents"))
    mean, std = latent_statistics(cached["mean"], cached["std"])
    vae.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=1.0, shift_factor=None)
    for suffix in ("", "_flipped"):
        cached["mean" + suffix] = normalise_latents(cached["mean" + suffix], mean, std)
        cached["std" + suffix] = cached["std" + suffix] / torch.tensor(std).view(1, -1, 1, 1)
    return cached


def draw_batch(latents, batches, step, args):
    """All random choices of one step, `(B, C, h, w)` and `(B,)`, over all processes; a function of (seed, step)."""
    indices, generator = batches.indices(step), batches.generator(step)
    flipped = (torch.rand(len(indices), generator=generator) < args.flip_probability)[:, None, None, None]
    mean = torch.where(flipped, latents["mean_flipped"][indices], latents["mean"][indices])
    std = torch.where(flipped, latents["std_flipped"][indices], latents["std"][indices])
    x_start = mean + std * torch.randn(mean.shape, generator=generator)
    noise = torch.randn(mean.shape, generator=generator)
    dropped = torch.rand(len(indices), generator=generator) < args.class_dropout_prob
    if args.objective == "epsilon":
        time_draw = torch.randint(0, 1000, (len(indices),), generator=generator)
    elif args.time_sampling == "uniform":
        time_draw = torch.rand(len(indices), generator=generator)
    else:
        time_draw = torch.randn(len(indices), generator=generator).sigmoid()
    return {"x_start": x_start, "noise": noise, "time": time_draw, "label": latents["label"][indices], "drop": dropped}


def batch_loss(transformer, batch, scheduler, args):
    """The loss a sample, `(B,)`: the paper's on noisy latents, or flow matching on interpolated ones."""
    x_start, noise, time_draw = batch["x_start"], batch["noise"], batch["time"]
    if args.objective == "epsilon":
        noisy, timestep = scheduler.add_noise(x_start, noise, time_draw), time_draw
    else:
        sigma = time_draw[:, None, None, None]
        noisy, timestep = (1 - sigma) * x_start + sigma * noise, time_draw * 1000
    dropped = batch["drop"] if batch["drop"].any() else None  # a model without null class takes none
    output = transformer(noisy, timestep, batch["label"], force_drop_ids=dropped, return_dict=False)[0]
    if args.objective == "epsilon":
        terms = diffusion_loss(output, x_start, noise, time_draw, scheduler)
        if args.snr_gamma is None:
            return terms["loss"]
        return min_snr_weight(time_draw, scheduler, args.snr_gamma) * terms["mse"] + terms.get("vb", 0.0)
    terms = velocity_loss(output, x_start, noise)
    return terms["loss"] + terms["cosine"] if args.cosine_loss else terms["loss"]


def build_pipeline(transformer, vae, names, objective):
    """The pipeline that is sampled while training and saved at the end."""
    scheduler = make_scheduler("flow_euler" if objective == "velocity" else "ddpm")
    if objective == "epsilon" and not transformer.config.learn_sigma:
        scheduler = make_scheduler("ddpm", variance_type="fixed_large")
    pipe = DiTClassCondPipeline(transformer, scheduler, vae, id2label=dict(enumerate(names)))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_samples(pipe, args, path):
    """A grid with one row a class, the same noise every time."""
    classes = list(pipe.id2label)[: args.validation_classes]
    columns = args.validation_images_per_class
    generators = [seeded_generator(args.seed, index) for index in range(len(classes) * columns)]
    images = pipe(
        classes,
        num_images_per_label=columns,
        generator=generators,
        guidance_scale=args.guidance_scale if args.class_dropout_prob else 1.0,
        num_inference_steps=args.validation_inference_steps,
    ).images
    path.parent.mkdir(parents=True, exist_ok=True)
    make_image_grid(images, rows=len(classes), cols=columns).save(path)


def build_transformer(args, vae, names):
    """A model for the dataset's classes and the VAE's latents, fresh or from given weights, with adapters if asked."""
    levels = len(vae.config.block_out_channels)
    config = {
        "sample_size": args.resolution // 2 ** (levels - 1),
        "in_channels": vae.config.latent_channels,
        "num_classes": len(names),
        "class_dropout_prob": args.class_dropout_prob,
        "learn_sigma": args.objective == "epsilon",
    }
    if args.pretrained_model_name_or_path:
        model = load_for_classes(args.pretrained_model_name_or_path, names, args.class_dropout_prob)
        for name in ("sample_size", "in_channels", "learn_sigma"):
            if model.config[name] != config[name]:
                raise ValueError(
                    f"{args.pretrained_model_name_or_path} has {name}={model.config[name]}, where the data, the VAE and "
                    f"--objective {args.objective} need {config[name]}."
                )
        if args.lora_rank is not None:
            add_lora(model, args.lora_rank, args.lora_alpha or args.lora_rank)
        return model
    if args.lora_rank is not None:
        raise ValueError("--lora_rank adapts given weights; say which with --pretrained_model_name_or_path.")
    if args.preset:
        return DiTTransformer2DModel.from_preset(args.preset, **config)
    given = json.loads(args.transformer_config.read_text())
    if clash := sorted(config.keys() & given.keys()):
        raise ValueError(f"--transformer_config sets {', '.join(clash)}, which data, VAE and flags decide here.")
    return DiTTransformer2DModel(**(config | given))


def backward(args, accelerator, transformer, batch, scheduler):
    """Gradients of the mean loss of this process's share, in micro-batches; returns the mean over all processes."""
    per_process = args.train_batch_size // accelerator.num_processes
    first = accelerator.process_index * per_process
    micro = per_process // args.gradient_accumulation_steps
    total = torch.zeros((), device=accelerator.device)
    for start in range(first, first + per_process, micro):
        part = {name: values[start : start + micro].to(accelerator.device) for name, values in batch.items()}
        is_last = start + micro == first + per_process
        with nullcontext() if is_last else accelerator.no_sync(transformer):
            loss = batch_loss(transformer, part, scheduler, args).sum() / per_process
            accelerator.backward(loss)
        total += loss.detach()
    return accelerator.reduce(total, "mean").item()


def train(args, accelerator, transformer, optimizer, lr_schedule, ema, guard, latents, pipe):
    """The loop; returns when `max_train_steps` are done, or SIGTERM came, and the last checkpoint is written."""
    labels = latents["label"]
    batches = SeededBatches(len(labels), args.train_batch_size, args.seed, labels if args.balance_classes else None)
    scheduler = make_scheduler("ddpm")
    unwrapped = accelerator.unwrap_model(transformer, keep_torch_compile=False)
    stop = StopRequest()
    log = args.output_dir / "train_log.jsonl"
    step = resume_from(accelerator, args.output_dir)
    if accelerator.is_main_process:
        truncate_log(log, step)
    progress = tqdm(total=args.max_train_steps, initial=step, mininterval=10, disable=not accelerator.is_main_process)
    started = time.time()
    while step < args.max_train_steps:
        loss = backward(
            args, accelerator, transformer, draw_batch(latents, batches, step + guard.draw_offset, args), scheduler
        )
        gradient_norm = float(accelerator.clip_grad_norm_(transformer.parameters(), args.max_grad_norm))
        verdict = guard.judge(step + 1, loss, gradient_norm)
        if verdict == "rewind" and list_checkpoints(args.output_dir):
            optimizer.zero_grad()
            step = rewind(accelerator, args.output_dir, guard, step + 1)
            if accelerator.is_main_process:
                truncate_log(log, step)
            continue
        if verdict == "step":
            optimizer.step()
            ema.step(trainable(unwrapped))
        elif accelerator.scaler is not None and not math.isfinite(gradient_norm):
            optimizer.step()  # fp16: changes no weight, and lowers the scale of the loss
        lr_schedule.step()
        optimizer.zero_grad()
        step += 1
        progress.update()
        if accelerator.is_main_process:
            record = {"step": step, "loss": loss, "grad_norm": gradient_norm, "lr": lr_schedule.get_last_lr()[0]}
            record |= {"seconds": round(time.time() - started, 2)} | ({"skipped": True} if verdict != "step" else {})
            with open(log, "a") as file:
                file.write(json.dumps(record) + "\n")
        # Every process has to leave at the same step.
        stopping = accelerator.reduce(torch.tensor(float(stop.requested), device=accelerator.device), "sum") > 0
        finished = step == args.max_train_steps
        if step % args.checkpointing_steps == 0 or finished or stopping:
            save_checkpoint(accelerator, args.output_dir, step, args.checkpoints_total_limit)
        if stopping and not finished:
            break
        if accelerator.is_main_process and (step % args.validation_steps == 0 or finished):
            with ema_weights(ema, unwrapped):
                write_samples(pipe, args, args.output_dir / "samples" / f"step-{step:06d}.png")
            progress.write(json.dumps(record))
    return step


def rewind(accelerator, output_dir, guard, from_step):
    """Back to the last checkpoint, and on with other batches."""
    before = copy(guard)
    step = resume_from(accelerator, output_dir)
    guard.rewound(from_step, step, before)
    return step


def trainable(transformer):
    """All parameters, or the adapters'."""
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


@contextmanager
def ema_weights(ema, transformer):
    """The averaged weights in the model's place, in eval mode, until the block ends."""
    ema.store(trainable(transformer))
    ema.copy_to(trainable(transformer))
    transformer.eval()
    try:
        yield
    finally:
        transformer.train()
        ema.restore(trainable(transformer))


def print_plan(args, accelerator, transformer):
    """What a run would take: size, compute, memory that is there from the first step, hours by three timed steps."""
    config, count = transformer.config, args.train_batch_size
    latents = torch.randn(2, count, config.in_channels, config.sample_size, config.sample_size)
    batch = {"x_start": latents[0], "noise": latents[1], "time": torch.rand(count), "drop": torch.zeros(count).bool()}
    batch["label"] = torch.zeros(count, dtype=torch.int64)
    if args.objective == "epsilon":
        batch["time"] = (batch["time"] * 1000).long()
    prepared = accelerator.prepare(transformer)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        backward(args, accelerator, prepared, batch, make_scheduler("ddpm"))
        seconds.append(time.perf_counter() - started)
    step = statistics.median(seconds[1:])  # the first one warms up
    trained = sum(parameter.numel() for parameter in trainable(transformer))
    plan = {
        "parameters (M)": round(transformer.num_parameters() / 1e6, 2),
        "trained (M)": round(trained / 1e6, 2),
        "Gflops a sample, forward": round(count_macs(config) / 1e9, 3),
        # Weights; gradients, two moments and the average of what is trained; float32.
        "memory without activations (GB)": round(4 * (transformer.num_parameters() + 4 * trained) / 1e9, 3),
        "steps": args.max_train_steps,
        "seconds a step, forward and backward": round(step, 3),
        "hours": round(step * args.max_train_steps / 3600, 2),
    }
    accelerator.print(json.dumps(plan, indent=2))


def save_result(pipe, args, guard):
    """The pipeline folder with its card and last sample grid, and if asked its copy on the Hub; or the adapters."""
    if args.lora_rank is not None:
        print(f"Adapters: {save_lora(pipe.transformer, args.output_dir)}")
        return
    folder = args.output_dir / "pipeline"
    folder.mkdir(exist_ok=True)
    grid = args.output_dir / "samples" / f"step-{args.max_train_steps:06d}.png"
    if grid.exists():
        shutil.copyfile(grid, folder / "samples.png")
    recipe = {name: value for name, value in vars(args).items() if name in RECIPE_ON_CARD}
    facts = CardFacts(recipe=recipe | {"steps left out by the guard": guard.skipped})
    pipe.save_pretrained(folder, card=facts)
    print(f"Pipeline: {folder}")
    if args.push_to_hub:
        print(f"Published: {publish_folder(folder, args.hub_model_id or args.output_dir.resolve().name, pipe, facts)}")


def check_batch(args, num_processes):
    """That processes and micro-batches share a batch evenly."""
    parts = num_processes * args.gradient_accumulation_steps
    if args.gradient_accumulation_steps < 1 or args.train_batch_size % parts:
        raise ValueError(
            f"--train_batch_size {args.train_batch_size} can't be shared by {num_processes} processes with "
            f"--gradient_accumulation_steps {args.gradient_accumulation_steps}."
        )


def main():
    args = parse_args(__doc__.splitlines()[0])
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    check_batch(args, accelerator.num_processes)
    with only_run(args.output_dir) if accelerator.is_main_process and not args.dry_run else nullcontext():
        run_training(args, accelerator)


def run_training(args, accelerator):
    """From the arguments to the published model."""
    if accelerator.is_main_process:
        print(json.dumps(vars(args), indent=2, default=str))
    set_seed(args.seed)
    vae = AutoencoderKL.from_pretrained(args.vae).to(accelerator.device).eval().requires_grad_(False)
    dataset = load_image_dataset(args.dataset_name, args.split)
    names = label_names(dataset, args.label_column)
    transformer = build_transformer(args, vae, names).to(accelerator.device).train()
    if accelerator.is_main_process:
        config = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
        if not args.dry_run:
            check_same_settings(args.output_dir, vars(args) | {"transformer": config}, MAY_CHANGE)
        print(
            f"{transformer.num_parameters() / 1e6:.2f} M parameters, {len(names)} classes, "
            f"{accelerator.num_processes} processes"
        )
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if args.dry_run:
        return print_plan(args, accelerator, transformer)
    latents = load_latents(args, dataset, vae, accelerator)

    betas = (0.9, args.adam_beta2)
    optimizer = torch.optim.AdamW(
        trainable(transformer), lr=args.learning_rate, betas=betas, weight_decay=args.weight_decay, fused=True
    )
    lr_schedule = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    guard = LossGuard(args.on_spike)
    ema = EMAModel(trainable(transformer), decay=args.ema_decay, use_ema_warmup=True, power=0.75)
    transformer, optimizer = accelerator.prepare(transformer, optimizer)
    accelerator.register_for_checkpointing(ema, lr_schedule, guard)
    unwrapped = accelerator.unwrap_model(transformer, keep_torch_compile=False)
    pipe = build_pipeline(unwrapped, vae, names, args.objective)
    step = train(args, accelerator, transformer, optimizer, lr_schedule, ema, guard, latents, pipe)
    if step < args.max_train_steps:
        accelerator.print(f"Stopped at step {step} by SIGTERM; the same command goes on from there.")
    elif accelerator.is_main_process:
        with ema_weights(ema, unwrapped):
            save_result(pipe, args, guard)
    accelerator.end_training()


if __name__ == "__main__":
    run(main)
