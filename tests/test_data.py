"""Data: datasets of every kind, damaged images, the cache of latents."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile

import fsspec
import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_vae
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from testing_utils.training_runs import kill_after

from dit_hf.data import shards
from dit_hf.data.fingerprints import cache_settings, checksum, fingerprint_of
from dit_hf.data.images import label_names, load_image_dataset
from dit_hf.data.latents import (
    DECODER,
    CachedLatents,
    EncodedImages,
    cache_latents,
    index_latents,
    latent_shape,
    normalise_latents,
    verify_latents,
)
from dit_hf.data.pixels import center_crop, normalize_pixels
from dit_hf.data.reader import ImageReader
from dit_hf.data.shards import file_checksum, index_checksum, known_fingerprint, read_index
from dit_hf.training.data import ImageData, checksums, write_latents
from dit_hf.training.running import local_share, start_accelerator


PRECOMPUTE = ROOT / "examples" / "train_class_cond" / "precompute_latents.py"


def write_class_folders(folder, count=6):
    """A folder with one folder of PNGs a class; grey values tell them apart."""
    for index in range(count):
        path = folder / ("cats" if index % 2 else "dogs") / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PILImage.new("RGB", (40, 32), (10 * index,) * 3).save(path)
    return folder


def greys(dataset, names):
    """Mean grey and class name of each readable image."""
    reader = ImageReader(dataset, names, 32, *reader_columns(dataset))
    rows = [reader.read(row, index) for index, row in enumerate(reader.dataset)]
    return sorted((round(image.float().mean().item()), names[label]) for image, label in rows)


def reader_columns(dataset):
    columns = dataset.column_names or list(next(iter(dataset)))
    return ("png", "txt") if "png" in columns else ("image", "label")


EXPECTED = [(10 * index, "cats" if index % 2 else "dogs") for index in range(6)]


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_of_images_and_shards_are_read(tmp_path, streaming):
    folder = write_class_folders(tmp_path / "folder")
    shards = tmp_path / "shards"
    shards.mkdir()
    with tarfile.open(shards / "a.tar", "w") as tar:
        for index, path in enumerate(sorted(folder.rglob("*.png"))):
            for suffix, content in (("png", path.read_bytes()), ("txt", path.parent.name.encode())):
                entry = tarfile.TarInfo(f"{index:03d}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    parquet = tmp_path / "parquet"
    parquet.mkdir()
    load_image_dataset(train_data_dir=folder).to_parquet(parquet / "part-0.parquet")
    for source in (folder, shards, parquet):
        dataset = load_image_dataset(train_data_dir=source, streaming=streaming)
        names = label_names(dataset, reader_columns(dataset)[1])
        assert names == ["cats", "dogs"]
        assert greys(dataset, names) == EXPECTED


def test_splits_and_classes_are_told_apart(tmp_path):
    """A class may be called like a split, and a split of shards is not trained on with the others."""
    folder = tmp_path / "[classes]"
    for name in ("train", "test-drive", "car"):
        (folder / name).mkdir(parents=True)
        PILImage.new("RGB", (8, 8)).save(folder / name / "a.png")
    dataset = load_image_dataset(train_data_dir=folder)
    assert label_names(dataset) == ["car", "test-drive", "train"]
    assert len(dataset) == 3
    for split, count in (("train", 6), ("test", 4)):
        write_class_folders(tmp_path / "splits" / split, count)
    found = {split: load_image_dataset(split=split, train_data_dir=tmp_path / "splits") for split in ("train", "test")}
    assert {split: len(dataset) for split, dataset in found.items()} == {"train": 6, "test": 4}
    (tmp_path / "splits" / ".cache").mkdir()
    assert len(load_image_dataset(train_data_dir=tmp_path / "splits")) == 6
    (tmp_path / "splits" / "figures").mkdir()
    with pytest.raises(ValueError, match="splits test, train and beside them 'figures'"):
        load_image_dataset(train_data_dir=tmp_path / "splits")
    (tmp_path / "shards" / "data").mkdir(parents=True)
    for split, dataset in found.items():
        dataset.to_parquet(tmp_path / "shards" / "data" / f"{split}-00000-of-00001.parquet")
    assert len(load_image_dataset(train_data_dir=tmp_path / "shards")) == 6
    PILImage.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "flat").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "flat" / "a.png")
    with pytest.raises(ValueError, match="has no folders"):
        load_image_dataset(train_data_dir=tmp_path / "flat")


def cache(folder, vae, dataset, names=("dark", "light"), processes=1, shard_size=4, **options):
    """A complete cache, its shards written by each of some processes in turn."""
    reader = ImageReader(dataset, list(names), 32)
    made_by = {"vae": checksum(vae, DECODER), "encoder": None}
    fingerprint = fingerprint_of(cache_settings(dataset, "memory", classes=names, **made_by))
    for rank in reversed(range(processes)):
        count = cache_latents(vae, reader, folder, fingerprint, rank, processes, shard_size=shard_size, **options)
    return index_latents(folder, fingerprint, list(names), count, made_by)


def test_cache_holds_the_posteriors_whatever_the_number_of_processes(workspace, tmp_path):
    vae, dataset = tiny_vae(), load_image_dataset(str(workspace / "data"))
    indices = [cache(tmp_path / str(count), vae, dataset, processes=count) for count in (1, 3)]
    assert indices[0] == indices[1]  # checksums too
    assert [shard["count"] for shard in indices[0]["shards"]] == [4] * 5
    assert verify_latents(tmp_path / "3") == indices[1]
    latents = CachedLatents(tmp_path / "3")
    images, labels = ImageReader(dataset, ["dark", "light"], 32).stack()
    assert labels == dataset["label"]
    flipped = torch.tensor([True, False])
    read = latents.read(torch.tensor([5, 19]), flipped)
    for row, view in enumerate((images[5].flip(-1), images[19])):
        with torch.no_grad():
            posterior = vae.encode(normalize_pixels(view[None])).latent_dist
        # Half precision rounds a value by 2⁻¹¹ of its size at most.
        torch.testing.assert_close(read["mean"][row], posterior.mean[0], rtol=2**-11, atol=1e-5)
        torch.testing.assert_close(read["std"][row], posterior.std[0], rtol=2**-11, atol=1e-5)
    assert read["label"].tolist() == [1, 1]
    assert latents.labels.tolist() == dataset["label"]


def test_a_cache_that_was_begun_in_single_precision_goes_on_so(workspace, tmp_path):
    """As a release before 0.3 wrote them."""
    cache(tmp_path, tiny_vae(), load_image_dataset(str(workspace / "data")))
    index = json.loads((tmp_path / "index.json").read_text())
    for shard in index["shards"]:
        with safe_open(tmp_path / shard["file"], "pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        assert tensors["mean"].dtype == torch.float16
        save_file(
            {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()},
            tmp_path / shard["file"],
            metadata,
        )
    for name in ("index.json", "shard-00003.safetensors"):
        (tmp_path / name).unlink()
    cache(tmp_path, tiny_vae(), load_image_dataset(str(workspace / "data")))
    latents = CachedLatents(tmp_path)
    assert all(rows.dtypes["mean"] == torch.float32 for rows in latents._rows)
    assert latents.read(torch.arange(20), torch.zeros(20, dtype=torch.bool))["mean"].isfinite().all()


def test_statistics_make_unit_latents(workspace, tmp_path):
    vae = tiny_vae()
    cache(tmp_path, vae, load_image_dataset(str(workspace / "data")))
    latents = CachedLatents(tmp_path)
    everything = torch.arange(len(latents.labels))
    read = latents.read(everything, torch.zeros(len(everything), dtype=torch.bool))
    samples = read["mean"] + read["std"] * torch.randn(50, *read["std"].shape)
    normal = normalise_latents(samples.flatten(0, 1), *latents.statistics)
    torch.testing.assert_close(normal.mean(dim=(0, 2, 3)), torch.zeros(4), rtol=0, atol=0.02)
    torch.testing.assert_close(normal.std(dim=(0, 2, 3)), torch.ones(4), rtol=0, atol=0.02)


def test_cache_keeps_what_is_there(workspace, tmp_path):
    vae, dataset = tiny_vae(), load_image_dataset(str(workspace / "data"))
    first = cache(tmp_path, vae, dataset)
    shard = tmp_path / "shard-00002.safetensors"
    written = shard.stat().st_mtime_ns
    (tmp_path / "shard-00001.safetensors").unlink()
    assert cache(tmp_path, vae, dataset) == first
    assert shard.stat().st_mtime_ns == written


def test_a_cache_of_others_is_not_overwritten(workspace, tmp_path):
    """Neither a finished one, which a training may need to resume, nor an unfinished one, nor files of the user."""
    vae, dataset = tiny_vae(), load_image_dataset(str(workspace / "data"))
    cache(tmp_path / "cache", vae, dataset)
    before = contents(tmp_path / "cache")
    with torch.no_grad():
        vae.quant_conv.weight.mul_(3)
    with pytest.raises(ValueError, match="holds a finished cache of other latents.*Choose another folder, or remove"):
        cache(tmp_path / "cache", vae, dataset)
    with pytest.raises(ValueError, match="holds a finished cache of other latents"):
        cache(tmp_path / "cache", tiny_vae(), dataset.select(range(5)))
    assert contents(tmp_path / "cache") == before
    (tmp_path / "cache" / "index.json").unlink()
    with pytest.raises(ValueError, match="shard-00000.safetensors is of an unfinished cache of other latents"):
        cache(tmp_path / "cache", vae, dataset)
    for content in (b"mine", before["shard-00000.safetensors"][:200]):
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine" / "shard-00003.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="shard-00003.safetensors was not written by `dit-hf latents`"):
            cache(tmp_path / "mine", vae, dataset)
        assert contents(tmp_path / "mine") == {"shard-00003.safetensors": content}
    for facts in ("[]", "[" * 100_000, '{"fingerprint": 1, "unreadable": []}'):
        save_file({"label": torch.zeros(1)}, tmp_path / "mine" / "shard-00003.safetensors", {"dit_hf": facts})
        with pytest.raises(ValueError, match="shard-00003.safetensors was not written by `dit-hf latents`"):
            cache(tmp_path / "mine", vae, dataset)
    (tmp_path / "mine" / "shard-00003.safetensors").unlink()
    (tmp_path / "mine" / "index.json").write_text("{}")
    with pytest.raises(ValueError, match="index.json is not the index of a latents cache: 'fingerprint' is missing"):
        cache(tmp_path / "mine", vae, dataset)
    reader = ImageReader(dataset, ["dark", "light"], 32)
    for options in ({"shard_size": 0}, {"shard_size": 2**21}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            cache_latents(vae, reader, tmp_path / "new", "new", **options)
    assert not (tmp_path / "new").exists()


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_leftovers_of_killed_runs_are_removed(workspace, tmp_path):
    leftover = tmp_path / ".dit_hf-partial-elsewhere-12-3-shard-00001.safetensors"
    leftover.write_bytes(b"half a shard")
    cache(tmp_path, tiny_vae(), load_image_dataset(str(workspace / "data")))
    assert not leftover.exists()


def test_what_has_changed_is_said(tmp_path):
    """One image's size is enough; the cache stays as it is."""
    vae, folder = tiny_vae(), write_class_folders(tmp_path / "images", 12)
    accelerator = start_accelerator()

    def encode(**options):
        data = ImageData(**({"resolution": 32, "train_data_dir": folder} | options))
        write_latents(accelerator, vae, data, data.reader(), tmp_path / "cache", shard_size=5)

    encode()
    before = contents(tmp_path / "cache")
    encode()
    assert contents(tmp_path / "cache") == before
    with pytest.raises(ValueError, match="finished cache of other latents: resolution was 32, now 64. Choose"):
        encode(resolution=64)
    with open(folder / "cats" / "03.png", "ab") as image:
        image.write(b"more")
    os.utime(folder / "cats" / "03.png", (4e9, 4e9))
    with pytest.raises(ValueError, match=r"of the image files have changed \(cats/03.png changed since\)"):
        encode()
    assert contents(tmp_path / "cache") == before


