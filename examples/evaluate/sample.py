#!/usr/bin/env python
"""Generates a seeded set of images for evaluation; the same command as `dit-hf sample`.

python examples/evaluate/sample.py --pretrained_model_name_or_path emoji64 --output_dir outputs/samples
dit-hf sample --pretrained_model_name_or_path emoji64 --output_dir outputs/samples
accelerate launch --module dit_hf.commands.sample --pretrained_model_name_or_path emoji64 --output_dir outputs/samples
"""

from dit_hf.command_line import run
from dit_hf.commands.sample import main


if __name__ == "__main__":
    run(main)
