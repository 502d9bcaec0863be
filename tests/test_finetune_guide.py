"""The commands of examples/finetune/README.md run as written, but for the data and the number of steps."""

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, tiny_transformer
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from dit_hf import DiTClassCondPipeline, make_scheduler


GUIDE = (ROOT / "examples" / "finetune" / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL) for line in block.splitlines()]


OLD_CLASSES = ("sloth", "lion", "cat")


def write_dataset(folder, names, count):
    """Random images of 64 pixels in the layout of prepare_emoji.py."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True)
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    pixels = generator.integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    rows = [{"image": PILImage.fromarray(image), "label": i % len(names)} for i, image in enumerate(pixels)]
    Dataset.from_list(rows, features=features).to_parquet(folder / "train.parquet")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder that looks like the checkout, with small data where the guide's would be."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("examples", "src"):
        (folder / name).symlink_to(ROOT / name)
    names = list(DiTClassCondPipeline.from_bundled("emoji64").id2label.values())
    write_dataset(folder / "outputs" / "openmoji64", names, 36)
    write_dataset(folder / "outputs" / "coins", ["coins"], 6)
    transformer = tiny_transformer(sample_size=16, in_channels=8, num_classes=3, learn_sigma=False)
    vae = DiTClassCondPipeline.from_bundled("emoji64").vae
    pipe = DiTClassCondPipeline(transformer, make_scheduler("flow_euler"), vae, dict(enumerate(OLD_CLASSES)))
    pipe.save_pretrained(folder / "outputs" / "small")
    return folder


def run_short(command, checkout):
    """A command of the guide with few steps and images."""
    short = {"max_train_steps": 2, "validation_steps": 2, "total_batch_size": 4, "num_images": 3}
    for flag, value in short.items():
        command = re.sub(rf"--{flag} \d+", f"--{flag} {value}", command)
    if "coins" in command:  # with a model of few classes, as each needs an image
        command = command.replace("_or_path emoji64", "_or_path outputs/small")
    if "prepare_new_class" in command:
        command += " --prior_images_per_class 2 --num_inference_steps 2"
    if "train_dit" in command:
        command += " --validation_images 18 --validation_inference_steps 2 --validation_images_per_class 1"
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(command, shell=True, cwd=checkout, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def the_command(words):
    (command,) = [line for line in COMMANDS if words in line]
    return command


def test_full_fine_tuning(checkout):
    run_short(the_command("--output_dir outputs/openmoji-full"), checkout)
    tuned = DiTClassCondPipeline.from_pretrained(checkout / "outputs" / "openmoji-full" / "pipeline")
    given = DiTClassCondPipeline.from_bundled("emoji64")
    assert tuned.labels == given.labels
    assert tuned.vae.config.latents_mean == given.vae.config.latents_mean  # not those of the new images


def test_adapters(checkout):
    run_short(the_command("--output_dir outputs/openmoji-lora"), checkout)
    snippet = re.search(r"```python\n(.*?)```", GUIDE, re.DOTALL).group(1)
    subprocess.run([sys.executable, "-c", snippet], cwd=checkout, check=True)
    assert (checkout / "outputs" / "openmoji-sloth.png").exists()


def test_a_stopped_preparation_leaves_nothing(checkout):
    command = the_command("prepare_new_class.py").replace("python ", f"exec {sys.executable} ")
    output = checkout / "outputs" / "emoji64-coins"
    listen = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # a job in the background would not
    process = subprocess.Popen(command, shell=True, cwd=checkout, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    while not list(output.parent.glob(".dit_hf-partial-*/emoji64-coins/coins/*")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    errors = process.communicate()[1]
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "Stopped by SIGINT."
    assert not list(output.parent.glob("*emoji64-coins*"))


def test_a_new_class(checkout):
    run_short(the_command("prepare_new_class.py"), checkout)
    folders = {path.name: len(list(path.iterdir())) for path in (checkout / "outputs" / "emoji64-coins").iterdir()}
    assert folders == {"coins": 6, "sloth": 2, "lion": 2, "cat": 2}
    run_short(the_command("--output_dir outputs/coins-model"), checkout)
    pipe = DiTClassCondPipeline.from_pretrained(checkout / "outputs" / "coins-model" / "pipeline")
    assert sorted(pipe.labels) == sorted([*OLD_CLASSES, "coins"])