def test_images_whose_dates_alone_have_changed_are_compared(tmp_path, monkeypatch):
    """As on another machine, after a copy: all of them once, which is then recorded."""
    vae, folder = tiny_vae(), write_class_folders(tmp_path / "images", 12)
    monkeypatch.setattr("dit_hf.data.latents.COMPARED_IMAGES", 0)  # a sample is compared in any case
    data, cache_dir = ImageData(resolution=32, train_data_dir=folder), tmp_path / "cache"

    def encode():
        write_latents(start_accelerator(), vae, data, data.reader(), cache_dir, shard_size=5)

    encode()
    before, fingerprint = contents(cache_dir), read_index(cache_dir)["fingerprint"]
    for image in folder.rglob("*.png"):
        os.utime(image, (4e8, 4e8))
    settings = data.settings(data.reader(), 5, **checksums(vae))
    assert known_fingerprint(cache_dir, settings) == (fingerprint, True)
    encode()
    after = contents(cache_dir)
    assert {name for name in after if after[name] != before.get(name)} == {"index.json"}
    assert known_fingerprint(cache_dir, settings) == (fingerprint, False)
    image = folder / "cats" / "03.png"
    content = bytearray(image.read_bytes())
    content[-20] ^= 1
    image.write_bytes(content)
    with pytest.raises(ValueError, match="cats/03.png.* is not the image that .*shard-00000"):
        encode()
    assert contents(cache_dir) == after


