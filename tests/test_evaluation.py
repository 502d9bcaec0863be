"""Features and probe on real emoji images, and the rasteriser that makes them."""

import json
import re
import shutil
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_transformer, tiny_vae
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from testing_utils.scripts import run_forked

from dit_hf import DiTClassCondPipeline, make_scheduler
from dit_hf.data.images import load_image_dataset
from dit_hf.data.reader import ImageReader
from dit_hf.evaluation.accuracy import correct_predictions, train_probe
from dit_hf.evaluation.extractors import extract, load_extractor
from dit_hf.evaluation.features import EfficientNetLite0
from dit_hf.evaluation.metrics import compute_metrics
from dit_hf.evaluation.sources import ImageSource


SQUARE = '<rect x="2" y="2" width="12" height="12" fill="{}"/>'
CIRCLE = '<circle cx="8" cy="8" r="6" fill="{}"/>'
SCRIPT = ROOT / "examples" / "train_autoencoder" / "prepare_emoji.py"
ICON_SETS = ("noto", "noto-v1", "twemoji", "fluent-emoji-flat", "fluent-emoji", "fxemoji", "emojione")


@pytest.fixture(scope="module")
def network():
    return EfficientNetLite0(64)


@pytest.fixture(scope="module")
def extractor():
    return load_extractor("efficientnet-lite0")


@pytest.fixture(scope="module")
def dataset_folder(tmp_path_factory):
    """Glyphs rendered by the real script from small icon packages: squares are flags, circles are food."""
    folder = tmp_path_factory.mktemp("emoji")
    for number, icon_set in enumerate(ICON_SETS):
        icons, names = {}, {}
        for index in range(12):
            color = f"rgb({64 * (index % 4)},{42 * number},{80 * (index // 4) + 45 * (number % 2)})"
            names |= {f"1f1e6-{index:x}": f"flag-for-land-{index}", f"1f34{index:x}": f"fruit-{index}"}
            icons[f"flag-for-land-{index}"] = {"body": SQUARE.format(color)}
            icons[f"fruit-{index}"] = {"body": CIRCLE.format(color), "width": 16, "height": 20}
        icons["fruit-1-dark-skin-tone"] = {"body": CIRCLE.format("black")}
        icons["unheard-of"] = {"body": SQUARE.format("black")}
        for name, drawn_by in {"flag-rare": 2, "rare": 2}.items():
            if number < drawn_by:
                icons[name] = {"body": CIRCLE.format(f"rgb(0,{100 * number},0)")}
        if icon_set == "emojione":  # which knows a glyph by another name
            icons["first-fruit"] = icons.pop("fruit-0")
        for name in ("twin", "other-twin"):  # one image under two names
            icons[name] = {"body": SQUARE.format(f"rgb({len(name)},{36 * number},0)"), "width": 20}
        names |= {"1f3c1": "flag-rare", "1f3c2": "rare", "1f3c3": "twin", "1f3c4": "other-twin"}
        metadata = {
            "categories": {"Flags": [n for n in icons if "flag" in n], "Food": [n for n in icons if "flag" not in n]}
        }
        content = {"icons": icons, "aliases": {"first-fruit": {"parent": "fruit-0"}}, "width": 16, "height": 16}
        if icon_set == "emojione":
            del content["aliases"]
        (folder / "icons" / icon_set).mkdir(parents=True)
        for name, value in {"icons": content, "metadata": metadata, "chars": names}.items():
            (folder / "icons" / icon_set / f"{name}.json").write_text(json.dumps(value))
    command = [sys.executable, SCRIPT, "--icons_dir", folder / "icons", "--output_dir", folder / "data"]
    run_forked(command, check=True)
    return folder


