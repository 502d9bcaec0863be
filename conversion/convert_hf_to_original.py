#!/usr/bin/env python
"""Writes a pipeline's weights as a checkpoint that the original code loads; the same as `dit-hf export`.

python conversion/convert_hf_to_original.py --model_path dit-xl-2-256 --family dit --checkpoint_path back.pt
dit-hf export --pretrained_model_name_or_path dit-xl-2-256 --family dit --checkpoint_path back.pt
"""

from dit_hf.command_line import run
from dit_hf.commands.export import main


if __name__ == "__main__":
    run(main)