def test_other_pixels_of_the_same_size_and_date_are_found(tmp_path):
    vae, folder = tiny_vae(), write_class_folders(tmp_path / "images", 12)
    data = ImageData(resolution=32, train_data_dir=folder)
    write_latents(start_accelerator(), vae, data, data.reader(), tmp_path / "cache", shard_size=5)
    image, status = folder / "cats" / "03.png", (folder / "cats" / "03.png").stat()
    content = bytearray(image.read_bytes())
    content[-20] ^= 1
    image.write_bytes(content)
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    for _ in range(2):  # of a finished cache, and of one to be completed
        with pytest.raises(ValueError, match="image 1 .*cats/03.png.* is not the image that .*shard-00000"):
            write_latents(start_accelerator(), vae, data, data.reader(), tmp_path / "cache", shard_size=5)
        (tmp_path / "cache" / "index.json").unlink(missing_ok=True)


def test_damage_is_found(workspace, tmp_path):
    cache(tmp_path, tiny_vae(), load_image_dataset(str(workspace / "data")))
    shard = tmp_path / "shard-00001.safetensors"
    flip_bit(shard)
    for read in (verify_latents, CachedLatents):
        with pytest.raises(ValueError, match="shard-00001.*not what was written; delete it"):
            read(tmp_path)
    shard.write_bytes(b"")  # as a power cut may leave it
    with pytest.raises(ValueError, match="shard-00001.*missing"):
        CachedLatents(tmp_path)
    cache(tmp_path, tiny_vae(), load_image_dataset(str(workspace / "data")))
    verify_latents(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match="shard-00001.*missing"):
        CachedLatents(tmp_path)
    with pytest.raises(ValueError, match="no cache of latents"):
        CachedLatents(tmp_path / "other")


