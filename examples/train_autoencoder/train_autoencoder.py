#!/usr/bin/env python
"""Trains a small `AutoencoderKL` for 64×64 images (latents 16×16×4): L1 + KL + EfficientNet-Lite0 perceptual loss.

    python examples/train_autoencoder/train_autoencoder.py --dataset_name outputs/emoji64 \
        --output_dir outputs/autoencoder

Expected: 0.73 s per step of 32 images on 2 cores. Re-run the same command to resume; Ctrl-C saves and ends with
exit code 130.

Shapes: `B` images of a batch, `(B, 3, H, W)` pixels in [-1, 1], `(B, 4, H/4, W/4)` latents.
"""

import json
import sys
import time
from pathlib import Path
from signal import Signals

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.optimization import get_cosine_schedule_with_warmup
from PIL import Image
from tqdm import tqdm

from dit_hf.command_line import ArgumentParser, integer, real, run
from dit_hf.data.images import load_image_dataset
from dit_hf.data.pixels import normalize_pixels
from dit_hf.data.reader import ImageReader
from dit_hf.evaluation.features import EfficientNetLite0
from dit_hf.files import check_apart, check_folder, writing_folder
from dit_hf.training.batches import SeededBatches
from dit_hf.training.checkpointing import (
    check_resumable,
    checkpoint_to_resume,
    resume_from,
    save_checkpoint,
)
from dit_hf.training.config import COUNT, RANGES, WEIGHT
from dit_hf.training.ema import WeightAverage
from dit_hf.training.guard import TrainingStopped, check_losses
from dit_hf.training.records import (
    append_record,
    begin,
    check_fresh_start,
    check_same_settings,
    read_losses,
    record_settings,
    truncate_log,
)
from dit_hf.training.running import StopRequest, lock_folder, start_accelerator


SETTINGS_FILE, LOG_FILE = "training_config.json", "train_log.jsonl"
# What a run writes beside its checkpoints.
RESULTS = (LOG_FILE, "vae", "reconstruction-*.png")
# Groups of a normalisation, which the channels are divided into.
GROUPS = 8
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
        norm_num_groups=GROUPS,
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
    parser.add_argument(
        "--holdout", type=real(at_least=0, below=1), default=0.0, help="Fraction to hold out of data with one split."
    )
    parser.add_argument("--image_column", default="image", help="Column with images.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Checkpoints, samples and the final weights.")
    parser.add_argument("--resolution", type=integer(at_least=8), default=64, help="Pixels per side.")
    parser.add_argument(
        "--block_out_channels", type=integer(at_least=1), nargs="+", default=[24, 48, 96], help="Channels per level."
    )
    parser.add_argument("--latent_channels", type=COUNT, default=4, help="Channels of the latents.")
    parser.add_argument("--train_batch_size", type=COUNT, default=32, help="Images per step.")
    parser.add_argument("--max_train_steps", type=COUNT, default=3000, help="Optimizer steps.")
    parser.add_argument(
        "--learning_rate", type=RANGES["learning_rate"], default=1e-3, help="Peak of the cosine schedule."
    )
    parser.add_argument(
        "--lr_warmup_steps", type=RANGES["lr_warmup_steps"], default=100, help="Steps of linear warm-up."
    )
    parser.add_argument("--perceptual_weight", type=WEIGHT, default=0.3, help="Weight of the feature distance.")
    parser.add_argument(
        "--perceptual_resolution", type=integer(at_least=32), default=64, help="Pixels per side for the features."
    )
    parser.add_argument("--kl_weight", type=WEIGHT, default=1e-3, help="Weight of the mean KL of a latent value.")
    parser.add_argument("--max_grad_norm", type=RANGES["max_grad_norm"], default=1.0, help="Gradient clipping.")
    parser.add_argument("--ema_decay", type=RANGES["ema_decay"], default=0.995, help="Decay of the averaged weights.")
    parser.add_argument("--checkpointing_steps", type=COUNT, default=250, help="Steps between checkpoints.")
    parser.add_argument("--checkpoints_total_limit", type=COUNT, default=2, help="Checkpoints kept.")
    parser.add_argument(
        "--resume_from_checkpoint",
        default="latest",
        help="`latest` of OUTPUT_DIR if any, one of its checkpoints, or `never`.",
    )
    parser.add_argument("--validation_images", type=COUNT, default=256, help="Held-out images reconstructed.")
    parser.add_argument("--seed", type=RANGES["seed"], default=0, help="Seed of the order, flips and noise.")
    return parser.parse_args()


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
    check_folder(args.output_dir, "--output_dir")
    check_apart(args.output_dir, args.dataset_name, "--output_dir")
    factor = 2 ** (len(args.block_out_channels) - 1)
    if args.resolution % factor or any(channels % GROUPS for channels in args.block_out_channels):
        raise ValueError(
            f"--resolution {args.resolution} must be divisible by {factor}, and --block_out_channels by {GROUPS}."
        )
    checkpoint = checkpoint_to_resume(args.output_dir, args.resume_from_checkpoint)
    if checkpoint is None:
        check_fresh_start(args.output_dir, RESULTS, SETTINGS_FILE)
    else:
        check_same_settings(checkpoint.parent / SETTINGS_FILE, vars(args), MAY_CHANGE)
        check_resumable(checkpoint)
    accelerator = start_accelerator()
    if accelerator.num_processes > 1:
        raise ValueError(f"This script trains in one process; it was started in {accelerator.num_processes}.")
    print(json.dumps(vars(args), indent=2, default=str))
    images, held_out = read_images(args)
    SeededBatches(len(images), args.train_batch_size)  # too large a batch, before the work
    with lock_folder(args.output_dir), StopRequest() as stop:
        step = Training(args, accelerator, images, held_out).run(stop)
    if step < args.max_train_steps:
        print(f"Stopped at step {step} by {Signals(stop.signal).name}; run the same command again to resume.")
        sys.exit(128 + stop.signal)
    print(f"Autoencoder: {args.output_dir / 'vae'}")


