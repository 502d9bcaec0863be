"""Folders of images: classes, splits and skipped files."""

import json
import os
import unicodedata

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage

from dit_hf.data.fingerprints import folder_state
from dit_hf.data.folders import find_image_folders, split_name
from dit_hf.data.images import label_names, load_image_dataset, load_unlabelled_folder
from dit_hf.data.reader import ImageReader


def write_images(folder, *names):
    """Small images at these paths."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        PILImage.new("RGB", (8, 8)).save(path, format="PNG")
    return folder


def contents(dataset):
    """File names by class."""
    files = [os.path.basename(row["path"]) for row in dataset.cast_column("image", Image(decode=False))["image"]]
    names = dataset.features["label"].names
    return [(names[label], file) for label, file in zip(dataset["label"], files, strict=True)]


PAIRS = [
    ("train", "test"),
    ("Training", "Testing"),
    ("Train", "Test"),
    ("training_set", "test_set"),
    ("images/train", "images/val"),
    ("seg_train/seg_train", "seg_test/seg_test"),
    ("archive/data/TrainImages", "archive/data/TestImages"),
    ("train2017", "val2017"),
    ("pets-train", "pets-valid"),
    ("trainset", "devset"),
]


@pytest.mark.parametrize(("train", "test"), PAIRS)
def test_splits_are_found_by_their_usual_names(tmp_path, train, test):
    for split, count in ((train, 3), (test, 2)):
        write_images(tmp_path / split, *(f"{name}/{index}.png" for name in ("cats", "dogs") for index in range(count)))
    write_images(tmp_path / ".cache", "0.png")
    assert len(load_image_dataset(train_data_dir=tmp_path)) == 6
    other = split_name(test.split("/")[-1])[0]
    held_out = load_image_dataset(split=other, train_data_dir=tmp_path)
    assert len(held_out) == 4
    assert label_names(held_out) == ["cats", "dogs"]
    assert len(load_image_dataset(str(tmp_path))) == 6  # --dataset_name reads a folder alike
    with pytest.raises(ValueError, match=f"has no split 'extra'; it has .*{other}"):
        load_image_dataset(split="extra", train_data_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("TRAIN", "train"),
        ("Validation Data", "validation"),
        ("01_eval", "test"),
        ("train_test", None),
        ("trains", None),
    ],
)
def test_split_names(name, split):
    assert (split_name(name) or (None,))[0] == split


def test_classes_may_be_called_like_splits(tmp_path):
    write_images(tmp_path, "train/0.png", "test-drive/0.png", "car/0.png")
    assert label_names(load_image_dataset(train_data_dir=tmp_path)) == ["car", "test-drive", "train"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("train/a/0.png", "train/b/0.png", "extra/a/0.png"), "the splits train and beside them 'extra'"),
        (("train/a/0.png", "test/a/0.png", "extra/0.png"), "the splits test, train and beside them 'extra'"),
        (("train/a/0.png", "Training/a/0.png"), "two folders of the split train, 'Training' and 'train'"),
        (("0.png", "1.png"), "has no folders, one per class"),
        (("a/0.txt", "b/0.txt"), "holds no images .*.jpg"),
        (("a/0.png", "b/0.png", "c/0.txt", "d/e/0.txt"), "class folders without images: c, d. Add images"),
        (("test/a/0.png", "test/b/0.png"), "has no split 'train'; it has test"),
        (("a/0.png", "b/0.png", "b/part.tar"), "holds .tar shards and folders of images"),
    ],
)
def test_ambiguous_folders_are_refused(tmp_path, files, message):
    write_images(tmp_path, *files)
    with pytest.raises(ValueError, match=message):
        load_image_dataset(train_data_dir=tmp_path)


def test_a_flat_split_has_no_labels(tmp_path):
    write_images(tmp_path, "train/cats/0.png", "train/cats/1.png", "train/dogs/0.png", "test/0.png", "test/1.png")
    dataset = load_image_dataset(train_data_dir=tmp_path)
    assert label_names(dataset) == ["cats", "dogs"]
    assert dataset["label"] == [0, 0, 1]
    flat = load_image_dataset(split="test", train_data_dir=tmp_path)
    assert flat.column_names == ["image"]
    assert len(list(ImageReader(flat).readable(ImageReader(flat).dataset, []))) == 2
    with pytest.raises(ValueError, match="no column 'label'.*not in class folders"):
        label_names(flat)


def test_images_in_nested_folders_belong_to_the_class_of_the_first_level(tmp_path):
    write_images(tmp_path / "a", "cats/0.png", "cats/old/1.png", "dogs/0.png", "dogs/old/1.png")
    found = contents(load_image_dataset(train_data_dir=tmp_path / "a"))
    assert found == [("cats", "0.png"), ("cats", "1.png"), ("dogs", "0.png"), ("dogs", "1.png")]
    files = ("train/n01/images/n01_0.JPEG", "train/n02/images/n02_0.JPEG", "val/images/val_0.JPEG")
    write_images(tmp_path / "b", *files)
    assert contents(load_image_dataset(train_data_dir=tmp_path / "b")) == [
        ("n01", "n01_0.JPEG"),
        ("n02", "n02_0.JPEG"),
    ]
    assert load_image_dataset(split="val", train_data_dir=tmp_path / "b").column_names == ["image"]


def test_ids_of_a_split_are_those_of_training(tmp_path):
    files = ("train/b/0.png", "train/d/0.png", "test/a/0.png", "test/d/0.png")
    dataset = load_image_dataset(split="test", train_data_dir=write_images(tmp_path, *files))
    assert label_names(dataset) == ["b", "d", "a"]
    assert contents(dataset) == [("d", "0.png"), ("a", "0.png")]
    assert "classes that the split train does not have: a" in dataset.info.description


def test_links_are_followed_and_their_files_count(tmp_path):
    write_images(tmp_path / "store", "cats/0.png", "dogs/0.png")
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("cats", "dogs"):
        (folder / name).symlink_to(tmp_path / "store" / name)
    (tmp_path / "store" / "cats" / "loop").symlink_to(tmp_path / "store" / "cats")
    (tmp_path / "store" / "cats" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    dataset = load_image_dataset(train_data_dir=folder)
    assert contents(dataset) == [("cats", "0.png"), ("dogs", "0.png")]
    assert "skipped 1 broken links: " in dataset.info.description
    before = folder_state(folder)
    assert len(before) == 3
    PILImage.new("RGB", (8, 8), "white").save(tmp_path / "store" / "cats" / "0.png")
    assert folder_state(folder) != before
    (folder / "dogs.png").symlink_to(tmp_path / "store" / "dogs" / "0.png")  # of a file
    before = folder_state(tmp_path / "images")
    PILImage.new("RGB", (16, 16), "white").save(tmp_path / "store" / "dogs" / "0.png")
    assert sum(one != other for one, other in zip(folder_state(folder), before, strict=True)) == 2


def test_names_that_look_alike_are_one_class(tmp_path, caplog):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    write_images(tmp_path, f"{composed}/0.png", f"{decomposed}/1.png", "tea /0.png", "tea/1.png")
    dataset = load_image_dataset(train_data_dir=tmp_path)
    assert label_names(dataset) == ["café", "tea"]
    assert sorted(dataset["label"]) == [0, 0, 1, 1]
    assert "'tea'" in caplog.text
    strings = Dataset.from_dict({"label": ["tea\n", "tea", composed, decomposed], "image": [b""] * 4})
    assert label_names(strings) == ["café", "tea"]
    assert "The labels 'tea', 'tea\\n' are one class, 'tea'" in caplog.text
    assert ImageReader(strings, ["café", "tea"], 8).label_ids() == [1, 1, 0, 0]
    named = Features({"label": ClassLabel(names=["tea", "tea ", "milk"])})
    with pytest.raises(ValueError, match="differ only by space or Unicode form, such as 'tea'"):
        label_names(Dataset.from_dict({"label": [0, 1, 2]}, features=named))


@pytest.mark.parametrize("labels", [[1, 2, 3, 1], [17, 4096, 70001, 17]])
def test_ids_that_occur_are_the_classes(labels, caplog):
    dataset = Dataset.from_dict({"label": labels, "image": [b""] * 4})
    names = label_names(dataset)
    assert names == [str(label) for label in labels[:3]]
    assert ImageReader(dataset, names, 8).label_ids() == [0, 1, 2, 0]
    assert f"the labels {', '.join(names)}: they are the classes 0 to 2" in caplog.text
    with pytest.raises(ValueError, match=f"Image 7 has the label 5; the classes are {', '.join(names)}"):
        ImageReader(dataset, names, 8).label_id(5, 7)


def test_what_was_found_is_described(tmp_path):
    write_images(tmp_path, "train/cats/0.png", "train/cats/1.png", "train/dogs/0.png", "train/2.png", "test/0.png")
    (tmp_path / "train" / "cats" / "notes.txt").write_text("")
    dataset = load_image_dataset(train_data_dir=tmp_path)
    lines = ImageReader(dataset, label_names(dataset), 8).describe().splitlines()
    assert lines[0] == "3 images in 2 classes: cats 2, dogs 1"
    assert lines[1].startswith("split test: 1 images without class folders")
    assert lines[2] == f"split train: 3 images in 2 classes, from {tmp_path / 'train'}"
    assert lines[3].startswith("skipped 1 files without the suffix of an image: ")
    assert lines[4].startswith("skipped 1 images beside the class folders: ")
    features = Features({"image": Image(), "label": ClassLabel(names=list("abc"))})
    subset = Dataset.from_dict({"image": [None] * 3, "label": [0, 2, 2]}, features=features)
    lines = ImageReader(subset, label_names(subset), 8).describe().splitlines()
    assert lines == ["3 images in 3 classes: a 1, b 0, c 2", "1 of 3 classes have no images: b"]


def test_long_lists_are_cut(tmp_path):
    write_images(tmp_path, *(f"{name:02d}/0.png" for name in range(30)))
    for index in range(30):
        (tmp_path / f"{index}.txt").write_text("")
    text = str(find_image_folders(tmp_path))
    assert "skipped 30 files without the suffix of an image" in text
    assert text.endswith("and 22 more")


def test_shards_in_folders_named_for_splits(tmp_path, caplog):
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    for name, count in (("Training", 4), ("Testing", 2)):
        (tmp_path / name).mkdir()
        rows = {"image": [PILImage.new("RGB", (8, 8))] * count, "label": [0, 1] * (count // 2)}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / name / "part-0.parquet")
    for source in ({"train_data_dir": tmp_path}, {"dataset_name": str(tmp_path)}):
        assert [len(load_image_dataset(split=name, **source)) for name in ("train", "test")] == [4, 2]
    write_images(tmp_path / "assets", "preview.png")
    assert len(load_image_dataset(str(tmp_path))) == 4
    assert "Skipped images beside the .parquet shards: " in caplog.text
    (tmp_path / "Testing" / "part-0.parquet").rename(tmp_path / "part-1.parquet")
    with pytest.raises(ValueError, match="shards whose names name none: .*part-1.parquet"):
        load_image_dataset(train_data_dir=tmp_path)


def test_metadata_beside_images_name_their_classes(tmp_path):
    write_images(tmp_path / "train", "0.png", "1.png")
    rows = [json.dumps({"file_name": f"{index}.png", "label": name}) for index, name in enumerate(("cat", "dog"))]
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(rows))
    assert label_names(load_image_dataset(train_data_dir=tmp_path)) == ["cat", "dog"]
    write_images(tmp_path / "[2]" / "Train", "0.png", "1.png")
    write_images(tmp_path / "[2]" / "Test", "0.png")
    for name, count in (("Train", 2), ("Test", 1)):
        (tmp_path / "[2]" / name / "metadata.jsonl").write_text("\n".join(rows[:count]))
        assert len(load_image_dataset(train_data_dir=tmp_path / "[2]", split=name.lower())) == count


def test_tables_are_left_to_datasets(tmp_path):
    rows = [json.dumps({"image": f"{index}.png", "label": name}) for index, name in enumerate(("cat", "dog"))]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    assert label_names(load_image_dataset(str(tmp_path))) == ["cat", "dog"]


def test_all_images_below_a_folder(tmp_path):
    write_images(tmp_path / "images", "1.png", "sub/0.JPG", "sub/.hidden.png", "__MACOSX/0.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"not an image")
    dataset = load_unlabelled_folder(tmp_path / "images")
    files = [os.path.relpath(row["path"], tmp_path / "images") for row in ImageReader(dataset).dataset["image"]]
    assert files == ["1.png", "broken.png", "sub/0.JPG"]
    skipped = []
    images = [image for image, _ in ImageReader(dataset).readable(ImageReader(dataset).dataset, skipped)]
    assert [tuple(image.shape) for image in images] == [(3, 8, 8)] * 2
    assert "broken.png" in skipped[0][0]
    for folder, message in ((tmp_path / "none", "There is no folder"), (tmp_path / "empty", "holds no images")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=message):
            load_unlabelled_folder(folder)


def test_splits_that_number_their_classes_differently():
    features = Features({"image": Image(), "label": ClassLabel(names=["b", "a"])})
    dataset = Dataset.from_dict({"image": [None] * 2, "label": [0, 1]}, features=features)
    assert ImageReader(dataset, ["a", "b"], 8).label_ids() == [1, 0]


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_saved_to_disk_are_loaded(tmp_path, streaming):
    dataset = Dataset.from_dict({"label": [0, 1]})
    dataset.save_to_disk(tmp_path / "one")
    assert len(list(load_image_dataset(str(tmp_path / "one"), streaming=streaming))) == 2
    DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(tmp_path / "two")
    assert len(list(load_image_dataset(train_data_dir=tmp_path / "two", split="test", streaming=streaming))) == 1
    with pytest.raises(ValueError, match="has no split 'test'; it has train"):
        load_image_dataset(str(tmp_path / "one"), "test", streaming=streaming)


def test_a_folder_that_is_not_there_is_said_to_be_missing():
    with pytest.raises(ValueError, match="dataset 'pictures/of/none': .* There is no folder of this name here"):
        load_image_dataset("pictures/of/none")