def test_each_process_of_a_machine_verifies_its_share(workspace, tmp_path, monkeypatch):
    cache(tmp_path, tiny_vae(), load_image_dataset(str(workspace / "data")))
    flip_bit(tmp_path / "shard-00003.safetensors")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # that others open the cache as well is not said by the environment
    assert local_share(start_accelerator()) == (0, 1)
    CachedLatents(tmp_path, 0, 2)
    for share in ((1, 2), ()):
        with pytest.raises(ValueError, match="shard-00003.*not what was written"):
            CachedLatents(tmp_path, *share)


def test_a_verified_cache_is_read_once(workspace, tmp_path, monkeypatch):
    cache(tmp_path, tiny_vae(), load_image_dataset(str(workspace / "data")))
    read = []
    monkeypatch.setattr(shards, "file_checksum", lambda path: read.append(path.name) or file_checksum(path))
    assert latent_shape(tmp_path) == CachedLatents(tmp_path).shape and not read  # as it was just written
    for path in tmp_path.glob(".verified-*"):
        path.unlink()
    assert CachedLatents(tmp_path).shape and len(read) == 5
    CachedLatents(tmp_path)
    CachedLatents(tmp_path, 1, 2)
    assert len(read) == 5
    flip_bit(tmp_path / "shard-00003.safetensors")
    with pytest.raises(ValueError, match="shard-00003.*not what was written"):
        CachedLatents(tmp_path)
    assert read[5:] == ["shard-00003.safetensors"]
    for path in tmp_path.glob(".verified-*"):
        path.write_text("damaged")
    with pytest.raises(ValueError, match="shard-00003.*not what was written"):
        CachedLatents(tmp_path)


