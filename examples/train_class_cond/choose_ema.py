#!/usr/bin/env python
"""Puts an average of any length together after a training with `--ema_profiles`, as a pipeline folder.

    python examples/train_class_cond/choose_ema.py --run outputs/dit --sigma_rel 0.12 --output_dir outputs/dit-0.12

Expected: seconds. Evaluate a few widths (0.05, 0.10, 0.15, 0.20) and keep the best.
`python -m dit_hf.commands.choose_ema` takes the same flags.
"""

from dit_hf.command_line import run
from dit_hf.commands.choose_ema import main


if __name__ == "__main__":
    run(main)
