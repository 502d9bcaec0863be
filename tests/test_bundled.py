"""The pipeline that comes with the package: size, card, classes by name, reproducible and recognisable samples."""

import json

import pytest
import torch
from conftest import ROOT
from huggingface_hub import ModelCard

from dit_hf import DiTClassCondPipeline
from dit_hf.seeds import drawn_classes, seeded_generator


FOLDER = ROOT / "src" / "dit_hf" / "bundled" / "emoji64"
# Of the middle of the training images, their mean.
COLOURS = {
    "red": (232, 61, 70),
    "orange": (251, 133, 16),
    "yellow": (249, 200, 72),
    "green": (112, 192, 101),
    "blue": (37, 141, 219),
    "purple": (161, 105, 200),
    "black": (57, 58, 63),
    "white": (230, 228, 232),
}


@pytest.fixture(scope="module")
def pipe():
    pipe = DiTClassCondPipeline.from_bundled("emoji64")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_size_and_format():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 40_000_000
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
    assert len(pipe.id2label) == pipe.transformer.config.num_classes == 1898
    assert pipe.transformer.dtype == pipe.vae.dtype == torch.float32
    assert not pipe.transformer.training
    call = pipe.resolve_call()
    assert type(pipe.scheduler).__name__ == "FlowMatchLCMScheduler"
    assert call["num_inference_steps"] == 4 and call["guidance_scale"] == 1
    card = (FOLDER / "README.md").read_text()
    assert f"{pipe.transformer.num_parameters() / 1e6:.1f} M parameters" in card and "`num_inference_steps=4`" in card
    assert json.loads((FOLDER / "model_index.json").read_text())["transformer"] == ["dit_hf", "DiTTransformer2DModel"]


def test_classes_have_names_and_synonyms(pipe):
    """Every name is that of one class; near names are suggested, those with the same words first."""
    assert len(set(pipe.get_label_ids(["red apple", "sloth", "flag: Japan", "woman cook"]))) == 4
    names = [name.strip() for entry in pipe.id2label.values() for name in entry.split(",")]
    assert len(names) == len({name.casefold() for name in names})
    assert set(names) <= set(pipe.labels)
    assert pipe.get_label_ids("hugging face") == pipe.get_label_ids("smiling face with open hands")
    for name, suggested in {
        "aple": "red apple",
        "apple": "red apple",
        "Japan flag": "flag: Japan",
        "clock": "alarm clock",
        "German flag": "flag: Germany",
    }.items():
        with pytest.raises(ValueError, match=f"There is no class '{name}'. Did you mean '{suggested}'"):
            pipe(name)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_samples_show_their_class(pipe, steps):
    """Circles have the colour of their name in the middle."""
    names = [f"{colour} circle" for colour in COLOURS]
    generators = [seeded_generator(0, index) for index in range(2 * len(names))]
    call = {"num_inference_steps": steps, "generator": generators, "output_type": "pt"}
    images = pipe(names, num_images_per_label=2, **call).images
    middle = 255 * images[:, :, 28:36, 28:36].mean(dim=(2, 3))
    colours = torch.tensor(list(COLOURS.values()), dtype=middle.dtype)
    nearest = torch.cdist(middle, colours).argmin(dim=1)
    assert torch.equal(nearest, torch.arange(len(names)).repeat_interleave(2))
    corners = torch.stack([images[:, :, :2, :2], images[:, :, -2:, -2:]]).mean()
    assert corners > 0.9


def test_drawn_classes_depend_on_the_seed_alone():
    assert drawn_classes(1898, 12) == drawn_classes(1898, 60)[:12]
    assert len({tuple(drawn_classes(1898, 12, seed)) for seed in (0, 1, 2**32, 2**63 - 1)}) == 4
    assert drawn_classes(9, 60) == list(range(9))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'imagenet'.*emoji64"):
        DiTClassCondPipeline.from_bundled("imagenet")