def flip_bit(shard):
    """Damages one bit of the latents."""
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)


def rewrite(folder, tensors=None, **changes):
    """A cache with other content and the right checksum, as another program or an attacker may write it."""
    index = json.loads((folder / "index.json").read_text())
    for shard in index["shards"] if tensors else ():
        path = folder / shard["file"]
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        save_file({name: tensor.contiguous() for name, tensor in tensors(load_file(path)).items()}, path, metadata)
        shard["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    index |= changes
    (folder / "index.json").write_text(json.dumps(index | {"checksum": index_checksum(index)}))


@pytest.mark.parametrize(
    "change", [{"moments": None}, {"moments": [8, [0.0], [1.0]]}, {"moments": {}}, {"unreadable_labels": 5}]
)
def test_metadata_of_an_unfinished_cache_that_are_none(workspace, tmp_path, change):
    """As those of another program, so that the shard is not overwritten."""
    data = load_image_dataset(str(workspace / "data"))
    cache(tmp_path, tiny_vae(), data)
    path = tmp_path / "shard-00000.safetensors"
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["dit_hf"])
    save_file(load_file(path), path, {"dit_hf": json.dumps(facts | change)})
    (tmp_path / "index.json").unlink()
    with pytest.raises(ValueError, match="shard-00000.safetensors was not written by `dit-hf latents`"):
        cache(tmp_path, tiny_vae(), data)


def test_a_negative_deviation_is_refused(workspace, tmp_path):
    cache(tmp_path, tiny_vae(), load_image_dataset(str(workspace / "data")))
    rewrite(tmp_path, lambda tensors: tensors | {"std": tensors["std"] - 9})
    with pytest.raises(ValueError, match="its deviation is below 0"):
        CachedLatents(tmp_path).read(torch.tensor([0]), torch.tensor([False]))


def test_an_index_that_was_changed_is_refused(workspace, tmp_path):
    cache(tmp_path, tiny_vae(), load_image_dataset(str(workspace / "data")))
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(index | {"latents_mean": [8.0] * len(index["latents_mean"])}))
    with pytest.raises(ValueError, match="index.json was changed since it was written"):
        CachedLatents(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors | {"label": tensors["label"] + 5}, "labels from 5 to 6; there are 2 classes"),
        (lambda tensors: tensors | {"label": tensors["label"][:1]}, "'label' must hold 4 classes"),
        (lambda tensors: tensors | {"label": tensors["label"].float()}, "'label' must hold 4 classes"),
        (lambda tensors: tensors | {"mean": tensors["mean"][:, :2]}, "' is F16 of shape"),
        (lambda tensors: {"label": tensors["label"]}, "must hold mean, mean_flipped, std, std_flipped; it holds"),
        (lambda tensors: tensors | {"mean": tensors["mean"].long()}, "'mean' is I64"),
    ],
)
def test_shards_that_hold_something_else(workspace, tmp_path, change, message):
    cache(tmp_path, tiny_vae(), load_image_dataset(str(workspace / "data")))
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=f"shard-00000.safetensors.*({message})"):
        CachedLatents(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shards": [{"file": "../shard-00000.safetensors", "count": 20, "sha256": "0"}]}, "names other files"),
        ({"shards": [{"file": "shard-00000.safetensors", "count": 10**12, "sha256": "0"}]}, "'shards' is missing or"),
        ({"count": 10**9}, "'count' is not the sum"),
        ({"classes": ["dark", "dark"]}, "'classes'"),
        ({"latents_std": [1.0, 1.0, 0.0, 1.0]}, "'latents_std'"),
        ({"latents_mean": [float("nan")] * 4}, "'latents_mean'"),
        ({"latents_mean": [0.0]}, "different lengths"),
        ({"latents_mean": [10**400] * 4}, "'latents_mean' is too large a number"),
        ({"latents_mean": [True] * 4}, "'latents_mean'"),
    ],
)
def test_an_index_that_is_none(workspace, tmp_path, changes, message):
    cache(tmp_path, tiny_vae(), load_image_dataset(str(workspace / "data")))
    rewrite(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"index.json.*{message}"):
        CachedLatents(tmp_path)


