"""The flags of `train`."""

import argparse
import os
from pathlib import Path

from ..bundled import resolve_pipeline
from ..command_line import ArgumentParser, names, real
from ..evaluation.extractors import EFFICIENTNET
from ..training.config import COUNT, FRACTION, GUIDANCE, POSITIVE, RANGES, SCHEDULES, SNR_GAMMA, WEIGHT
from ..training.guard import POLICIES
from ..training.model import PRESET_CLASSES
from ..training.objectives import GUIDED, OBJECTIVES, TIME_SAMPLERS
from ..training.recipes import RECIPES
from ..training.validation import HELD_OUT_METRICS, validation_metrics
from .latents import add_data_arguments


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
    ("validation_metrics", lambda args: args.validation_split is None, "without --validation_split"),
    ("metric_for_best_model", lambda args: args.validation_split is None, "without --validation_split"),
    ("load_best_model_at_end", lambda args: args.metric_for_best_model is None, "without --metric_for_best_model"),
    *(
        (f"target_guidance_{part}", lambda args: args.target_guidance_scale == 1, "without --target_guidance_scale")
        for part in ("start", "end")
    ),
    (
        "target_guidance_mix",
        lambda args: args.target_guidance_scale == 1 and args.target_guided == "all",
        "without --target_guidance_scale",
    ),
    (
        "target_guided",
        lambda args: args.target_guidance_scale == 1 and args.target_guidance_mix == 1,
        "without --target_guidance_scale",
    ),
    (
        "pretrained_teacher_model",
        lambda args: args.objective is None or not OBJECTIVES[args.objective].needs_pretrained,
        "without --objective distillation",
    ),
    ("alignment_depth", lambda args: args.proj_coeff == 0, "without --proj_coeff"),
)


def parse_args() -> argparse.Namespace:
    """The command line; a recipe sets what is not given."""
    parser = ArgumentParser(
        description="Trains a class-conditional diffusion transformer on the latents or pixels of an image dataset."
    )
    add_data_arguments(parser)
    add_model_arguments(parser)
    add_training_arguments(parser)
    add_output_arguments(parser)
    recipe = parser.parse_known_args()[0].recipe
    parser.set_defaults(**RECIPES.get(recipe, {}))
    args = parser.parse_args()
    for row in OBJECTIVES.values():
        for flag in row.flags:
            objective = args.objective or "velocity"  # whichever flow matching fits the model
            if flag not in OBJECTIVES[objective].flags and getattr(args, flag) != parser.get_default(flag):
                parser.error(f"--{flag} has no effect on {objective}")
    for flag, without_effect, why in IGNORED:
        if getattr(args, flag) != parser.get_default(flag) and without_effect(args):
            parser.error(f"--{flag} has no effect {why}")
    resolve_best_metric(parser, args)
    if args.hub_model_id is None:
        args.hub_model_id = os.path.basename(os.path.realpath(args.output_dir))
    if args.pretrained_teacher_model is not None:
        args.pretrained_teacher_model = resolve_pipeline(args.pretrained_teacher_model)
    if args.pretrained_model_name_or_path is not None:
        args.pretrained_model_name_or_path = resolve_pipeline(args.pretrained_model_name_or_path)
    elif args.vae is None and args.latents_dir is not None:
        args.vae = str(args.latents_dir / "vae")
        if args.latents_dir.is_dir() and not os.path.isdir(args.vae):
            parser.error(
                f"--latents_dir {args.latents_dir} has no folder vae; pass --vae, the autoencoder of the latents"
            )
    return args


def resolve_best_metric(parser, args):
    """Checks the metrics of the validation; finds name in the log and direction of the one for the best checkpoint."""
    rows = {row.name: row for row in validation_metrics(args.validation_metrics)}
    args.greater_is_better = False
    if args.metric_for_best_model is not None:
        if args.metric_for_best_model not in rows:
            given = f"--metric_for_best_model {args.metric_for_best_model}"
            parser.error(f"{given} is none of --validation_metrics {','.join(rows)}; add it there")
        row = rows[args.metric_for_best_model]
        args.metric_for_best_model, args.greater_is_better = row.full_name(EFFICIENTNET), row.higher_is_better


def add_model_arguments(parser):
    """Flags of the model and its initial weights."""
    data = parser.add_argument_group("latents")
    data.add_argument("--latents_dir", type=Path, help="Precomputed latents instead of a dataset.")
    data.add_argument(
        "--cache_latents",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Encode once into OUTPUT_DIR/latents, or each time an image is sampled.",
    )
    data.add_argument(
        "--flip_probability",
        type=RANGES["flip_probability"],
        default=0.5,
        help="Fraction of images that are mirrored.",
    )
    model = parser.add_argument_group("model")
    size = model.add_mutually_exclusive_group(required=True)
    size.add_argument("--preset", choices=PRESET_CLASSES, help="Model size of a paper.")
    size.add_argument(
        "--transformer_config",
        type=Path,
        help="JSON with arguments of DiTTransformer2DModel, or of the class that its _class_name names.",
    )
    size.add_argument(
        "--pretrained_model_name_or_path", help="Pipeline whose weights to start from: folder, Hub id or bundled name."
    )
    model.add_argument(
        "--pretrained_teacher_model",
        help="Pipeline to distil, as above; by default the one whose weights to start from.",
    )
    model.add_argument("--lora_rank", type=COUNT, help="Train adapters of this rank instead of all weights.")
    model.add_argument("--lora_alpha", type=COUNT, help="Scale of the adapters times their rank; by default the rank.")
    model.add_argument(
        "--freeze", nargs="+", default=[], help="Parts to exclude from training: time_embed, transformer_blocks.0 ..."
    )
    model.add_argument(
        "--class_dropout_prob",
        type=RANGES["class_dropout_prob"],
        default=0.1,
        help="Fraction of samples whose label becomes the null class.",
    )