def test_rasterised_dataset(dataset_folder):
    """One class per glyph that enough sets contain, with its names; held out is one image each, no near copies."""
    splits = {name: load_image_dataset(str(dataset_folder / "data"), name) for name in ("train", "test")}
    names = splits["train"].features["label"].names
    assert names == splits["test"].features["label"].names
    flags = sorted(["flag: Rare", *(f"flag: Land {index}" for index in range(12))])
    fruits = sorted(["fruit 0, first fruit", *(f"fruit {index}" for index in range(1, 12)), "other twin", "twin"])
    assert names == [*flags, *fruits]
    shown = {split: [names[label] for label in data["label"]] for split, data in splits.items()}
    assert all(shown["train"].count(name) == 6 for name in names if name != "flag: Rare")
    assert shown["train"].count("flag: Rare") == 2
    assert shown["test"] == [name for name in names if name != "flag: Rare" and "twin" not in name]
    data = splits["train"]
    groups = [data.features["group"].int2str(group) for group in data["group"]]
    assert groups == ["flags" if name.startswith("flag") else "food" for name in shown["train"]]
    images, _ = ImageReader(data, resolution=64).stack()
    assert images.shape[1:] == (3, 64, 64)
    assert (images[:, :, 0, 0] == 255).all()
    assert (images[:, :, 32, 32] != 255).any(dim=1).all()


def test_a_set_of_its_own(dataset_folder, tmp_path):
    """One set has one image of a glyph, which keeps its names; none is held out, and the script says how to."""
    command = [sys.executable, SCRIPT, "--icons_dir", dataset_folder / "icons", "--icon_sets", "emojione"]
    result = run_forked([*command, "--output_dir", tmp_path / "own"], check=True)
    data = load_image_dataset(str(tmp_path / "own"), "train")
    assert len(data) == len(data.features["label"].names) == 26
    assert "fruit 0, first fruit" in data.features["label"].names
    assert "--holdout 0.1" in result.stdout
    assert not (tmp_path / "own" / "test.parquet").exists()


def test_the_classes_of_a_pipeline(dataset_folder, tmp_path):
    """They keep their order, and others are dropped; what is no pipeline is refused before any icon is rendered."""
    names = {0: "First Fruit", 1: "sloth", 2: "flag: Land 2"}  # a synonym, in another case
    parts = (tiny_transformer(num_classes=3), make_scheduler("ddim"), tiny_vae(), names)
    DiTClassCondPipeline(*parts).save_pretrained(tmp_path / "model")
    command = [sys.executable, SCRIPT, "--icons_dir", dataset_folder / "icons", "--output_dir", tmp_path / "own"]
    bad = run_forked([*command, "--classes_of", tmp_path / "none"])
    assert bad.returncode == 2 and "none" in bad.stderr and "noto:" not in bad.stderr
    assert run_forked([*command, "--classes_of", "emoji64", "--one_class", "coins"]).returncode == 2
    result = run_forked([*command, "--classes_of", tmp_path / "model"], check=True)
    assert "2 of the 3 classes of" in result.stdout
    data = load_image_dataset(str(tmp_path / "own"), "train")
    assert data.features["label"].names == list(names.values())
    assert data["label"] == [0] * 6 + [2] * 6
    for others, message in (({0: "a", 1: "b", 2: "c"}, "No glyph of"), (None, "names no classes; omit it")):
        shutil.rmtree(tmp_path / "own", ignore_errors=True)
        DiTClassCondPipeline(*parts[:3], others).save_pretrained(tmp_path / "other")
        refused = run_forked([*command, "--classes_of", tmp_path / "other"])
        assert refused.returncode == 2 and message in refused.stderr