def test_latents_that_are_not_finite(workspace, tmp_path):
    """Where they are encoded, and in a cache of others where they are read."""
    vae, dataset = tiny_vae(), load_image_dataset(str(workspace / "data"))
    cache(tmp_path / "cache", vae, dataset)
    rewrite(tmp_path / "cache", lambda tensors: tensors | {"mean": tensors["mean"].fill_(float("nan"))})
    with pytest.raises(ValueError, match="cache: sample 3 is not finite"):
        CachedLatents(tmp_path / "cache").read(torch.tensor([3]), torch.tensor([False]))
    with torch.no_grad():
        vae.quant_conv.weight.fill_(float("inf"))
    with pytest.raises(
        ValueError, match="Images from 0 on: mean is not finite for 4 of 4 images.*weights are damaged"
    ):
        cache(tmp_path / "new", vae, dataset)
    assert not list((tmp_path / "new").glob("*"))


def damaged(workspace, count):
    """The workspace's images, some of them cut short."""
    rows = load_image_dataset(str(workspace / "data")).cast_column("image", stored()).to_list()
    for row in rows[:count]:
        row["image"]["bytes"] = row["image"]["bytes"][:100]
    features = load_image_dataset(str(workspace / "data")).features
    return Dataset.from_list(rows, features=features)


def stored():
    return Image(decode=False)


def test_images_of_every_kind_are_decoded_alike():
    """Turned by EXIF, 16 bits, greyscale, CMYK, palette."""
    upright = PILImage.new("RGB", (40, 40), "black")
    upright.paste("white", (0, 0, 40, 20))  # the upper half
    turned = upright.rotate(90)
    exif = turned.getexif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    file = io.BytesIO()
    turned.save(file, "PNG", exif=exif)
    ramp = np.linspace(0, 65535, 1600).reshape(40, 40).astype(np.uint16)
    assert np.array_equal(center_crop(PILImage.open(file), 40), upright)
    assert np.asarray(center_crop(PILImage.fromarray(ramp), 40)).mean() == pytest.approx(127.5, abs=1)
    for mode in ("L", "CMYK", "P", "LA", "1"):
        assert np.abs(np.asarray(center_crop(upright.convert(mode), 40)).astype(int) - np.asarray(upright)).max() < 3


def test_an_image_that_is_not_there_is_named(workspace, tmp_path):
    rows = load_image_dataset(str(workspace / "data")).cast_column("image", stored()).to_list()
    rows[3]["image"] = None
    dataset = Dataset.from_list(rows, features=load_image_dataset(str(workspace / "data")).features)
    assert cache(tmp_path, tiny_vae(), dataset)["unreadable"][0].startswith("image 3 (in the dataset)")


def test_damaged_images_are_skipped_and_named(workspace, tmp_path, caplog):
    index = cache(tmp_path, tiny_vae(), damaged(workspace, 2))
    assert index["count"] == 18
    assert [line.split(" (")[0] for line in index["unreadable"]] == ["image 0", "image 1"]
    assert len(CachedLatents(tmp_path).labels) == 18
    with pytest.raises(ValueError, match="3 of 20 images can't be read, such as image 0"):
        cache(tmp_path / "more", tiny_vae(), damaged(workspace, 3))


def test_a_class_that_can_not_be_decoded_is_refused(workspace, tmp_path):
    rows = load_image_dataset(str(workspace / "data")).cast_column("image", stored()).to_list()
    rows[14] = {"image": {"bytes": b"not an image", "path": None}, "label": 2}
    dataset = Dataset.from_list(rows).cast_column("image", stored())
    names = label_names(dataset)
    with pytest.raises(ValueError, match="No image of the class '2' can be read, such as image 14"):
        cache(tmp_path, tiny_vae(), dataset, names)
    with pytest.raises(ValueError, match="No image of the class '2' can be read, such as image 14"):
        EncodedImages(tiny_vae(), ImageReader(dataset, names, 32))


