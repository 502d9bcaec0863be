#!/usr/bin/env python
"""Compares sampling settings by their metrics; the same command as `dit-hf sweep`.

python examples/evaluate/sweep.py --pretrained_model_name_or_path emoji64 --reference outputs/emoji64 \
    --scheduler flow_euler --guidance_scale 1.5 3 4.5 --output_dir outputs/sweep
"""

from dit_hf.command_line import run
from dit_hf.commands.sweep import main


if __name__ == "__main__":
    run(main)
