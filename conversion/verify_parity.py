#!/usr/bin/env python
"""Measures whether a converted pipeline computes what its checkpoint computes; the same as `dit-hf verify`.

python conversion/verify_parity.py --checkpoint_path DiT-XL-2-256x256.pt --model_path dit-xl-2-256
dit-hf verify --checkpoint_path DiT-XL-2-256x256.pt --pretrained_model_name_or_path dit-xl-2-256
"""

from dit_hf.command_line import run
from dit_hf.commands.verify import main


if __name__ == "__main__":
    run(main)