def test_a_subset_keeps_the_ids_of_its_classes(workspace, tmp_path, caplog):
    features = Features({"image": Image(), "label": ClassLabel(names=["dark", "light", "a", "b"])})
    rows = load_image_dataset(str(workspace / "data")).cast_column("image", stored()).to_list()
    dataset = Dataset.from_list(rows, features=features)
    names = label_names(dataset)
    index = cache(tmp_path, tiny_vae(), dataset, names)
    assert index["classes"] == ["dark", "light", "a", "b"]
    assert "2 of 4 classes have no images and keep their ids: a, b" in caplog.text
    caplog.clear()
    EncodedImages(tiny_vae(), ImageReader(dataset, names, 32))
    assert "2 of 4 classes have no images" in caplog.text


def test_the_fingerprint_follows_links_not_the_folder(tmp_path):
    """A file behind a link counts; where the dataset's folder lies does not."""
    write_class_folders(tmp_path / "store")
    (tmp_path / "data").mkdir()
    for name in ("cats", "dogs"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "store" / name)
    dataset = load_image_dataset(train_data_dir=tmp_path / "data")
    first = fingerprint_of(cache_settings(dataset, tmp_path / "data", split="train"))
    (tmp_path / "data").rename(tmp_path / "moved")
    assert fingerprint_of(cache_settings(dataset, os.path.relpath(tmp_path / "moved"), split="train")) == first
    assert fingerprint_of(cache_settings(dataset, tmp_path / "moved", split="test")) != first
    PILImage.new("RGB", (40, 32), "red").save(tmp_path / "store" / "cats" / "01.png")
    second = fingerprint_of(cache_settings(dataset, tmp_path / "moved", split="train"))
    assert second != first
    PILImage.new("RGB", (40, 32), "red").save(tmp_path / "store" / "cats" / "new.png")
    assert fingerprint_of(cache_settings(dataset, tmp_path / "moved", split="train")) not in (first, second)


def test_an_image_that_a_server_does_not_deliver_is_not_skipped(workspace):
    """It would be missing for good, as what is encoded is kept."""
    file = io.BytesIO()
    PILImage.new("RGB", (40, 40), "white").save(file, "PNG")
    fsspec.filesystem("memory").pipe("/white.png", file.getvalue())
    reader = ImageReader(load_image_dataset(str(workspace / "data")), ["dark", "light"], 32)
    row = {"image": {"path": "memory://white.png", "bytes": None}, "label": 1}
    image, label = reader.read(row, 0)
    assert (image.min(), label) == (255, 1)
    row["image"]["path"] = "memory://none.png"  # there is none, and never will be
    with pytest.raises(OSError, match="image 6 .*none.png"):
        reader.read(row, 6)
    row["image"]["path"] = "http://127.0.0.1:9/none.png"
    with pytest.raises(ValueError, match="image 7 .*none.png.* can't be fetched"):
        reader.read(row, 7)


def test_latents_as_images_are_drawn(workspace, caplog):
    vae, dataset = tiny_vae(), damaged(workspace, 1)
    vae.register_to_config(scaling_factor=0.5, shift_factor=0.1)
    latents = EncodedImages(vae, ImageReader(dataset, ["dark", "light"], 32))
    assert latents.statistics == ([0.1], [2.0])
    read = latents.read(torch.tensor([0, 4]), torch.tensor([False, True]))  # 0 is damaged; 1 takes its place
    assert read["label"].tolist() == [1, 0]
    image = ImageReader(load_image_dataset(str(workspace / "data")), resolution=32).stack()[0][4]
    with torch.no_grad():
        posterior = vae.encode(normalize_pixels(image.flip(-1)[None])).latent_dist
    torch.testing.assert_close(read["mean"][1], posterior.mean[0], rtol=0, atol=1e-5)
    stream = load_image_dataset(str(workspace / "data"), streaming=True)
    with pytest.raises(ValueError, match="--no-cache_latents"):
        EncodedImages(vae, ImageReader(stream, ["dark", "light"], 32))


