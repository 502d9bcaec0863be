#!/usr/bin/env python
"""Private memory of a conversion, verification included, over the size of the checkpoint.

    python benchmarks/conversion_memory.py --preset DiT-XL/2
    python benchmarks/conversion_memory.py --preset JiT-B/16 --family jit

Expected: at most 1.3, beyond what the imports take; a minute and 5 GB of disk for XL/2. Prints JSON. Linux only: the
value is the peak of `RssAnon`, sampled every 5 ms.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from timing import peak_memory

from dit_hf.checkpoints import FAMILIES
from dit_hf.checkpoints.autoencoders import original_autoencoder
from dit_hf.checkpoints.saving import original_state_dict
from dit_hf.command_line import run
from dit_hf.models import MODELS
from dit_hf.presets import DDT_PRESETS, JIT_PRESETS, PRESETS


# VA-VAE's autoencoder, f16d32.
AUTOENCODER = "VA-VAE"
LAYOUT = {
    "block_out_channels": (128, 128, 256, 256, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
    "up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 32,
}
CONVERT = Path(__file__).parents[1] / "conversion" / "convert_original_to_hf.py"


def measure(preset, family, folder):
    """Writes a checkpoint of random weights, converts it, and compares with a process that only imports."""
    file, statistics = folder / "checkpoint.pt", folder / "latents_stats.pt"
    if preset == AUTOENCODER:
        flags = ["--family", "vavae", "--latents_stats", statistics]
        torch.save(original_autoencoder(AutoencoderKL(**LAYOUT)), file)
        torch.save({"mean": torch.zeros(32), "std": torch.ones(32)}, statistics)
    else:
        row = FAMILIES[family]
        model = MODELS[row.model].from_preset(preset, **row.fixed_options)
        torch.nn.init.normal_(model.proj_out.weight)  # a fresh head is zero, and so are all outputs
        weights = row.file_keys(original_state_dict(model, row))
        torch.save({row.wrapper: weights} if row.wrapper else weights, file)
        flags = ["--family", family]
        if "in_context_start" in model.config:
            flags += ["--in_context_start", str(model.config.in_context_start)]
    # Otherwise glibc keeps freed tensors for itself, as many as chance has it: the value varied by 34 MB.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "131072")
    baseline = peak_memory([sys.executable, "-c", "import dit_hf.commands.convert, time; time.sleep(0.5)"])
    started = time.time()
    command = [sys.executable, CONVERT, "--checkpoint_path", file, "--output_dir", folder / "out", *flags]
    peak = peak_memory(command)
    return {
        "preset": preset,
        "checkpoint_bytes": file.stat().st_size,
        "imports_bytes": baseline,
        "peak_bytes": peak,
        "ratio": round((peak - baseline) / file.stat().st_size, 3),
        "seconds": round(time.time() - started, 1),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    presets = (*PRESETS, *JIT_PRESETS, *DDT_PRESETS, AUTOENCODER)
    parser.add_argument("--preset", choices=presets, default="DiT-XL/2", help="Size of the model.")
    families = [name for name, family in FAMILIES.items() if not (family.training_only and family.needs_training_only)]
    parser.add_argument("--family", choices=families, default="dit", help="Code base of the checkpoint.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(args.preset, args.family, Path(folder)), indent=2))


if __name__ == "__main__":
    run(main)
