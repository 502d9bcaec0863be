#!/usr/bin/env python
"""Trains a class-conditional DiT on the latents of an image dataset, and writes a pipeline folder.

    accelerate launch examples/train_class_cond/train_dit.py --dataset_name outputs/emoji64 --vae outputs/autoencoder/vae \
        --transformer_config examples/train_class_cond/emoji64.json --output_dir outputs/dit

Expected: 0.62 s a step of 64 samples on 2 cores; times and figures of the bundled model are in docs/log.md. Run the same
command again to resume.
"""

import json
import math
import shutil
import time
from contextlib import nullcontext
from copy import copy

import torch
from accelerate.utils import DistributedType, set_seed
from arguments import MAY_CHANGE, RECIPE_ON_CARD, parse_args
from diffusers.optimization import get_scheduler
from huggingface_hub import EvalResult
from preparation import (
    build_transformer,
    find_data,
    image_resolution,
    load_vae,
    open_latents,
    trained_scheduler,
    validation_images,
)
from tqdm import tqdm

from dit_hf import DiTClassCondPipeline, DiTTransformer2DModel
from dit_hf.command_line import run
from dit_hf.evaluation.extractors import extract, load_extractor
from dit_hf.evaluation.frechet import frechet_distance
from dit_hf.evaluation.metrics import gaussian
from dit_hf.evaluation.samples import sample_images
from dit_hf.hub import BackgroundUploads, CardFacts, publish_folder
from dit_hf.training.alignment import AlignmentHead, load_encoder
from dit_hf.training.batches import SeededBatches
from dit_hf.training.checkpointing import (
    check_same_settings,
    list_checkpoints,
    record_settings,
    resume_from,
    save_checkpoint,
    truncate_log,
)
from dit_hf.training.ema import PowerAverages, WeightAverage
from dit_hf.training.finetuning import parameter_groups
from dit_hf.training.guard import LossGuard
from dit_hf.training.lora import save_lora
from dit_hf.training.objectives import Objective, draw_batch
from dit_hf.training.plan import training_plan
from dit_hf.training.running import StopRequest, only_run, start_accelerator
from dit_hf.training.validation import averaged_weights, plot_losses, sample_grid


