#!/usr/bin/env python
"""FID, precision, recall and other metrics of a set of samples; the same command as `dit-hf metrics`.

python examples/evaluate/compute_metrics.py --samples outputs/samples/samples.npz --reference outputs/emoji64
dit-hf metrics --samples outputs/samples/samples.npz --reference outputs/emoji64
"""

from dit_hf.command_line import run
from dit_hf.commands.metrics import main


if __name__ == "__main__":
    run(main)