def add_training_arguments(parser):
    """Flags of the loss, the batch and the optimizer."""
    train = parser.add_argument_group("training")
    train.add_argument("--recipe", choices=RECIPES, help="Settings of a paper; other flags override single values.")
    train.add_argument(
        "--objective", choices=OBJECTIVES, help="Training objective; by default velocity, for a JiT clamped_velocity."
    )
    train.add_argument(
        "--time_sampling",
        choices=TIME_SAMPLERS,
        default="logit_normal",
        help="Distribution of sigma, for velocity and clamped_velocity.",
    )
    train.add_argument("--time_mean", type=real(), help="Mean of the logit of sigma; by default 0, for a JiT 0.8.")
    train.add_argument(
        "--time_std", type=POSITIVE, help="Standard deviation of the logit of sigma; by default 1, for a JiT 0.8."
    )
    train.add_argument("--time_shift", type=POSITIVE, default=1.0, help="Shift of sigma, in the sampler as well.")
    train.add_argument(
        "--snr_gamma", type=SNR_GAMMA, help="Bound of min-SNR weights for epsilon, at most 1e6; by default none."
    )
    train.add_argument(
        "--cosine_loss",
        action="store_true",
        help="Add LightningDiT's direction loss, for velocity and clamped_velocity.",
    )
    train.add_argument(
        "--flow_matching_ratio",
        type=FRACTION,
        default=0.75,
        help="Fraction of samples that train the velocity, for meanflow, soflow and distillation.",
    )
    train.add_argument(
        "--target_guidance_scale",
        type=GUIDANCE,
        default=1.0,
        help="Guidance that is trained into the weights; with distillation, of the teacher.",
    )
    train.add_argument(
        "--target_guidance_mix",
        type=FRACTION,
        default=1.0,
        help="Weight of the training image's velocity in the target; the rest is the network's own prediction.",
    )
    train.add_argument(
        "--target_guidance_start", type=FRACTION, default=0.0, help="Noise level from which targets are guided."
    )
    train.add_argument(
        "--target_guidance_end", type=FRACTION, default=1.0, help="Noise level up to which targets are guided."
    )
    train.add_argument(
        "--target_guided",
        choices=GUIDED,
        default="all",
        help="Guide all targets, or those of jumps alone, so that the model keeps its velocity.",
    )
    train.add_argument(
        "--solution_steps",
        type=real(above=0, at_most=1),
        nargs=2,
        default=[0.1, 0.002],
        metavar=("FIRST", "LAST"),
        help="Distance of the points that SoFlow compares, as a fraction of the jump, at the first and the last step.",
    )
    train.add_argument(
        "--adversarial_weight",
        type=WEIGHT,
        default=0.0,
        help="Weight of a discriminator on the teacher's features, for distillation, at most 1000; 0 is none.",
    )
    train.add_argument(
        "--proj_coeff",
        type=RANGES["proj_coeff"],
        default=0.0,
        help="Weight of REPA's alignment, at most 1000; 0 is none.",
    )
    train.add_argument("--alignment_depth", type=COUNT, default=4, help="Block whose tokens are aligned, from 1.")
    train.add_argument("--balance_classes", action="store_true", help="Sample all classes equally often.")
    batch = train.add_mutually_exclusive_group()
    batch.add_argument(
        "--total_batch_size",
        type=RANGES["total_batch_size"],
        default=128,
        help="Samples per optimizer step, over all processes.",
    )
    batch.add_argument(
        "--train_batch_size", type=COUNT, help="Samples per micro-batch and process, instead of --total_batch_size."
    )
    train.add_argument(
        "--gradient_accumulation_steps",
        type=RANGES["gradient_accumulation_steps"],
        default=1,
        help="Micro-batches per step and process.",
    )
    train.add_argument(
        "--gradient_checkpointing", action="store_true", help="Save memory at the cost of one more forward pass."
    )
    train.add_argument("--on_spike", choices=POLICIES, default="skip", help="What to do at a spike of the loss.")
    train.add_argument("--max_train_steps", type=RANGES["max_train_steps"], default=4000, help="Optimizer steps.")
    train.add_argument(
        "--learning_rate", type=RANGES["learning_rate"], default=1e-3, help="Peak learning rate, at most 10."
    )
    train.add_argument(
        "--layer_decay",
        type=RANGES["layer_decay"],
        default=1.0,
        help="Learning rate of a block relative to the next block.",
    )
    train.add_argument(
        "--lr_scheduler", choices=SCHEDULES, default="cosine", help="Learning rate schedule of diffusers."
    )
    train.add_argument(
        "--lr_warmup_steps", type=RANGES["lr_warmup_steps"], default=100, help="Steps of linear warm-up."
    )
    train.add_argument("--adam_beta2", type=RANGES["adam_beta2"], default=0.99, help="AdamW's second beta.")
    train.add_argument(
        "--weight_decay", type=RANGES["weight_decay"], default=0.0, help="AdamW's weight decay, at most 1000."
    )
    train.add_argument("--use_8bit_adam", action="store_true", help="Use the 8-bit AdamW of bitsandbytes.")
    train.add_argument(
        "--max_grad_norm", type=RANGES["max_grad_norm"], default=1.0, help="Norm to clip gradients to; `inf` for none."
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
        help="Let the decay rise to --ema_decay, for short runs.",
    )
    train.add_argument(
        "--ema_profiles",
        action="store_true",
        help="Store snapshots for `python -m dit_hf.commands.choose_ema` in OUTPUT_DIR/ema.",
    )
    train.add_argument(
        "--mixed_precision",
        choices=("no", "fp16", "bf16"),
        help="Mixed precision; by default that of accelerate's configuration.",
    )
    train.add_argument(
        "--compile_blocks",
        action=argparse.BooleanOptionalAction,
        help="Compile the blocks, in about a minute; by default on a CUDA device only.",
    )
    train.add_argument(
        "--allow_tf32",
        action=argparse.BooleanOptionalAction,
        help="Let float32 products use TF32; by default on a CUDA device only.",
    )
    train.add_argument("--attention_backend", help="Attention backend of diffusers: native, _native_cudnn, flash ...")
    train.add_argument(
        "--float8", action="store_true", help="Run the matrix products of the blocks in float8; needs torchao."
    )
    train.add_argument("--seed", type=RANGES["seed"], default=0, help="Seed of weights, order and random numbers.")