class Training:
    """One run: networks, optimizer and data, and where it is."""

    def __init__(self, args, accelerator, images, held_out):
        self.args, self.accelerator, self.images = args, accelerator, images
        self.held_out = held_out.to(accelerator.device)
        torch.manual_seed(args.seed)
        vae = build_autoencoder(args.resolution, args.block_out_channels, args.latent_channels)
        vae.to(accelerator.device, memory_format=torch.channels_last)
        self.features = EfficientNetLite0(args.perceptual_resolution)
        self.features.to(accelerator.device, memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
        self.schedule = get_cosine_schedule_with_warmup(optimizer, args.lr_warmup_steps, args.max_train_steps)
        self.ema = WeightAverage(vae.parameters(), decay=args.ema_decay)
        self.vae, self.optimizer = accelerator.prepare(vae, optimizer)
        self.states = {"ema": self.ema, "schedule": self.schedule}
        self.batches = SeededBatches(len(images), args.train_batch_size, args.seed)

    def start(self):
        """Resumes, and records the settings; the number of finished steps."""
        args = self.args
        step = resume_from(self.accelerator, args.output_dir, args.resume_from_checkpoint, self.states)
        truncate_log(args.output_dir / LOG_FILE, step)
        record_settings(args.output_dir / SETTINGS_FILE, vars(args))
        begin(args.output_dir, resumed=step > 0)
        return step

    def run(self, stop):
        """All steps, until the last or a signal; the number of finished ones."""
        args = self.args
        started, step = time.time(), self.start()
        first, stopped = step, False
        progress = tqdm(total=args.max_train_steps, initial=step, mininterval=10)
        while step < args.max_train_steps and not stopped:
            record = self.step(step)
            step += 1
            progress.update()
            stopped = stop.signal != 0 and step < args.max_train_steps
            if step == args.max_train_steps:  # before `vae` is replaced
                losses = read_losses(args.output_dir / LOG_FILE) if step > 1 else []
                check_losses([*losses, record["loss"]], must_fall=args.learning_rate > 0)
            if step % args.checkpointing_steps == 0 or step == args.max_train_steps:
                record["psnr"] = self.validate(step)
                record["seconds_per_step"] = (time.time() - started) / (step - first)
                progress.write(json.dumps(record))
                self.save(step, record)
            elif stopped:
                self.save(step, record)
            else:
                append_record(args.output_dir / LOG_FILE, record)
        return step

    def step(self, step):
        """One optimizer step; its record for the log."""
        args, device = self.args, self.accelerator.device
        generator = self.batches.generator(step)
        batch = normalize_pixels(self.images[self.batches.indices(step)])
        flip = torch.rand(len(batch), generator=generator) < 0.5
        batch = torch.where(flip[:, None, None, None], batch.flip(-1), batch)
        side = args.resolution // 2 ** (len(args.block_out_channels) - 1)
        noise = torch.randn((args.train_batch_size, args.latent_channels, side, side), generator=generator)
        batch = batch.to(device, memory_format=torch.channels_last)
        terms = autoencoder_loss(self.vae, self.features, batch, noise.to(device), args)
        self.accelerator.backward(terms["loss"])
        norm = self.accelerator.clip_grad_norm_(self.vae.parameters(), args.max_grad_norm)
        if not (terms["loss"].isfinite() and norm.isfinite()):
            raise TrainingStopped(
                f"Step {step + 1} is not finite: loss {terms['loss'].item()}, gradient norm {float(norm)}. The "
                "checkpoints are of before; a lower --learning_rate may help."
            )
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.ema.step(self.vae.parameters())
        return {"step": step + 1} | {name: term.item() for name, term in terms.items()}

    def validate(self, step):
        """PSNR of the averaged weights, which are saved as `vae`."""
        folder, parameters = self.args.output_dir, list(self.vae.parameters())
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        psnr = validate(self.vae, self.held_out, folder / f"reconstruction-{step:06d}.png")
        with writing_folder(folder / "vae") as partial:
            self.accelerator.unwrap_model(self.vae).save_pretrained(partial)
        self.ema.restore(parameters)
        return psnr

    def save(self, step, record):
        """The record and a checkpoint."""
        append_record(self.args.output_dir / LOG_FILE, record)
        limit = self.args.checkpoints_total_limit
        save_checkpoint(self.accelerator, self.args.output_dir, step, limit, self.states)


if __name__ == "__main__":
    run(main)