def test_precompute_with_two_processes_goes_on_after_a_kill(workspace, tmp_path):
    def command(output_dir):
        return [PRECOMPUTE, "--dataset_name", workspace / "data", "--vae", workspace / "vae", "--resolution", "32",
                "--shard_size", "3", "--output_dir", output_dir]  # fmt: skip

    kill_after([sys.executable, *command(tmp_path / "a")], tmp_path / "a" / "shard-00001.safetensors")
    written = (tmp_path / "a" / "shard-00000.safetensors").stat().st_mtime_ns
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*launch, *command(tmp_path / "a"), "--streaming"], env=environment, capture_output=True, text=True, check=True
    )
    assert "20 images, 7 shards, verified" in result.stdout
    assert (tmp_path / "a" / "shard-00000.safetensors").stat().st_mtime_ns == written  # kept, not encoded again
    assert not list((tmp_path / "a").glob(".dit_hf-partial-*"))
    config = json.loads((tmp_path / "a" / "vae" / "config.json").read_text())
    assert config["latents_mean"] == json.loads((tmp_path / "a" / "index.json").read_text())["latents_mean"]


def test_centre_crop_takes_the_middle():
    pixels = np.zeros((40, 100, 3), dtype=np.uint8)
    pixels[:, 30:70] = 255
    crop = np.asarray(center_crop(PILImage.fromarray(pixels), 20))
    assert crop.shape == (20, 20, 3)
    assert crop.min() == 255


def test_resizing_interpolates():
    """A ramp stays a ramp, at the middles of the new pixels."""
    ramp = np.broadcast_to((8 * np.arange(30, dtype=np.uint8))[None, :, None], (30, 30, 3))
    crop = np.asarray(center_crop(PILImage.fromarray(ramp.copy()), 20)).astype(float)
    expected = 8 * (1.5 * (np.arange(20) + 0.5) - 0.5)
    assert np.abs(crop[:, 2:-2] - expected[None, 2:-2, None]).max() <= 1


def test_transparency_becomes_white():
    image = PILImage.new("RGBA", (16, 16), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (4, 4, 12, 12))
    for mode in ("RGBA", "P"):
        crop = np.asarray(center_crop(image.convert(mode), 16))
        assert crop[0, 0].tolist() == [255, 255, 255]
        assert crop[8, 8].tolist() == [0, 0, 255]


def test_bad_data_is_named(workspace, tmp_path):
    with pytest.raises(ValueError, match="empty"):
        load_image_dataset(str(tmp_path))
    with pytest.raises(ValueError, match="validation"):
        load_image_dataset(str(workspace / "data"), "validation")
    dataset = load_image_dataset(str(workspace / "data"))
    with pytest.raises(ValueError, match="'photo'.*image, label.*--image_column"):
        ImageReader(dataset, resolution=32, image_column="photo")
    with pytest.raises(ValueError, match="'class'.*image, label.*--label_column"):
        label_names(dataset, "class")
    with pytest.raises(ValueError, match="a class's id, from 0, or its name"):
        label_names(dataset, "image")
    with pytest.raises(ValueError, match="no folder"):
        load_image_dataset(train_data_dir=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="either --dataset_name or --train_data_dir"):
        load_image_dataset()


def test_labels_of_every_kind():
    def dataset(*labels):
        return Dataset.from_dict({"label": list(labels)})

    assert label_names(dataset(1, 0)) == ["0", "1"]
    assert label_names(dataset("b", "a", "b")) == ["a", "b"]
    assert label_names(dataset(0, 0)) == ["0"]
    for labels, message in (((0.5, 1.0), "0.5"), ((-1, 1), "-1")):
        with pytest.raises(ValueError, match=message):
            label_names(dataset(*labels))


def test_labels_out_of_range_are_named(workspace):
    reader = ImageReader(load_image_dataset(str(workspace / "data")), ["dark"], 32)
    with pytest.raises(ValueError, match="Image 7 has the label 1; the classes are 0 to 0"):
        reader.label_id(1, 7)