def test_names_of_glyphs(monkeypatch, tmp_path):
    """Flags apart from what has their name, spelling that icon names lose, and the most trusted set first."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "train_autoencoder")
    from glyphs import NAMING_SETS, Glyphs, name_key, readable

    assert readable("red-apple") == "red apple" and readable("ten-oclock") == "ten o'clock"
    assert readable("flag-for-cote-divoire") == "flag: Cote d'Ivoire" and readable("flag-in-hole") == "flag in hole"
    assert readable("flag-for-flag-us-virgin-islands") == "flag: US Virgin Islands"
    assert name_key("woman-cook") == name_key("womancook") and name_key("turkey") != name_key("flag-for-turkey")
    names = {"noto": "glowing-star", "fluent-emoji-flat": "star-glowing", "twemoji": "glowing-star"}
    for icon_set in NAMING_SETS:
        (tmp_path / icon_set).mkdir()
        (tmp_path / icon_set / "chars.json").write_text(json.dumps({"1f31f-fe0f": names[icon_set]}))
        alias = {"shining-star": {"parent": "glowing-star"}, "turned": {"parent": "glowing-star", "rotate": 1}}
        (tmp_path / icon_set / "icons.json").write_text(json.dumps({"aliases": alias}))
    glyphs = Glyphs(tmp_path, [])
    found = [glyphs.find(name) for name in ("glowing-star", "shiningstar", "star-glowing", "turned")]
    assert found == ["1f31f", "1f31f", "1f31f", None]
    assert glyphs.class_name("1f31f") == "glowing star, star glowing, shining star"


def test_missing_icon_sets_are_named(tmp_path):
    command = [sys.executable, SCRIPT, "--icons_dir", tmp_path, "--output_dir", tmp_path / "data"]
    result = run_forked(command)
    assert result.returncode == 2
    assert "noto, noto-v1" in result.stderr


def test_features_do_not_depend_on_the_batch(extractor, dataset_folder):
    images = ImageReader(load_image_dataset(str(dataset_folder / "data")), resolution=64).stack()[0][:8]
    features = extract(images, extractor.train(), batch_size=8)
    assert [features.features.shape, features.spatial.shape, features.logits.shape] == [(8, 1280), (8, 63), (8, 1000)]
    again = extract(images, extractor, batch_size=3)
    for part in ("features", "spatial", "logits"):
        torch.testing.assert_close(getattr(again, part), getattr(features, part), rtol=1e-3, atol=1e-3)
    assert features.extractor["resize"].startswith("112×112, bicubic")


def test_the_resize_rule_is_pinned(extractor):
    """112 pixels, bicubic, antialiased, clamped, (x - 127) / 128, written out here; and what it gives."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=generator, dtype=torch.uint8)
    images[1, :, :, 20:40] = 255  # an edge, where bicubic interpolation overshoots
    resized = torch.nn.functional.interpolate(
        images.double(), size=(112, 112), mode="bicubic", antialias=True, align_corners=False
    )
    network = extractor.network.network
    last_map = network.extract_features(((resized.clamp(0, 255) - 127) / 128).float())
    pooled = last_map.mean(dim=(2, 3))
    expected = {"features": pooled, "spatial": last_map[:, :7].reshape(2, -1), "logits": network._fc(pooled)}
    found = extract(images, extractor)
    for name, tensor in expected.items():
        torch.testing.assert_close(getattr(found, name), tensor, rtol=1e-3, atol=1e-3)
    assert found.spatial.shape == (2, 7 * 3 * 3)


def test_probe_tells_squares_from_circles(extractor, dataset_folder):
    features = {}
    for name in ("train", "test"):
        source = ImageSource(dataset_folder / "data", name)
        features[name] = extract(torch.cat(list(source.batches())), extractor)
        features[name].labels = ["flags" if label.startswith("flag") else "food" for label in source.labels()]
    assert set(features["test"].labels) == {"flags", "food"}
    found = compute_metrics(features["test"], features["test"], ["accuracy"], 5, training=features["train"])
    assert found["accuracy"]["value"] > 0.9
    swapped = [{"flags": "food", "food": "flags"}[name] for name in features["test"].labels]
    features["test"].labels = swapped
    found = compute_metrics(features["test"], features["test"], ["accuracy"], training=features["train"])
    assert found["accuracy"]["value"] < 0.1
    probe = train_probe(features["train"].features, features["train"].labels)
    with pytest.raises(ValueError, match="of class 'cars'; there are flags, food"):
        correct_predictions(probe, features["test"].features, ["cars"] * len(swapped))
    with pytest.raises(ValueError, match="accuracy needs training images"):
        compute_metrics(features["test"], features["test"], ["accuracy"])


