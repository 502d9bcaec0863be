"""The held-out split by hash of the images."""

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from dit_hf.data.encoded import image_bytes
from dit_hf.data.holdout import hold_out, is_held_out
from dit_hf.data.images import load_image_dataset
from dit_hf.data.reader import ImageReader


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of thirty different images."""
    folder = tmp_path_factory.mktemp("images")
    for index in range(60):
        path = folder / ("cats" if index % 2 else "dogs") / f"{index:02d}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        PILImage.fromarray(pixels).save(path)
    return folder


def stored_bytes(dataset, column="image"):
    reader = ImageReader(dataset, image_column=column)
    return sorted(image_bytes(row[column], "an image") for row in reader.dataset)


def test_the_hash_is_pinned_and_keeps_the_fraction():
    assert [index for index in range(40) if is_held_out(str(index).encode(), 0.1)] == [9, 39]
    held_out = [index for index in range(20000) if is_held_out(str(index).encode(), 0.1)]
    assert 1900 < len(held_out) < 2100
    assert all(is_held_out(str(index).encode(), 0.2) for index in held_out)


def test_parts_are_the_same_in_every_format_and_order(folder, tmp_path):
    parts = {name: load_image_dataset(train_data_dir=folder, split=name, holdout=0.3) for name in ("train", "test")}
    contents = {name: stored_bytes(part) for name, part in parts.items()}
    assert sorted(contents["train"] + contents["test"]) == stored_bytes(load_image_dataset(train_data_dir=folder))
    assert not set(contents["train"]) & set(contents["test"])
    assert 10 < len(contents["test"]) < 26
    note = f"holdout 0.3: split test has {len(parts['test'])} of 60 images"
    assert ImageReader(parts["test"]).describe().endswith(note)
    rows = [
        {"photo": {"bytes": path.read_bytes(), "path": None}, "label": int(path.parent.name == "dogs")}
        for path in sorted(folder.rglob("*.png"), key=lambda path: path.name[::-1])
    ]
    (tmp_path / "other").mkdir()
    features = Features({"photo": Image(), "label": ClassLabel(names=["cats", "dogs"])})
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "other" / "data.parquet")
    for options in ({"train_data_dir": folder}, {"train_data_dir": tmp_path / "other"}):
        for streaming in (False, True):
            part = load_image_dataset(**options, split="test", holdout=0.3, streaming=streaming)
            column = "photo" if "photo" in part.features else "image"
            assert streaming or isinstance(part[0][column], PILImage.Image)
            assert stored_bytes(part, column) == contents["test"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"holdout": 1.0}, "--holdout 1.0 must be at least 0 and less than 1"),
        ({"holdout": -0.1}, "--holdout -0.1 must be"),
        ({"holdout": 0.1, "split": "validation"}, "there is no split 'validation'"),
        ({"holdout": 1e-9, "split": "test"}, "--holdout 1e-09 leaves no image of 60 in the split 'test'"),
    ],
)
def test_bad_fractions_are_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        load_image_dataset(train_data_dir=folder, **options)


def test_data_with_two_splits_are_refused(workspace):
    with pytest.raises(ValueError, match="data with one split; there are test, train. Omit --holdout"):
        load_image_dataset(str(workspace / "data"), holdout=0.1)


def test_a_missing_image_belongs_to_training(folder):
    dataset = load_image_dataset(train_data_dir=folder)
    (folder / "dogs" / "00.png").rename(folder / "dogs" / "00.gone")
    train, test = (hold_out(dataset, split, 0.3) for split in ("train", "test"))
    skipped = []
    reader = ImageReader(train, ["cats", "dogs"])
    assert len(list(reader.readable(reader.dataset, skipped))) == 59 - len(test)
    assert [label for _, label in skipped] == [1]
    (folder / "dogs" / "00.gone").rename(folder / "dogs" / "00.png")
