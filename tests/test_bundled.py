"""The pipeline that comes with the package: size, card, reproducible and recognisable samples."""

import json

import pytest
import torch
from conftest import ROOT
from huggingface_hub import ModelCard

from dit_hf import DiTClassCondPipeline
from dit_hf.seeds import seeded_generator


FOLDER = ROOT / "src" / "dit_hf" / "bundled" / "emoji64"
CLASSES = ["activities", "animals", "flags", "food", "objects", "people", "smileys", "symbols", "travel"]


@pytest.fixture(scope="module")
def pipe():
    pipe = DiTClassCondPipeline.from_bundled("emoji64")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_size_and_format():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 16_000_000
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md"}


def test_no_trace_of_the_machine_it_was_trained_on():
    for path in FOLDER.rglob("*.json"):
        assert "_name_or_path" not in json.loads(path.read_text()), path


def test_card_is_valid():
    card = ModelCard.load(FOLDER / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "diffusers"
    for icon_set in ("noto", "noto-v1", "twemoji", "fluent-emoji", "fxemoji", "emojione"):
        assert icon_set in card.text
    assert "CC-BY-4.0" in card.text


def test_pipeline_is_what_the_card_says(pipe):
    assert list(pipe.labels) == CLASSES
    assert pipe.transformer.dtype == pipe.vae.dtype == torch.float32
    assert not pipe.transformer.training
    assert json.loads((FOLDER / "model_index.json").read_text())["transformer"] == ["dit_hf", "DiTTransformer2DModel"]


def test_samples_show_their_class(pipe):
    """Smileys are yellow, and every class has its own pictures: white corners, coloured middles."""
    generators = [seeded_generator(0, index) for index in range(12)]
    images = pipe(
        ["smileys", "flags"],
        num_images_per_label=6,
        guidance_scale=3.0,
        num_inference_steps=20,
        generator=generators,
        output_type="pt",
    ).images
    smileys, flags = images.split(6)
    middle = smileys[:, :, 24:40, 24:40].mean(dim=(0, 2, 3))
    assert middle[0] > 0.6
    assert middle[0] > middle[2] + 0.25
    corners = torch.stack([images[:, :, :2, :2], images[:, :, -2:, -2:]]).mean()
    assert corners > 0.8
    assert (smileys.mean(dim=0) - flags.mean(dim=0)).abs().mean() > 0.03


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'imagenet'.*emoji64"):
        DiTClassCondPipeline.from_bundled("imagenet")