def test_a_blind_test_is_asked_and_evaluated(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(ROOT / "examples" / "evaluate")
    import recognition_test

    groups = {f"{kind} {index}, other name": kind for kind in ("animal", "food") for index in range(9)}
    questions = recognition_test.make_questions(groups, 6, seed=0)
    assert questions == recognition_test.make_questions(groups, 6, seed=0)
    assert len({question["class"] for question in questions}) == 6
    for question in questions:
        assert question["class"] in question["choices"] and len(set(question["choices"])) == 8
        assert {groups[choice] for choice in question["choices"]} == {question["group"]}
    with pytest.raises(ValueError, match="The group 'lone' has 1 classes; a question takes 8"):
        recognition_test.make_questions({"a": "lone"}, 1, seed=0)
    (tmp_path / "key.json").write_text(json.dumps(questions))
    first, second, *_ = (question["class"].split(",")[0] for question in questions)
    (tmp_path / "answers.txt").write_text(f"1: {first.upper()}\n2.\t{second}\n3 {second}\n\n")
    recognition_test.evaluate_answers(Namespace(output_dir=tmp_path, answers=tmp_path / "answers.txt"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 of 6 right (33%)" and len(lines) == 5
    assert lines[1].startswith("3 (") and lines[1].endswith(f"taken for {second}")
    for answer, message in (("sloth", "has the line 'sloth'"), ("7: sloth", "answers 7; the questions are 1 to 6")):
        (tmp_path / "answers.txt").write_text(answer)
        with pytest.raises(ValueError, match=message):
            recognition_test.evaluate_answers(Namespace(output_dir=tmp_path, answers=tmp_path / "answers.txt"))
    assert recognition_test.read_answers("1) ten o'clock\n2:sloth") == {"1": "ten o'clock", "2": "sloth"}


def test_a_blind_test_is_made(dataset_folder, tmp_path):
    """Ten classes of food: pages of numbered images, questions of eight names each, and the key."""
    names = {index: f"fruit {index}, other name" for index in range(10)}
    rows = [{"image": Image.new("RGB", (8, 8)), "label": index, "group": 0} for index in names]
    features = {
        "image": ImageFeature(),
        "label": ClassLabel(names=list(names.values())),
        "group": ClassLabel(names=["food"]),
    }
    Dataset.from_list(rows, features=Features(features)).to_parquet(tmp_path / "data" / "train.parquet")
    parts = (tiny_transformer(num_classes=10), make_scheduler("ddim"), tiny_vae(), names)
    DiTClassCondPipeline(*parts).save_pretrained(tmp_path / "model")
    script = ROOT / "examples" / "evaluate" / "recognition_test.py"
    flags = ["--pretrained_model_name_or_path", tmp_path / "model", "--dataset_name", tmp_path / "data"]
    command = [sys.executable, script, *flags, "--output_dir", tmp_path / "test", "--num_inference_steps", 1]
    run_forked([*command, "--num_images", 5], check=True)
    assert {path.name for path in (tmp_path / "test").iterdir()} == {"images-1.png", "questions.txt", "key.json"}
    questions = (tmp_path / "test" / "questions.txt").read_text().splitlines()
    key = json.loads((tmp_path / "test" / "key.json").read_text())
    assert len(key) == len(questions) == 5
    for question, row in zip(questions, key, strict=True):
        assert question.count(" | ") == 7 and row["class"].split(",")[0] in question and "other" not in question
    again = run_forked([*command, "--num_images", 5])
    assert again.returncode == 2 and "exists and is not empty" in again.stderr


def test_reconstructions_of_an_autoencoder(dataset_folder, tmp_path):
    """The PSNR that is printed is that of the images which are written."""
    tiny_vae().save_pretrained(tmp_path / "vae")
    script = ROOT / "examples" / "train_autoencoder" / "reconstruct.py"
    flags = ["--dataset_name", dataset_folder / "data", "--vae", tmp_path / "vae", "--output", tmp_path / "made.npz"]
    result = run_forked([sys.executable, script, *flags], check=True)
    made = np.load(tmp_path / "made.npz")["arr_0"].astype(float)
    images = ImageReader(load_image_dataset(str(dataset_folder / "data"), "test"), resolution=64).stack()[0]
    error = ((made - images.permute(0, 2, 3, 1).numpy()) / 255) ** 2
    psnr = -10 * np.log10(error.mean(axis=(1, 2, 3))).mean()
    printed = float(re.search(r"PSNR of (\d+) images: (\S+) dB", result.stdout)[2])
    assert len(made) == len(images) and printed == pytest.approx(psnr, abs=0.02)


def test_inception_asks_for_its_weights():
    with pytest.raises(ValueError, match="--extractor_weights"):
        load_extractor("inception")


def test_perceptual_stages_have_gradients(network):
    images = torch.zeros(1, 3, 64, 64, requires_grad=True)
    stages = network.stages(images)
    assert [stage.shape[-1] for stage in stages] == [32, 16, 8, 4]
    sum(stage.square().sum() for stage in stages).backward()
    assert images.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in network.parameters())
