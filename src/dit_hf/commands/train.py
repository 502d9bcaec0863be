"""Trains a class-conditional DiT on the latents of an image dataset, and writes a pipeline folder."""

import argparse
import json
import sys
from contextlib import closing, nullcontext
from dataclasses import fields
from pathlib import Path
from signal import Signals

import torch
from accelerate.utils import DistributedType, set_seed

from ..bundled import resolve_pipeline
from ..command_line import ArgumentParser, run
from ..data.autoencoders import latent_channels, vae_statistics
from ..data.latents import EncodedImages, latent_shape, read_index
from ..files import check_apart, check_folder
from ..hub import BackgroundUploads, publish_folder
from ..pipeline import DiTClassCondPipeline
from ..presets import PRESETS
from ..training.alignment import AlignmentHead, check_depth, load_encoder
from ..training.batches import SeededBatches
from ..training.checkpointing import check_resumable
from ..training.config import COUNT, NOT_NEGATIVE, POSITIVE, RANGES, SCHEDULES, TrainingConfig
from ..training.data import checksums, latent_size, open_latents, write_latents
from ..training.guard import POLICIES
from ..training.model import (
    check_architecture,
    check_prediction,
    classes_of_adapters,
    image_resolution,
    load_vae,
    new_transformer,
    pretrained_transformer,
    recommended_call,
    sampling_scheduler,
    transformer_config,
)
from ..training.objectives import OBJECTIVES, TIME_SAMPLERS
from ..training.plan import training_plan
from ..training.recipes import RECIPES
from ..training.result import check_hub, logged_distance, save_pipeline, training_facts
from ..training.running import local_share, on_main, only_run, start_accelerator
from ..training.trainer import Trainer, build_optimizer, check_batch, check_resume, run_settings
from ..training.validation import Validation, check_sampling
from .latents import add_data_arguments, image_data


# Flags that make a run what it is, beside the fields of `TrainingConfig`, the transformer, the objective and the data.
COMPARED = ("lora_rank", "lora_alpha", "freeze", "alignment_encoder", "alignment_depth", "cache_latents")
# And those that decide which images there are, if there are images. The fingerprint tells only that they have changed.
DATA = ("split", "holdout", "resolution", "image_column", "label_column")

# Flags that would be ignored in silence: flag, when, and why.
IGNORED = (
    ("lora_alpha", lambda args: args.lora_rank is None, "without --lora_rank"),
    ("push_to_hub", lambda args: args.lora_rank is not None, "with --lora_rank; `hf upload` sends the adapters"),
    ("ema_profiles", lambda args: args.lora_rank is not None, "with --lora_rank"),
    ("freeze", lambda args: args.pretrained_model_name_or_path is None, "without --pretrained_model_name_or_path"),
    ("lora_rank", lambda args: args.pretrained_model_name_or_path is None, "without --pretrained_model_name_or_path"),
    ("dataset_name", lambda args: args.latents_dir is not None, "with --latents_dir, which stands for a dataset"),
    ("train_data_dir", lambda args: args.latents_dir is not None, "with --latents_dir, which stands for a dataset"),
    ("streaming", lambda args: args.latents_dir is not None, "with --latents_dir"),
    ("holdout", lambda args: args.latents_dir is not None, "with --latents_dir, whose images were chosen before"),
    ("cache_latents", lambda args: args.latents_dir is not None, "with --latents_dir"),
    ("validation_split", lambda args: args.latents_dir is not None, "with --latents_dir, which holds no images"),
    ("alignment_depth", lambda args: args.proj_coeff == 0, "without --proj_coeff"),
)