class Trainer:
    """Everything a run consists of; `run` goes through its steps."""

    def __init__(self, args, accelerator):
        self.args, self.accelerator = args, accelerator
        set_seed(args.seed)
        self.vae = load_vae(args, accelerator.device)
        args.resolution = image_resolution(args, self.vae)
        data = find_data(args)
        self.names, self.ids = data.names, data.ids
        transformer = build_transformer(args, self.vae, data.names).to(accelerator.device).train()
        settings = self.check_settings(transformer)
        diffusion = {"diffusion": trained_scheduler(args, "ddpm")} if args.objective == "epsilon" else {}
        self.objective = Objective(args.objective, args.time_sampling, args.snr_gamma, args.cosine_loss, **diffusion)
        if args.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        self.head = None
        if args.dry_run:
            self.transformer = accelerator.prepare(transformer)
            return
        self.open_data(data, settings)
        if args.proj_coeff:
            if self.latents.feature_dim is None:
                raise ValueError(f"{args.latents_dir} holds no features; precompute it with --features.")
            self.head = AlignmentHead(transformer, args.alignment_depth, self.latents.feature_dim)
            self.head.to(accelerator.device)
        self.prepare(transformer)
        self.pipe = build_pipeline(args, self.unwrapped, self.vae, self.names)
        publishes = args.push_to_hub and accelerator.is_main_process
        self.uploads = BackgroundUploads(args.hub_model_id) if publishes else None
        self.metrics: dict[str, float] = {}

    def open_data(self, data, settings):
        """Latents, and held-out images if asked; a run that goes on has to find the data it was started with."""
        args, accelerator = self.args, self.accelerator
        encoder = load_encoder(args.alignment_encoder).to(accelerator.device) if args.proj_coeff else None
        self.held_out = self.extractor = None
        if args.validation_split:
            self.held_out, self.extractor = validation_images(args, data), load_extractor("efficientnet-lite0")
        if data.reader is not None and not args.streaming:
            SeededBatches(len(data.reader.dataset), args.train_batch_size)  # too large a batch, before the work
        self.latents = open_latents(args, accelerator, self.vae, data, encoder)
        if accelerator.is_main_process:
            settings["latents"] = getattr(self.latents, "index", {}).get("fingerprint")
            if self.resumes:
                check_same_settings(self.settings_file, settings, MAY_CHANGE)
            record_settings(self.settings_file, settings)
        labels = self.latents.labels
        counts = zip(data.found, labels.bincount(minlength=len(data.found)).tolist(), strict=True)
        accelerator.print(f"{len(labels)} images: {', '.join(f'{name} {count}' for name, count in counts)}")
        balanced = labels if args.balance_classes else None
        self.batches = SeededBatches(len(labels), args.train_batch_size, args.seed, balanced)

    def prepare(self, transformer):
        """All that learns and counts, in accelerate's hands and in the checkpoints."""
        args, accelerator = self.args, self.accelerator
        optimizer = build_optimizer(args, transformer, self.head)
        steps = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": args.max_train_steps}
        self.schedule = get_scheduler(args.lr_scheduler, optimizer, **steps)
        self.transformer, self.optimizer = accelerator.prepare(transformer, optimizer)
        if self.head is not None:
            self.head = accelerator.prepare(self.head)
        self.unwrapped = accelerator.unwrap_model(self.transformer, keep_torch_compile=False)
        self.guard = LossGuard(args.on_spike)
        self.ema = WeightAverage(self.trainable(), decay=args.ema_decay, use_ema_warmup=True, power=0.75)
        self.profiles = PowerAverages(self.trainable()) if args.ema_profiles else None
        kept = (self.ema, self.schedule, self.guard, *([self.profiles] if self.profiles else []))
        accelerator.register_for_checkpointing(*kept)

    def trainable(self):
        """All parameters of the transformer, or the adapters'."""
        return [parameter for parameter in self.unwrapped.parameters() if parameter.requires_grad]

    def check_settings(self, transformer):
        """That a resumed run is the same run; returns what makes it so."""
        args, accelerator = self.args, self.accelerator
        config = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
        settings = vars(args) | {"transformer": config}
        self.settings_file = args.output_dir / "training_config.json"
        self.resumes = bool(list_checkpoints(args.output_dir))
        if accelerator.is_main_process and self.resumes:
            check_same_settings(self.settings_file, settings, MAY_CHANGE)
        accelerator.print(json.dumps(vars(args), indent=2, default=str))
        accelerator.print(
            f"{transformer.num_parameters() / 1e6:.2f} M parameters, "
            f"{transformer.num_parameters(only_trainable=True) / 1e6:.2f} M of them trained, "
            f"{len(self.names)} classes, {accelerator.num_processes} processes"
        )
        return settings

    def share(self):
        """This process's part of a batch."""
        count = self.args.train_batch_size // self.accelerator.num_processes
        return slice(self.accelerator.process_index * count, (self.accelerator.process_index + 1) * count)

    def draw(self, step):
        """This process's part of the step's batch, a function of (seed, step)."""
        args, draw = self.args, step + self.guard.draw_offset
        indices, generator = self.batches.indices(draw), self.batches.generator(draw)
        probabilities = (args.flip_probability, args.class_dropout_prob)
        batch = draw_batch(self.latents, self.objective, indices, generator, self.share(), *probabilities)
        if "drop" not in batch and self.unwrapped.config.class_dropout_prob > 0:  # or the model would draw by itself
            batch["drop"] = torch.zeros_like(batch["label"], dtype=torch.bool)
        return batch | {"label": self.ids[batch["label"]]}

    def backward(self, batch):
        """Gradients of the mean loss of this process's part, in micro-batches; the means over all processes."""
        accelerator, count = self.accelerator, len(batch["label"])
        micro = count // self.args.gradient_accumulation_steps
        totals = torch.zeros(2, device=accelerator.device)
        for start in range(0, count, micro):
            part = {name: values[start : start + micro].to(accelerator.device) for name, values in batch.items()}
            with nullcontext() if start + micro == count else accelerator.no_sync(self.transformer):
                losses = [self.objective.loss(self.transformer, part).sum() / count]
                if self.head is not None:
                    losses.append(self.head(part["features"]).sum() / count)
                accelerator.backward(losses[0] if len(losses) == 1 else losses[0] + self.args.proj_coeff * losses[1])
            totals[: len(losses)] += torch.stack([loss.detach() for loss in losses])
        loss, alignment = accelerator.reduce(totals, "mean").tolist()
        return {"loss": loss} | ({} if self.head is None else {"alignment": alignment})

    def train(self):
        """The loop; returns when `max_train_steps` are done, or SIGTERM came, and the last checkpoint is written."""
        args, accelerator = self.args, self.accelerator
        stop = StopRequest()
        log = args.output_dir / "train_log.jsonl"
        step = resume_from(accelerator, args.output_dir)
        if step:
            accelerator.print(f"Going on from step {step} of {args.max_train_steps} in {args.output_dir}.")
        if accelerator.is_main_process:
            truncate_log(log, step)
            PowerAverages.drop_snapshots(args.output_dir / "ema", step)
        progress = tqdm(
            total=args.max_train_steps, initial=step, mininterval=10, disable=not accelerator.is_main_process
        )
        started = time.time()
        parameters = [*self.transformer.parameters(), *(() if self.head is None else self.head.parameters())]
        while step < args.max_train_steps:
            losses = self.backward(self.draw(step))
            gradient_norm = float(accelerator.clip_grad_norm_(parameters, args.max_grad_norm))
            verdict = self.guard.judge(step + 1, losses["loss"], gradient_norm)
            if verdict != "step":
                samples = self.batches.indices(step + self.guard.draw_offset).tolist()
                accelerator.print(f"{verdict} at step {step + 1}: {losses}, samples {samples}")
                if accelerator.scaler is not None:
                    self.close_scaled_step(gradient_norm)
            if verdict == "rewind" and list_checkpoints(args.output_dir):
                step = self.rewind(step + 1, log)
                continue
            if verdict == "step":
                self.optimizer.step()
                self.ema.step(self.trainable())
                if self.profiles is not None:
                    self.profiles.step(self.trainable())
            self.schedule.step()
            self.optimizer.zero_grad()
            step += 1
            progress.update()
            record = {"step": step} | losses | {"grad_norm": gradient_norm, "lr": self.schedule.get_last_lr()[-1]}
            record |= {"seconds": round(time.time() - started, 2)}
            record |= {"skipped": True, "samples": samples} if verdict != "step" else {}
            # Every process has to leave at the same step.
            stopping = accelerator.reduce(torch.tensor(float(stop.requested), device=accelerator.device), "sum") > 0
            finished = step == args.max_train_steps
            if step % args.validation_steps == 0 or finished:
                record |= self.validate(step)
                accelerator.print(json.dumps(record))
            if accelerator.is_main_process:
                with open(log, "a") as file:
                    file.write(json.dumps(record) + "\n")
            accelerator.log({name: value for name, value in record.items() if name != "step"}, step=step)
            if step % args.checkpointing_steps == 0 or finished or stopping:
                self.save_profiles()  # first, as a run that is killed in between would not come back for them
                save_checkpoint(accelerator, args.output_dir, step, args.checkpoints_total_limit)
            if stopping and not finished:
                break
        return step

    def close_scaled_step(self, gradient_norm):
        """fp16: a step that is left out has to be ended all the same; one that overflowed lowers the loss's scale."""
        if math.isfinite(gradient_norm):
            self.accelerator.scaler.update()
        else:
            self.optimizer.step()  # changes no weight

    def rewind(self, from_step, log):
        """Back to the last checkpoint, and on with other batches."""
        self.optimizer.zero_grad()
        before = copy(self.guard)
        step = resume_from(self.accelerator, self.args.output_dir)
        self.guard.rewound(from_step, step, before)
        if self.accelerator.is_main_process:
            truncate_log(log, step)
        return step

    def save_profiles(self):
        """Snapshots to choose an average from when training is over."""
        if self.profiles is not None:
            names = [name for name, parameter in self.unwrapped.named_parameters() if parameter.requires_grad]
            main = self.accelerator.is_main_process
            self.profiles.save_snapshot(self.args.output_dir / "ema", names, main)

    def validate(self, step):
        """A sample grid from the averaged weights, and the distance to held-out images; all processes draw alike."""
        args, main = self.args, self.accelerator.is_main_process
        options = {"guidance_scale": args.guidance_scale if args.class_dropout_prob else 1.0}
        options["num_inference_steps"] = args.validation_inference_steps
        with averaged_weights(self.ema, self.unwrapped):
            classes = list(self.pipe.id2label)[: args.validation_classes]
            grid = sample_grid(self.pipe, classes, args.validation_images_per_class, args.seed, **options)
            if self.held_out is not None:
                images, labels = self.held_out
                samples = sample_images(self.pipe, labels, args.seed, **options)
                seen = [gaussian(extract(part, self.extractor).features) for part in (samples, images)]
                self.metrics = {"fd": frechet_distance(*seen)}
        if main:
            path = args.output_dir / "samples" / f"step-{step:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            grid.save(path)
            if self.uploads is not None:
                self.uploads.send(path, f"samples/{path.name}")
        return self.metrics

    def whole_pipeline(self):
        """The pipeline with the averaged weights as an ordinary model, even where each process has a part of it."""
        if self.accelerator.distributed_type != DistributedType.FSDP:
            return self.pipe
        weights = self.accelerator.get_state_dict(self.transformer)
        if not self.accelerator.is_main_process:
            return None
        model = DiTTransformer2DModel.from_config(self.unwrapped.config)
        model.load_state_dict(weights)
        return build_pipeline(self.args, model, self.vae, self.names)

    def save_result(self):
        """The pipeline folder with its card, and if asked its copy on the Hub; or the adapters."""
        args = self.args
        with averaged_weights(self.ema, self.unwrapped):
            pipe = self.whole_pipeline()
            if not self.accelerator.is_main_process:
                return
            if args.lora_rank is not None:
                print(f"Adapters: {save_lora(pipe.transformer, args.output_dir)}")
                return
            folder = args.output_dir / "pipeline"
            folder.mkdir(exist_ok=True)
            grid = args.output_dir / "samples" / f"step-{args.max_train_steps:06d}.png"
            if grid.exists():
                shutil.copyfile(grid, folder / "samples.png")
            lines = [json.loads(line) for line in (args.output_dir / "train_log.jsonl").read_text().splitlines()]
            plot_losses([line["step"] for line in lines], [line["loss"] for line in lines], folder / "loss.png")
            facts = self.card_facts(lines[-1].get("fd"))
            pipe.save_pretrained(folder, card=facts)
            print(f"Pipeline: {folder}")
        if args.push_to_hub:
            self.uploads.close()
            print(f"Published: {publish_folder(folder, args.hub_model_id, pipe, facts)}")

    def card_facts(self, distance):
        """What the card says of the training."""
        given = {name: value for name, value in vars(self.args).items() if name in RECIPE_ON_CARD}
        recipe = {name: value for name, value in given.items() if value is not None}
        if not self.args.proj_coeff:
            recipe = {name: value for name, value in recipe.items() if not name.startswith("alignment_")}
        recipe["steps left out by the guard"] = self.guard.skipped
        results = []
        if distance is not None:
            result = EvalResult("unconditional-image-generation", "images", "held out", "fd", round(distance, 1))
            result.metric_name = "Fréchet distance (EfficientNet-Lite0, 112 px)"
            results.append(result)
        return CardFacts(license=self.args.license, recipe=recipe, results=results)

    def print_plan(self):
        """What the run would take."""
        args, config = self.args, self.accelerator.unwrap_model(self.transformer).config
        count = args.train_batch_size // self.accelerator.num_processes
        latents = torch.randn(2, count, config.in_channels, config.sample_size, config.sample_size)
        time_draw = self.objective.draw_time(count, torch.Generator())
        batch = {"x_start": latents[0], "noise": latents[1], "time": time_draw}
        batch["label"] = torch.zeros(count, dtype=torch.int64)
        model = self.accelerator.unwrap_model(self.transformer)
        plan = training_plan(model, lambda: self.backward(batch), args.max_train_steps)
        self.accelerator.print(json.dumps(plan, indent=2))

    def run(self):
        """From the first step, or the last checkpoint, to the published model."""
        if self.args.dry_run:
            return self.print_plan()
        step = self.train()
        if step < self.args.max_train_steps:
            self.accelerator.print(f"Stopped at step {step} by a signal; the same command goes on from there.")
        else:
            self.save_result()
        self.accelerator.end_training()


