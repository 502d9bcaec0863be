"""Arguments of `train_dit.py`, and what they mean to resuming and to model cards."""

import argparse
from pathlib import Path

from preparation import add_data_arguments, positive

from dit_hf.presets import PRESETS
from dit_hf.training.guard import POLICIES
from dit_hf.training.recipes import RECIPES


SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")

# What a resumed run may change; all else would make it another run.
MAY_CHANGE = (
    *("max_train_steps", "output_dir", "checkpointing_steps", "checkpoints_total_limit", "guidance_scale"),
    *("push_to_hub", "hub_model_id", "license", "dry_run", "on_spike", "gradient_checkpointing", "report_to"),
    *("validation_steps", "validation_classes", "validation_images_per_class", "validation_inference_steps"),
    *("validation_split", "validation_images"),
)

# What a model card shows of the settings.
RECIPE_ON_CARD = (
    *(
        "dataset_name",
        "train_data_dir",
        "resolution",
        "recipe",
        "objective",
        "time_sampling",
        "snr_gamma",
        "cosine_loss",
        "proj_coeff",
        "alignment_encoder",
        "alignment_depth",
        "max_train_steps",
        "train_batch_size",
    ),
    *("learning_rate", "lr_scheduler", "lr_warmup_steps", "adam_beta2", "weight_decay", "ema_decay"),
    *("class_dropout_prob", "flip_probability", "balance_classes", "mixed_precision", "seed"),
)


# Flags that a user would be hurt by if they were silently ignored: flag, when, and why.
IGNORED = (
    ("snr_gamma", lambda args: args.objective == "velocity", "on velocity"),
    ("cosine_loss", lambda args: args.objective == "epsilon", "on epsilon"),
    ("time_sampling", lambda args: args.objective == "epsilon", "on epsilon"),
    ("lora_alpha", lambda args: args.lora_rank is None, "without --lora_rank"),
    ("push_to_hub", lambda args: args.lora_rank is not None, "with --lora_rank; `hf upload` sends the adapters"),
    ("ema_profiles", lambda args: args.lora_rank is not None, "with --lora_rank"),
    ("freeze", lambda args: args.pretrained_model_name_or_path is None, "without --pretrained_model_name_or_path"),
    ("lora_rank", lambda args: args.pretrained_model_name_or_path is None, "without --pretrained_model_name_or_path"),
    ("dataset_name", lambda args: args.latents_dir is not None, "with --latents_dir, which stands for a dataset"),
    ("train_data_dir", lambda args: args.latents_dir is not None, "with --latents_dir, which stands for a dataset"),
    ("streaming", lambda args: args.latents_dir is not None, "with --latents_dir"),
    ("cache_latents", lambda args: args.latents_dir is not None, "with --latents_dir"),
    ("validation_split", lambda args: args.latents_dir is not None, "with --latents_dir, which leaves out the images"),
    ("alignment_depth", lambda args: args.proj_coeff == 0, "without --proj_coeff"),
)


