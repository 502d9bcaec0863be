#!/usr/bin/env python
"""The page of a class-conditional pipeline: what a Gradio Space on the Hub runs, and the same as `dit-hf space`.

python examples/space/app.py --pretrained_model_name_or_path emoji64
dit-hf space --pretrained_model_name_or_path emoji64
"""

from dit_hf.command_line import run
from dit_hf.space.command import main


if __name__ == "__main__":
    run(main)
