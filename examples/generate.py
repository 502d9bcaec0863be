#!/usr/bin/env python
"""Generates a labelled grid of images; the same command as `dit-hf generate`.

python examples/generate.py --output outputs/demo.png
dit-hf generate --output outputs/demo.png
"""

from dit_hf.command_line import run
from dit_hf.commands.generate import main


if __name__ == "__main__":
    run(main)
