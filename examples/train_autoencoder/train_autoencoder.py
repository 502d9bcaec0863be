#!/usr/bin/env python
"""Trains a small `AutoencoderKL` for 64×64 images (latents 16×16×4): L1 + KL + EfficientNet-Lite0 perceptual loss.

    python examples/train_autoencoder/train_autoencoder.py --dataset_name outputs/emoji64 \
        --output_dir outputs/autoencoder

Expected: 0.73 s per step of 32 images on 2 cores. Re-run the same command to resume; Ctrl-C ends with exit code 130.

Shapes: `B` images of a batch, `(B, 3, H, W)` pixels in [-1, 1], `(B, 4, H/4, W/4)` latents.
"""

import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.optimization import get_cosine_schedule_with_warmup
from PIL import Image
from tqdm import tqdm

from dit_hf.command_line import ArgumentParser, run
from dit_hf.data.folders import check_output_outside_data
from dit_hf.data.images import load_image_dataset
from dit_hf.data.pixels import normalize_pixels
from dit_hf.data.reader import ImageReader
from dit_hf.evaluation.features import EfficientNetLite0
from dit_hf.training.batches import SeededBatches
from dit_hf.training.checkpointing import checkpoint_step, list_checkpoints, save_checkpoint
from dit_hf.training.ema import WeightAverage
from dit_hf.training.records import check_same_settings, record_settings, truncate_log
from dit_hf.training.running import only_run, start_accelerator


# Settings that a resumed run may change; any other makes it another run.
MAY_CHANGE = (
    *("max_train_steps", "output_dir", "checkpointing_steps", "checkpoints_total_limit", "validation_images"),
    "resume_from_checkpoint",
)


def build_autoencoder(resolution, block_out_channels, latent_channels):
    """A convolutional autoencoder without attention; three levels make latents of a quarter of the side."""
    levels = len(block_out_channels)
    return AutoencoderKL(
        sample_size=resolution,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=block_out_channels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        force_upcast=False,
    )


def perceptual_distance(real_stages, reconstructed_stages):
    """Squared distance of channel-normalised feature maps, summed over channels and stages (LPIPS without weights)."""
    pairs = zip(real_stages, reconstructed_stages, strict=True)
    normalized = ((F.normalize(real, dim=1), F.normalize(made, dim=1)) for real, made in pairs)
    return sum((real - made).square().sum(dim=1).mean() for real, made in normalized)


def autoencoder_loss(vae, features, images, posterior_noise, args):
    """The terms of one batch; `loss` is their weighted sum."""
    posterior = vae.encode(images).latent_dist
    reconstruction = vae.decode(posterior.mean + posterior.std * posterior_noise).sample
    with torch.no_grad():
        real_stages = features.stages(images)
    terms = {
        "l1": (reconstruction - images).abs().mean(),
        "perceptual": perceptual_distance(real_stages, features.stages(reconstruction)),
        "kl": 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean(),
    }
    terms["loss"] = terms["l1"] + args.perceptual_weight * terms["perceptual"] + args.kl_weight * terms["kl"]
    return terms


