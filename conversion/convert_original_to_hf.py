#!/usr/bin/env python
"""Converts an original checkpoint to a pipeline folder, and verifies it; the same as `dit-hf convert`.

python conversion/convert_original_to_hf.py --checkpoint_path DiT-XL-2-256x256.pt --output_dir dit-xl-2-256
dit-hf convert --checkpoint_path DiT-XL-2-256x256.pt --output_dir dit-xl-2-256
"""

from dit_hf.command_line import run
from dit_hf.commands.convert import main


if __name__ == "__main__":
    run(main)