def parse_args(description):
    """The command line; a recipe sets what is not given."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_data_arguments(parser)
    data = parser.add_argument_group("latents")
    data.add_argument("--latents_dir", type=Path, help="Precomputed latents instead of a dataset.")
    data.add_argument(
        "--cache_latents",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Encode once into OUTPUT_DIR/latents, or as images are drawn.",
    )
    data.add_argument("--flip_probability", type=float, default=0.5, help="Share of mirrored images.")
    model = parser.add_argument_group("model")
    size = model.add_mutually_exclusive_group(required=True)
    size.add_argument("--preset", choices=PRESETS, help="A size of the paper.")
    size.add_argument("--transformer_config", type=Path, help="JSON with arguments of DiTTransformer2DModel.")
    size.add_argument("--pretrained_model_name_or_path", help="Pipeline folder or Hub id whose weights to start from.")
    model.add_argument("--lora_rank", type=positive, help="Train adapters of this rank instead of all weights.")
    model.add_argument("--lora_alpha", type=positive, help="Adapters count alpha / rank; the rank if not given.")
    model.add_argument("--freeze", nargs="+", default=[], help="Parts to keep: time_embed, transformer_blocks.0 ...")
    model.add_argument("--class_dropout_prob", type=float, default=0.1, help="Share of samples without a label.")
    train = parser.add_argument_group("training")
    train.add_argument("--recipe", choices=RECIPES, help="A paper's settings; other flags replace single values.")
    train.add_argument("--objective", choices=("velocity", "epsilon"), default="velocity", help="What is predicted.")
    train.add_argument(
        "--time_sampling", choices=("uniform", "logit_normal"), default="logit_normal", help="Of sigma."
    )
    train.add_argument("--snr_gamma", type=float, help="Bound of min-SNR weights for epsilon; none if not given.")
    train.add_argument("--cosine_loss", action="store_true", help="Add LightningDiT's direction loss to velocity.")
    train.add_argument("--proj_coeff", type=float, default=0.0, help="Weight of REPA's alignment; 0 is none.")
    train.add_argument("--alignment_depth", type=positive, default=4, help="Block whose tokens are aligned, from 1.")
    train.add_argument("--balance_classes", action="store_true", help="Draw all classes equally often.")
    train.add_argument(
        "--train_batch_size", type=positive, default=128, help="Samples of one step, over all processes."
    )
    train.add_argument(
        "--gradient_accumulation_steps",
        type=positive,
        default=1,
        help="Micro-batches that a process splits its share into.",
    )
    train.add_argument("--gradient_checkpointing", action="store_true", help="Less memory, more time.")
    train.add_argument("--on_spike", choices=POLICIES, default="skip", help="What a leap of the loss leads to.")
    train.add_argument("--max_train_steps", type=positive, default=4000, help="Optimizer steps.")
    train.add_argument("--learning_rate", type=float, default=1e-3, help="Peak learning rate.")
    train.add_argument("--layer_decay", type=float, default=1.0, help="A block's rate over that of the next one.")
    train.add_argument("--lr_scheduler", choices=SCHEDULES, default="cosine", help="Any of diffusers' schedules.")
    train.add_argument("--lr_warmup_steps", type=int, default=100, help="Steps of linear warm-up.")
    train.add_argument("--adam_beta2", type=float, default=0.99, help="AdamW's second beta.")
    train.add_argument("--weight_decay", type=float, default=0.0, help="AdamW's weight decay.")
    train.add_argument("--use_8bit_adam", action="store_true", help="AdamW of bitsandbytes.")
    train.add_argument("--max_grad_norm", type=float, default=1.0, help="Gradient clipping.")
    train.add_argument("--ema_decay", type=float, default=0.999, help="Decay of the averaged weights.")
    train.add_argument("--ema_profiles", action="store_true", help="Keep what choose_ema.py needs, in OUTPUT_DIR/ema.")
    train.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="accelerate's own if not given.")
    train.add_argument("--seed", type=int, default=0, help="Seed of weights, order and draws.")
    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", type=Path, required=True, help="Cache, checkpoints, samples, final pipeline.")
    output.add_argument("--checkpointing_steps", type=positive, default=500, help="Steps between checkpoints.")
    output.add_argument("--checkpoints_total_limit", type=positive, default=2, help="Checkpoints kept.")
    output.add_argument("--validation_steps", type=positive, default=500, help="Steps between sample grids.")
    output.add_argument("--validation_classes", type=positive, default=10, help="Rows of a sample grid.")
    output.add_argument("--validation_images_per_class", type=positive, default=8, help="Columns of a sample grid.")
    output.add_argument("--validation_inference_steps", type=positive, default=25, help="Sampler steps of a grid.")
    output.add_argument("--validation_split", help="Split whose images the samples' Fréchet distance is taken to.")
    output.add_argument("--validation_images", type=positive, default=1000, help="How many of them at most.")
    output.add_argument("--guidance_scale", type=float, default=3.0, help="Guidance of a grid.")
    output.add_argument("--dry_run", action="store_true", help="Print what the run would take, and write nothing.")
    output.add_argument("--report_to", help="Tracker of accelerate's: tensorboard, wandb ...")
    output.add_argument(
        "--push_to_hub", action="store_true", help="Publish samples on the way, the pipeline at the end."
    )
    output.add_argument("--hub_model_id", help="Repository; the output folder's name if not given.")
    output.add_argument("--license", help="On the model card; the Hub's identifier, such as apache-2.0.")
    recipe = parser.parse_known_args()[0].recipe
    parser.set_defaults(**RECIPES.get(recipe, {}))
    args = parser.parse_args()
    for flag, without_effect, why in IGNORED:
        if getattr(args, flag) != parser.get_default(flag) and without_effect(args):
            parser.error(f"--{flag} has no effect {why}")
    if args.hub_model_id is None:
        args.hub_model_id = args.output_dir.resolve().name
    if args.vae is None and args.latents_dir is not None and args.pretrained_model_name_or_path is None:
        args.vae = str(args.latents_dir / "vae")
    if args.vae is None and args.pretrained_model_name_or_path is None:
        parser.error("--vae is missing: a folder or Hub id of the autoencoder, such as the bundled model's vae folder")
    return args