def build_optimizer(args, transformer, head):
    """AdamW for what is trained, in 8 bits if asked."""
    groups = parameter_groups(transformer, args.learning_rate, args.layer_decay)
    if head is not None:
        groups.append({"params": list(head.parameters()), "lr": args.learning_rate})
    options = {"betas": (0.9, args.adam_beta2), "weight_decay": args.weight_decay}
    if not args.use_8bit_adam:
        return torch.optim.AdamW(groups, fused=True, **options)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ValueError("--use_8bit_adam needs bitsandbytes: `pip install bitsandbytes`.") from None
    return AdamW8bit(groups, **options)


def build_pipeline(args, transformer, vae, names):
    """The pipeline that is sampled while training and saved at the end."""
    name = "flow_euler" if args.objective == "velocity" else "ddpm"
    fixed = {"variance_type": "fixed_large"} if name == "ddpm" and not transformer.config.learn_sigma else {}
    scheduler = trained_scheduler(args, name, **fixed)
    pipe = DiTClassCondPipeline(transformer, scheduler, vae, id2label=dict(enumerate(names)))
    pipe.set_progress_bar_config(disable=True)
    return pipe


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
    accelerator = start_accelerator(
        mixed_precision=args.mixed_precision, log_with=args.report_to, project_dir=args.output_dir / "logs"
    )
    args.mixed_precision = accelerator.mixed_precision
    check_batch(args, accelerator.num_processes)
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if sharded and (args.proj_coeff or args.lora_rank is not None or args.dry_run):
        raise ValueError("--proj_coeff, --lora_rank and --dry_run work with DDP, not with sharded weights.")
    with only_run(args.output_dir) if accelerator.is_main_process and not args.dry_run else nullcontext():
        trainer = Trainer(args, accelerator)
        if args.report_to and not args.dry_run:
            simple = {name: value for name, value in vars(args).items() if isinstance(value, int | float | str)}
            accelerator.init_trackers("dit_hf", config=simple)
        trainer.run()


if __name__ == "__main__":
    run(main)