def parse_args() -> argparse.Namespace:
    """The command line; a recipe sets what is not given."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_data_arguments(parser)
    add_model_arguments(parser)
    add_training_arguments(parser)
    add_output_arguments(parser)
    recipe = parser.parse_known_args()[0].recipe
    parser.set_defaults(**RECIPES.get(recipe, {}))
    args = parser.parse_args()
    for row in OBJECTIVES.values():
        for flag in row.flags:
            if flag not in OBJECTIVES[args.objective].flags and getattr(args, flag) != parser.get_default(flag):
                parser.error(f"--{flag} has no effect on {args.objective}")
    for flag, without_effect, why in IGNORED:
        if getattr(args, flag) != parser.get_default(flag) and without_effect(args):
            parser.error(f"--{flag} has no effect {why}")
    if args.hub_model_id is None:
        args.hub_model_id = args.output_dir.resolve().name
    if args.pretrained_model_name_or_path is not None:
        args.pretrained_model_name_or_path = resolve_pipeline(args.pretrained_model_name_or_path)
    elif args.vae is None and args.latents_dir is not None:
        args.vae = str(args.latents_dir / "vae")
    elif args.vae is None:
        parser.error("--vae is missing: a folder or Hub id of the autoencoder, such as the bundled model's vae folder")
    return args


def add_model_arguments(parser):
    """Flags of what is trained, and from where it starts."""
    data = parser.add_argument_group("latents")
    data.add_argument("--latents_dir", type=Path, help="Precomputed latents instead of a dataset.")
    data.add_argument(
        "--cache_latents",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Encode once into OUTPUT_DIR/latents, or as images are drawn.",
    )
    data.add_argument(
        "--flip_probability", type=RANGES["flip_probability"], default=0.5, help="Fraction of mirrored images."
    )
    model = parser.add_argument_group("model")
    size = model.add_mutually_exclusive_group(required=True)
    size.add_argument("--preset", choices=PRESETS, help="A size of the paper.")
    size.add_argument("--transformer_config", type=Path, help="JSON with arguments of DiTTransformer2DModel.")
    size.add_argument(
        "--pretrained_model_name_or_path", help="Pipeline whose weights to start from: folder, Hub id or bundled name."
    )
    model.add_argument("--lora_rank", type=COUNT, help="Train adapters of this rank instead of all weights.")
    model.add_argument("--lora_alpha", type=COUNT, help="Adapters count alpha / rank; the rank if not given.")
    model.add_argument("--freeze", nargs="+", default=[], help="Parts to keep: time_embed, transformer_blocks.0 ...")
    model.add_argument(
        "--class_dropout_prob",
        type=RANGES["class_dropout_prob"],
        default=0.1,
        help="Fraction of samples without a label.",
    )


def add_training_arguments(parser):
    """Flags of the loss, the batch and the optimizer."""
    train = parser.add_argument_group("training")
    train.add_argument("--recipe", choices=RECIPES, help="A paper's settings; other flags replace single values.")
    train.add_argument("--objective", choices=OBJECTIVES, default="velocity", help="What is predicted.")
    train.add_argument("--time_sampling", choices=TIME_SAMPLERS, default="logit_normal", help="Of velocity's sigma.")
    train.add_argument("--snr_gamma", type=POSITIVE, help="Bound of min-SNR weights for epsilon; none if not given.")
    train.add_argument("--cosine_loss", action="store_true", help="Add LightningDiT's direction loss to velocity.")
    train.add_argument(
        "--proj_coeff", type=RANGES["proj_coeff"], default=0.0, help="Weight of REPA's alignment; 0 is none."
    )
    train.add_argument("--alignment_depth", type=COUNT, default=4, help="Block whose tokens are aligned, from 1.")
    train.add_argument("--balance_classes", action="store_true", help="Draw all classes equally often.")
    batch = train.add_mutually_exclusive_group()
    batch.add_argument(
        "--total_batch_size",
        type=RANGES["total_batch_size"],
        default=128,
        help="Samples of one optimizer step, over all processes.",
    )
    batch.add_argument("--train_batch_size", type=COUNT, help="Instead: samples of one micro-batch of one process.")
    train.add_argument(
        "--gradient_accumulation_steps",
        type=RANGES["gradient_accumulation_steps"],
        default=1,
        help="Micro-batches of one step of one process.",
    )
    train.add_argument("--gradient_checkpointing", action="store_true", help="Less memory, more time.")
    train.add_argument("--on_spike", choices=POLICIES, default="skip", help="What a spike of the loss leads to.")
    train.add_argument("--max_train_steps", type=RANGES["max_train_steps"], default=4000, help="Optimizer steps.")
    train.add_argument("--learning_rate", type=RANGES["learning_rate"], default=1e-3, help="Peak learning rate.")
    train.add_argument(
        "--layer_decay", type=RANGES["layer_decay"], default=1.0, help="A block's rate over that of the next one."
    )
    train.add_argument("--lr_scheduler", choices=SCHEDULES, default="cosine", help="A schedule of diffusers.")
    train.add_argument(
        "--lr_warmup_steps", type=RANGES["lr_warmup_steps"], default=100, help="Steps of linear warm-up."
    )
    train.add_argument("--adam_beta2", type=RANGES["adam_beta2"], default=0.99, help="AdamW's second beta.")
    train.add_argument("--weight_decay", type=RANGES["weight_decay"], default=0.0, help="AdamW's weight decay.")
    train.add_argument("--use_8bit_adam", action="store_true", help="AdamW of bitsandbytes.")
    train.add_argument(
        "--max_grad_norm", type=RANGES["max_grad_norm"], default=1.0, help="Gradient clipping; `inf` for none."
    )
    train.add_argument(
        "--ema_decay",
        type=RANGES["ema_decay"],
        default=0.999,
        help="Decay of the averaged weights in every step.",
    )
    train.add_argument(
        "--ema_warmup",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="Let the decay rise to --ema_decay, for runs that are short for it.",
    )
    train.add_argument(
        "--ema_profiles",
        action="store_true",
        help="Keep what `python -m dit_hf.commands.choose_ema` needs, in OUTPUT_DIR/ema.",
    )
    train.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="accelerate's own if not given.")
    train.add_argument("--seed", type=RANGES["seed"], default=0, help="Seed of weights, order and draws.")


def add_output_arguments(parser):
    """Flags of what is written, looked at and published."""
    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", type=Path, required=True, help="Cache, checkpoints, samples, final pipeline.")
    output.add_argument(
        "--checkpointing_steps",
        type=RANGES["checkpointing_steps"],
        default=500,
        help="Steps between checkpoints.",
    )
    output.add_argument(
        "--checkpoints_total_limit", type=RANGES["checkpoints_total_limit"], default=2, help="Checkpoints kept."
    )
    output.add_argument(
        "--resume_from_checkpoint",
        default="latest",
        metavar="{latest,never,PATH}",
        help="Checkpoint of OUTPUT_DIR to resume from; `never` refuses a folder that holds one.",
    )
    output.add_argument(
        "--validation_steps", type=RANGES["validation_steps"], default=500, help="Steps between sample grids."
    )
    output.add_argument("--validation_classes", type=COUNT, default=10, help="Rows of a sample grid.")
    output.add_argument("--validation_images_per_class", type=COUNT, default=8, help="Columns of a sample grid.")
    output.add_argument("--validation_inference_steps", type=COUNT, default=25, help="Sampler steps of a grid.")
    output.add_argument("--validation_split", help="Split whose images the samples' Fréchet distance is taken to.")
    output.add_argument("--validation_images", type=COUNT, default=1000, help="How many of them at most.")
    output.add_argument("--guidance_scale", type=NOT_NEGATIVE, default=3.0, help="Guidance of a grid.")
    output.add_argument("--dry_run", action="store_true", help="Print what the run would take, and write nothing.")
    output.add_argument("--report_to", help="A tracker of accelerate: tensorboard, wandb ...")
    output.add_argument(
        "--push_to_hub", action="store_true", help="Publish samples during training, the pipeline at the end."
    )
    output.add_argument("--hub_model_id", help="Repository; the output folder's name if not given.")
    output.add_argument("--license", help="On the model card; the Hub's identifier, such as apache-2.0.")


def training_config(args, num_processes: int) -> TrainingConfig:
    """The settings of the trainer; the batch is that of all processes."""
    if args.train_batch_size is not None:
        args.total_batch_size = args.train_batch_size * args.gradient_accumulation_steps * num_processes
    check_batch(args.total_batch_size, num_processes, args.gradient_accumulation_steps)
    return TrainingConfig(**{entry.name: getattr(args, entry.name) for entry in fields(TrainingConfig)})


def check_output(args) -> None:
    """Checks that the output folder can be written, and lies in nothing that is read."""
    check_folder(args.output_dir, "--output_dir")
    if args.latents_dir is not None:
        check_apart(args.output_dir, args.latents_dir, "--output_dir")


class Training:
    """One run of the command: the parts that the flags name, built and checked before anything is written."""

    def __init__(self, args, config, accelerator):
        self.args, self.config, self.accelerator = args, config, accelerator
        set_seed(args.seed)
        pretrained, kind = args.pretrained_model_name_or_path, OBJECTIVES[args.objective].kind
        if pretrained is not None:
            check_architecture(pretrained)
            check_prediction(pretrained, kind)
        self.vae = load_vae(args.vae, pretrained).to(accelerator.device)
        args.resolution = self.resolution()
        self.data = self.reader = None
        if args.latents_dir is None:
            self.data = image_data(args)
            self.reader = self.data.reader()
        self.found = read_index(args.latents_dir)["classes"] if self.reader is None else self.reader.names
        self.names, self.class_ids = self.found, torch.arange(len(self.found))
        if args.lora_rank is not None:
            self.names, self.class_ids = classes_of_adapters(pretrained, self.found)
        self.transformer = self.build_transformer()
        learn_sigma = self.transformer.config.learn_sigma
        self.scheduler = sampling_scheduler(kind, learn_sigma, pretrained)
        row = OBJECTIVES[args.objective]
        self.objective = row.build(self.scheduler, **{flag: getattr(args, flag) for flag in row.flags})

    def resolution(self):
        """Pixels per side: what the latents or the pretrained weights are of, or else what is asked for."""
        args = self.args
        source, size = args.pretrained_model_name_or_path, None
        if args.latents_dir is not None:
            source, size = args.latents_dir, latent_shape(args.latents_dir)[-1]
        elif source is not None:
            size = transformer_config(source).get("sample_size")
        return image_resolution(args.resolution, self.vae, source, size)

    def build_transformer(self):
        """A model for the dataset's classes and the VAE's latents, new or from given weights."""
        args = self.args
        size = {"sample_size": latent_size(self.vae, args.resolution), "in_channels": latent_channels(self.vae)}
        if args.pretrained_model_name_or_path is not None:
            adapters = (args.lora_rank, args.lora_alpha, args.freeze)
            return pretrained_transformer(
                args.pretrained_model_name_or_path, self.names, args.class_dropout_prob, *adapters, **size
            )
        classes = {"num_classes": len(self.names), "class_dropout_prob": args.class_dropout_prob}
        learn_sigma = OBJECTIVES[args.objective].kind.learn_sigma
        return new_transformer(args.preset, args.transformer_config, **size, **classes, learn_sigma=learn_sigma)

    def read(self):
        """All that the run reads before it writes, and whether it may resume."""
        args, accelerator = self.args, self.accelerator
        self.held_out = self.encoder = self.latents = None
        if args.validation_split:
            counts = (args.validation_split, self.found, self.class_ids, args.validation_images)
            self.held_out = self.data.held_out(*counts)
        if self.reader is not None and not args.streaming:
            SeededBatches(len(self.reader.dataset), args.total_batch_size)  # too large a batch, before the work
        if args.proj_coeff:
            self.encoder = load_encoder(args.alignment_encoder).to(accelerator.device)
        keep = args.pretrained_model_name_or_path is not None
        if args.latents_dir is not None:
            self.latents = self.open(args.latents_dir)
            if args.proj_coeff and self.latents.feature_dim is None:
                raise ValueError(f"{args.latents_dir} holds no features; precompute it with --features.")
            SeededBatches(len(self.latents.labels), args.total_batch_size)
        elif not args.cache_latents:
            self.latents = EncodedImages(self.vae, self.reader, self.encoder)
        if args.proj_coeff:
            check_depth(self.transformer, args.alignment_depth)
        self.facts = {name: getattr(args, name) for name in COMPARED}
        if self.reader is not None:
            self.facts |= {name: getattr(args, name) for name in DATA}
            made_by = checksums(self.vae, self.encoder)
            self.facts["latents"] = self.data.fingerprint(self.reader, args.shard_size, **made_by)
        else:
            self.facts["latents"] = self.latents.index["fingerprint"]
        if keep or not args.cache_latents:
            self.facts["statistics"] = vae_statistics(self.vae)
        build_optimizer(self.config, self.transformer)  # its library may be missing
        check_sampling(self.pipeline(self.transformer), **self.sampling)
        if args.push_to_hub and accelerator.is_main_process:
            check_hub(args.hub_model_id)
        settings = run_settings(self.config, self.transformer, self.objective, accelerator, self.facts)
        if checkpoint := check_resume(self.config, settings):
            on_main(accelerator, lambda: check_resumable(checkpoint))  # before the images are encoded

    def open(self, folder):
        """A cache of latents, whose checksums the processes of this machine share."""
        keep = self.args.pretrained_model_name_or_path is not None
        share = local_share(self.accelerator)
        return open_latents(folder, self.vae, self.args.resolution, self.encoder, keep, share)

    @property
    def sampling(self):
        """The settings of the calls that sample during training."""
        scale = self.args.guidance_scale if self.args.class_dropout_prob else 1.0
        return {"guidance_scale": scale, "num_inference_steps": self.args.validation_inference_steps}

    def pipeline(self, transformer):
        """The pipeline that is sampled during training and saved at its end."""
        call = recommended_call(self.args.pretrained_model_name_or_path, self.args.class_dropout_prob > 0)
        pipe = DiTClassCondPipeline(transformer, self.scheduler, self.vae, dict(enumerate(self.names)), call)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def print_facts(self):
        """The resolved settings and what is trained."""
        self.accelerator.print(json.dumps(vars(self.args), indent=2, default=str))
        self.accelerator.print(
            f"{self.transformer.num_parameters() / 1e6:.2f} M parameters, "
            f"{self.transformer.num_parameters(only_trainable=True) / 1e6:.2f} M of them trained, "
            f"{len(self.names)} classes, {self.accelerator.num_processes} processes"
        )
        if self.reader is not None:
            self.accelerator.print(self.reader.describe())

    def print_plan(self):
        """What the run would take."""
        plan = training_plan(self.transformer, self.objective, self.config, self.accelerator)
        self.accelerator.print(json.dumps(plan, indent=2))

    def trainer(self):
        """The trainer with its data; encodes the images first if they are to be cached."""
        args, accelerator = self.args, self.accelerator
        if self.latents is None:
            folder = args.output_dir / "latents"
            write_latents(accelerator, self.vae, self.data, self.reader, folder, self.encoder, args.shard_size)
            self.latents = self.open(folder)
        latents, alignment = self.latents, None
        if args.proj_coeff:
            alignment = AlignmentHead(self.transformer, args.alignment_depth, latents.feature_dim)
        counts = zip(self.found, latents.labels.bincount(minlength=len(self.found)).tolist(), strict=True)
        accelerator.print(f"{len(latents.labels)} images: {', '.join(f'{name} {count}' for name, count in counts)}")
        parts = (self.config, self.transformer, latents, self.objective)
        options = {"accelerator": accelerator, "class_ids": self.class_ids, "alignment": alignment}
        return Trainer(*parts, **options, facts=self.facts, notes=vars(args))

    def run(self) -> int:
        """From the first step, or a checkpoint, to the published model; returns the signal that stopped it, or 0."""
        args, main = self.args, self.accelerator.is_main_process
        trainer = self.trainer()
        uploads = BackgroundUploads(args.hub_model_id) if args.push_to_hub and main else None
        # Whatever ends the training, what is queued is sent.
        with closing(uploads) if uploads is not None else nullcontext():
            validation = Validation(
                self.pipeline(trainer.transformer),
                args.output_dir,
                args.seed,
                args.validation_classes,
                args.validation_images_per_class,
                self.held_out,
                uploads,
                main,
                **self.sampling,
            )
            step = trainer.train(
                validation, must_fall=args.pretrained_model_name_or_path is None and args.learning_rate > 0
            )
        if trainer.stopped_by:
            name = Signals(trainer.stopped_by).name
            self.accelerator.print(f"Stopped at step {step} by {name}; run the same command again to resume.")
        else:
            self.save(trainer)
        return trainer.stopped_by

    def save(self, trainer):
        """The pipeline folder with its card and, if asked for, its copy on the Hub; or the adapters."""
        args = self.args
        with trainer.averaged_transformer() as transformer:
            if not self.accelerator.is_main_process:
                return
            if args.lora_rank is not None:
                from ..training.lora import save_lora  # needs peft

                print(f"Adapters: {save_lora(transformer, args.output_dir)}")
                return
            pipe, distance = self.pipeline(transformer), logged_distance(args.output_dir)
            facts = training_facts(trainer.settings, trainer.guard.skipped, args.license, distance)
            folder = save_pipeline(pipe, args.output_dir, facts)
            print(f"Pipeline: {folder}")
        if args.push_to_hub:
            print(f"Published: {publish_folder(folder, args.hub_model_id, pipe, facts)}")


def main() -> None:
    """Trains as the command line says; a signal that stopped it gives the exit code, 128 + its number."""
    args = parse_args()
    check_output(args)
    accelerator = start_accelerator(
        mixed_precision=args.mixed_precision, log_with=args.report_to, project_dir=args.output_dir / "logs"
    )
    args.mixed_precision = accelerator.mixed_precision
    if args.report_to and not accelerator.log_with:
        raise ValueError(f"--report_to {args.report_to} needs its package: `pip install {args.report_to}`.")
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if sharded and (args.proj_coeff or args.lora_rank is not None or args.dry_run):
        raise ValueError("--proj_coeff, --lora_rank and --dry_run work with DDP, not with sharded weights.")
    training = Training(args, training_config(args, accelerator.num_processes), accelerator)
    training.print_facts()
    if args.dry_run:
        training.print_plan()
        return
    training.read()
    with only_run(args.output_dir) if accelerator.is_main_process else nullcontext():
        if args.report_to:
            simple = {name: value for name, value in vars(args).items() if isinstance(value, int | float | str)}
            accelerator.init_trackers("dit_hf", config=simple)
        stopped_by = training.run()
        accelerator.end_training()
    if stopped_by:
        sys.exit(128 + stopped_by)


if __name__ == "__main__":
    run(main)