def add_output_arguments(parser):
    """Flags of output, validation and publishing."""
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output_dir", type=Path, required=True, help="Folder for cache, checkpoints, samples and final pipeline."
    )
    output.add_argument(
        "--checkpointing_steps",
        type=RANGES["checkpointing_steps"],
        default=500,
        help="Steps between checkpoints.",
    )
    output.add_argument(
        "--checkpoints_total_limit",
        type=RANGES["checkpoints_total_limit"],
        default=2,
        help="Number of checkpoints to keep.",
    )
    output.add_argument(
        "--resume_from_checkpoint",
        default="latest",
        metavar="{latest,never,PATH}",
        help="Checkpoint to resume from: latest, or the newest by name; `never` refuses a folder with checkpoints.",
    )
    output.add_argument(
        "--validation_steps",
        type=RANGES["validation_steps"],
        default=500,
        help="Steps between validations: a sample grid, and metrics if there are any.",
    )
    output.add_argument(
        "--logging_steps",
        type=RANGES["logging_steps"],
        help="Steps between writes of the log, which wait for the device; by default 1 on a CPU, 50 on a GPU.",
    )
    output.add_argument(
        "--dataloader_num_workers",
        type=RANGES["dataloader_num_workers"],
        help="Threads that prepare batches; by default 1 on a CPU, 4 on a GPU.",
    )
    output.add_argument("--validation_classes", type=COUNT, default=10, help="Rows of a sample grid.")
    output.add_argument("--validation_images_per_class", type=COUNT, default=8, help="Columns of a sample grid.")
    output.add_argument(
        "--validation_inference_steps",
        type=COUNT,
        help="Sampling steps of validation samples; by default 25, for flow maps 1, for distillation 4.",
    )
    output.add_argument("--validation_split", help="Split of held-out images to compare the samples with.")
    output.add_argument(
        "--validation_metrics",
        type=names,
        default=["fd"],
        help=f"Metrics of the comparison, separated by commas: {', '.join(HELD_OUT_METRICS)}.",
    )
    output.add_argument(
        "--metric_for_best_model",
        help="One of --validation_metrics: the best checkpoint by it is kept beside the last ones; by default none.",
    )
    output.add_argument(
        "--load_best_model_at_end",
        action="store_true",
        help="Save the weights of the best checkpoint instead of the last ones.",
    )
    output.add_argument(
        "--validation_images", type=COUNT, default=1000, help="Maximum number of images of --validation_split."
    )
    output.add_argument(
        "--guidance_scale", type=GUIDANCE, default=3.0, help="Guidance scale of validation samples, at most 1000."
    )
    output.add_argument("--dry_run", action="store_true", help="Print the cost of the run and write nothing.")
    output.add_argument("--report_to", help="Tracker of accelerate: tensorboard, wandb ...")
    output.add_argument(
        "--push_to_hub", action="store_true", help="Publish samples during training, the pipeline at the end."
    )
    output.add_argument(
        "--hub_model_id", help="Repository of --push_to_hub; by default the name of the output folder."
    )
    output.add_argument("--license", help="Licence on the model card, the Hub's identifier, such as apache-2.0.")