@torch.no_grad()
def validate(vae, images, path):
    """PSNR in dB of the reconstructed held-out images; saves a grid of the first 32 and their reconstructions."""
    made = [vae.decode(vae.encode(batch).latent_dist.mode()).sample.clamp(-1, 1) for batch in images.split(64)]
    made = torch.cat(made)
    squared_error = ((made - images) / 2).square().mean(dim=(1, 2, 3))
    pairs = zip(images[:32].split(16), made[:32].split(16), strict=True)
    rows = [torch.cat(list(row), dim=2) for pair in pairs for row in pair]
    grid = ((torch.cat(rows, dim=1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    Image.fromarray(grid.cpu().numpy()).save(path)
    return float(-10 * squared_error.log10().mean())


def parse_args():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", required=True, help="Hub id or folder with a train and a test split.")
    parser.add_argument("--holdout", type=float, default=0.0, help="Fraction to hold out of data with one split.")
    parser.add_argument("--image_column", default="image", help="Column with images.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Checkpoints, samples and the final weights.")
    parser.add_argument("--resolution", type=int, default=64, help="Pixels per side.")
    parser.add_argument("--block_out_channels", type=int, nargs="+", default=[24, 48, 96], help="Channels per level.")
    parser.add_argument("--latent_channels", type=int, default=4, help="Channels of the latents.")
    parser.add_argument("--train_batch_size", type=int, default=32, help="Images per step.")
    parser.add_argument("--max_train_steps", type=int, default=3000, help="Optimizer steps.")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="Peak of the cosine schedule.")
    parser.add_argument("--lr_warmup_steps", type=int, default=100, help="Steps of linear warm-up.")
    parser.add_argument("--perceptual_weight", type=float, default=0.3, help="Weight of the feature distance.")
    parser.add_argument("--perceptual_resolution", type=int, default=64, help="Pixels per side for the features.")
    parser.add_argument("--kl_weight", type=float, default=1e-3, help="Weight of the mean KL of a latent value.")
    parser.add_argument("--max_grad_norm", type=float, default=1.0, help="Gradient clipping.")
    parser.add_argument("--ema_decay", type=float, default=0.995, help="Decay of the averaged weights.")
    parser.add_argument("--checkpointing_steps", type=int, default=250, help="Steps between checkpoints.")
    parser.add_argument("--checkpoints_total_limit", type=int, default=2, help="Checkpoints kept.")
    parser.add_argument(
        "--resume_from_checkpoint",
        default="latest",
        help="`latest` of OUTPUT_DIR if any, a checkpoint's path, or `never`.",
    )
    parser.add_argument("--validation_images", type=int, default=256, help="Held-out images reconstructed.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the order, flips and noise.")
    return parser.parse_args()


def start_checkpoint(args):
    """The checkpoint to start from and its step; no later one may be in the output folder."""
    found, asked = list_checkpoints(args.output_dir), args.resume_from_checkpoint
    path = None if asked == "never" else Path(asked)
    if asked == "latest":
        path = found[-1] if found else None
    if path is not None and path not in list_checkpoints(path.parent):
        raise ValueError(
            f"--resume_from_checkpoint {asked} is no checkpoint; pass `latest`, `never` or a checkpoint-N."
        )
    step = 0 if path is None else checkpoint_step(path)
    if later := [other.name for other in found if checkpoint_step(other) > step]:
        raise ValueError(
            f"{args.output_dir} has {later[-1]}, later than --resume_from_checkpoint {asked}; choose a new "
            "--output_dir."
        )
    return path, step


def read_images(args):
    """Training images, uint8, and held-out images in [-1, 1]."""
    parts = []
    for split in ("train", "test"):
        dataset = load_image_dataset(args.dataset_name, split, holdout=args.holdout)
        if split == "test":
            chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[: args.validation_images]
            dataset = dataset.select(chosen.tolist())
        reader = ImageReader(dataset, resolution=args.resolution, image_column=args.image_column)
        print(f"{split}: {reader.describe()}")
        parts.append(reader.stack()[0])
    return parts[0], normalize_pixels(parts[1])


def main():
    args = parse_args()
    check_output_outside_data(args.output_dir, args.dataset_name)
    accelerator = start_accelerator()
    if accelerator.num_processes > 1:
        raise ValueError(f"This script trains in one process; it was started in {accelerator.num_processes}.")
    print(json.dumps(vars(args), indent=2, default=str))
    with only_run(args.output_dir):
        train(args, accelerator)


def train(args, accelerator):
    """All steps, from the checkpoint to start from."""
    checkpoint, step = start_checkpoint(args)
    if checkpoint is not None:
        check_same_settings(checkpoint.parent / "training_config.json", vars(args), MAY_CHANGE)
    images, held_out = read_images(args)
    held_out = held_out.to(accelerator.device)
    record_settings(args.output_dir / "training_config.json", vars(args))

    torch.manual_seed(args.seed)
    vae = build_autoencoder(args.resolution, args.block_out_channels, args.latent_channels)
    vae.to(accelerator.device, memory_format=torch.channels_last)
    features = EfficientNetLite0(args.perceptual_resolution)
    features.to(accelerator.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.lr_warmup_steps, args.max_train_steps)
    ema = WeightAverage(vae.parameters(), decay=args.ema_decay)
    vae, optimizer, schedule = accelerator.prepare(vae, optimizer, schedule)
    accelerator.register_for_checkpointing(ema)
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
    truncate_log(args.output_dir / "train_log.jsonl", step)

    batches = SeededBatches(len(images), args.train_batch_size, args.seed)
    latent_side = args.resolution // 2 ** (len(args.block_out_channels) - 1)
    noise_shape = (args.train_batch_size, args.latent_channels, latent_side, latent_side)

    started, first = time.time(), step
    progress = tqdm(total=args.max_train_steps, initial=step, mininterval=10)
    with open(args.output_dir / "train_log.jsonl", "a", encoding="utf-8") as log:
        while step < args.max_train_steps:
            generator = batches.generator(step)
            batch = normalize_pixels(images[batches.indices(step)])
            flip = torch.rand(len(batch), generator=generator) < 0.5
            batch = torch.where(flip[:, None, None, None], batch.flip(-1), batch)
            noise = torch.randn(noise_shape, generator=generator)
            batch = batch.to(accelerator.device, memory_format=torch.channels_last)
            terms = autoencoder_loss(vae, features, batch, noise.to(accelerator.device), args)
            accelerator.backward(terms["loss"])
            accelerator.clip_grad_norm_(vae.parameters(), args.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            ema.step(vae.parameters())
            step += 1
            progress.update()
            record = {"step": step} | {name: term.item() for name, term in terms.items()}
            if step % args.checkpointing_steps == 0 or step == args.max_train_steps:
                ema.store(vae.parameters())
                ema.copy_to(vae.parameters())
                record["psnr"] = validate(vae, held_out, args.output_dir / f"reconstruction-{step:06d}.png")
                accelerator.unwrap_model(vae).save_pretrained(args.output_dir / "vae")
                ema.restore(vae.parameters())
                save_checkpoint(accelerator, args.output_dir, step, args.checkpoints_total_limit)
                record["seconds_per_step"] = (time.time() - started) / (step - first)
                progress.write(json.dumps(record))
            log.write(json.dumps(record) + "\n")
            log.flush()
    print(f"Autoencoder: {args.output_dir / 'vae'}")


if __name__ == "__main__":
    run(main)
