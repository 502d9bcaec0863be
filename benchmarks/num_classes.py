#!/usr/bin/env python
"""Whether loading and sampling depend on the number of classes: the same model with 9, 1,898 and 21,841 of them.

    python benchmarks/num_classes.py

Expected: three minutes on 2 cores. Prints JSON: for each number, medians over fresh processes, started in turn, of the
seconds that loading takes, that 8 images of named classes take, and that a name takes to be found; and by how much
the private memory has grown since the imports, beside the size of the label table.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from dit_hf import DiTClassCondPipeline, DiTTransformer2DModel, make_scheduler
from dit_hf.command_line import ArgumentParser, integer, run
from dit_hf.training.finetuning import drop_interval


NUMBERS = (9, 1898, 21841)
WORKER = """
import json, sys, time
import torch
from dit_hf import DiTClassCondPipeline

def private_memory():
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon"))

before, started = private_memory(), time.perf_counter()
pipe = DiTClassCondPipeline.from_pretrained(sys.argv[1])
loaded = time.perf_counter()
pipe.set_progress_bar_config(disable=True)
names = ["class 0, thing 0", "thing 7"] * 4
pipe(names, num_inference_steps=1)
warm = time.perf_counter()
pipe(names, num_inference_steps=10)
sampled = time.perf_counter()
pipe.get_label_ids("thing 7")
found = time.perf_counter()
print(json.dumps({
    "load": loaded - started, "sample": sampled - warm, "find": found - sampled, "memory": private_memory() - before,
}))
"""


def save_model(folder: Path, num_classes: int) -> int:
    """The bundled pipeline with another label table; returns the table's size in bytes."""
    pipe = DiTClassCondPipeline.from_bundled("emoji64")
    config = dict(drop_interval(pipe.transformer).config) | {"num_classes": num_classes}
    transformer = DiTTransformer2DModel.from_config(config)
    names = {index: f"class {index}, thing {index}" for index in range(num_classes)}
    DiTClassCondPipeline(transformer, make_scheduler("flow_euler"), pipe.vae, names).save_pretrained(folder)
    return transformer.class_embed.weight.nbytes


def main():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=integer(at_least=1), default=5, help="Processes for each number.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = {number: {"table_bytes": save_model(Path(folder, str(number)), number)} for number in NUMBERS}
        measured = {number: [] for number in NUMBERS}
        for _ in range(args.rounds):
            for number in NUMBERS:
                command = [sys.executable, "-c", WORKER, str(Path(folder, str(number)))]
                measured[number].append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
        for number, results in measured.items():
            rows[number] |= {f"{key}_median": median(result[key] for result in results) for key in results[0]}
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    run(main)
