"""Damaged and hostile data: refused or skipped by name, in one line, before they take memory or start a program."""

import errno
import importlib
import io
import os
import platform
import resource
import struct
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, tiny_transformer, tiny_vae
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from dit_hf import DiTClassCondPipeline, make_scheduler
from dit_hf.command_line import run
from dit_hf.commands.latents import main
from dit_hf.data.archives import check_archive
from dit_hf.data.encoded import image_bytes
from dit_hf.data.images import label_names, load_image_dataset
from dit_hf.data.pixels import MAX_IMAGE_BYTES, open_image
from dit_hf.data.reader import ImageReader


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def raw_png(width, height, depth, scanlines, *chunks):
    """A greyscale PNG whose header says anything."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))
    return b"".join(
        (b"\x89PNG\r\n\x1a\n", header, *chunks, chunk(b"IDAT", zlib.compress(scanlines)), chunk(b"IEND", b""))
    )


def rows(*contents):
    """A dataset of encoded images; `datasets` would decode them."""
    stored = [{"bytes": content, "path": None} for content in contents]
    return Dataset.from_dict({"image": stored}, features=Features({"image": Image()}))


def read(content, resolution=64):
    reader = ImageReader(rows(content), resolution=resolution)
    return reader.read(reader.dataset[0], 0)[0]


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A file that exists once Pillow has started Ghostscript."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'started'}\nexit 1\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path / "started"


def test_no_image_starts_a_program(tmp_path, ghostscript):
    file = tmp_path / "image.png"
    file.write_bytes(EPS)
    with pytest.raises(OSError, match="image 0 .*not a supported image .PNG, JPEG"):
        read(EPS)
    with pytest.raises(ValueError, match="image.png is not a supported image .PNG, JPEG"):
        open_image(file)
    with pytest.raises(ValueError, match="Column 'image' holds images"):
        label_names(rows(EPS), "image")
    assert not ghostscript.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (raw_png(10**5, 10**5, 8, b""), "pixels"),
        (raw_png(13_000, 13_000, 8, b""), "13,000 × 13,000 pixels; at most 134,217,728"),
        (encode(PILImage.new("1", (1_000_000, 1))), "resized to a short side of 64, has 64,000,000 × 64 pixels"),
        (b"", "not a supported image .PNG"),
        (b"P6 0 0 255\n", "not a supported image .PNG"),
        (encode(PILImage.fromarray(np.full((8, 8), 0.5, np.float32)), "TIFF"), "mode F"),
        (encode(PILImage.fromarray(np.full((8, 8), 10**9, np.int32)), "TIFF"), "exceed 16 bits"),
        (encode(PILImage.new("LAB", (8, 8)), "TIFF"), "mode LAB"),
    ],
    ids=["10 gigapixels", "169 megapixels", "a strip", "empty", "0 pixels", "floating point", "32 bits", "LAB"],
)
def test_images_that_are_not_decoded(content, message):
    with pytest.raises(OSError, match=f"image 0 .*{message}"):
        read(content)


def test_images_that_are_unusual_are_read_right():
    assert read(encode(PILImage.new("RGB", (1, 1), "white"))).min() == 255
    frames = [PILImage.new("L", (8, 8), 255 - index) for index in range(200)]
    assert read(encode(frames[0], "GIF", save_all=True, append_images=frames[1:])).min() == 255  # the first frame
    scanlines = (b"\0" + b"\x80\0" * 4 + b"\0\0" * 4) * 8  # the left half is transparent, by its grey of 16 bits
    image = read(raw_png(8, 8, 16, scanlines, chunk(b"tRNS", b"\x80\0")), 8)
    assert image[:, :, :4].min() == 255 and image[:, :, 4:].max() == 0
    garbage = encode(PILImage.new("RGB", (8, 8), "white"), "JPEG", exif=b"Exif\0\0" + bytes(range(200)))
    assert read(garbage).min() == 255
    exif = PILImage.Exif()
    exif[0x0112] = 99  # no such orientation
    assert read(encode(PILImage.new("RGB", (8, 8), "white"), "JPEG", exif=exif)).min() == 255


def test_files_that_are_no_files(tmp_path):
    """Pipes would block, devices never end, and a sparse file of a terabyte is none to be read into memory."""
    for name in ("cats", "dogs"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "0.png").write_bytes(encode(PILImage.new("RGB", (8, 8))))
    cats = tmp_path / "data" / "cats"
    os.mkfifo(cats / "1.png")
    (cats / "2.png").symlink_to("/dev/zero")
    (cats / "3.png").symlink_to("3.png")
    (cats / "4.png").symlink_to("none.png")
    dataset = load_image_dataset(train_data_dir=tmp_path / "data")
    assert len(dataset) == 2
    assert "skipped 2 pipes, sockets and devices: " in dataset.info.description
    assert "skipped 2 broken links: " in dataset.info.description
    os.truncate(cats / "0.png", 2**40)
    reader = ImageReader(dataset, resolution=8)
    with pytest.raises(OSError, match="0.png has 1,099,511,627,776 bytes; at most 1,073,741,824 are read"):
        reader.read(reader.dataset[0], 0)
    for path in ("/dev/zero", "file:///dev/zero"):
        with pytest.raises(OSError, match="image 5 .*is a pipe, socket or device"):
            reader.read({"image": {"path": path, "bytes": None}}, 5)
    for name in ("README.md", "state.json"):
        os.mkfifo(tmp_path / "data" / name)
        with pytest.raises(ValueError, match=f"{name} is a pipe, socket or device"):
            load_image_dataset(train_data_dir=tmp_path / "data")
        (tmp_path / "data" / name).unlink()


def test_folders_that_are_nested_or_linked_without_end(tmp_path):
    path = tmp_path / "deep"
    path.mkdir()
    for _ in range(150):
        path = path / "d"
        path.mkdir()
    with pytest.raises(ValueError, match="folders more than 100 levels deep"):
        load_image_dataset(train_data_dir=tmp_path / "deep")
    for level in range(40):  # two links in each: 2 ** 40 ways to the last
        (tmp_path / f"{level}").mkdir()
        for name in "ab":
            (tmp_path / f"{level}" / name).symlink_to(tmp_path / f"{level + 1}")
    (tmp_path / "40").mkdir()
    with pytest.raises(ValueError, match="reached in more than 1000 ways"):
        load_image_dataset(train_data_dir=tmp_path / "0")


@pytest.mark.parametrize("name", [b"cats/\xff.png", b"\xff/0.png"])
def test_a_name_that_is_no_unicode(tmp_path, name):
    path = os.path.join(os.fsencode(tmp_path), name)
    os.makedirs(os.path.dirname(path))
    with open(path, "wb") as file:
        file.write(encode(PILImage.new("RGB", (8, 8))))
    with pytest.raises(ValueError, match=r"\\xff.* is not UTF-8; rename it"):
        load_image_dataset(train_data_dir=tmp_path)


def test_a_column_of_ids_is_no_column_of_labels(monkeypatch):
    """A table of embeddings for each image's own id has gigabytes."""
    for ids in ([10**9 + index for index in range(1500)], [f"{index}.png" for index in range(10_500)]):
        with pytest.raises(ValueError, match=f"Column 'id' has {len(ids):,} .*class_encode_column\\('id'\\)"):
            label_names(Dataset.from_dict({"id": ids}), "id")
    assert len(label_names(Dataset.from_dict({"id": list(range(1500)) * 2}), "id")) == 1500
    assert len(label_names(Dataset.from_dict({"id": list(range(1000))}), "id")) == 1000
    with pytest.raises(ValueError, match="Column 'id' holds 'None' in row 1"):
        label_names(Dataset.from_dict({"id": [0, None]}), "id")
    monkeypatch.setattr("dit_hf.data.images.MAX_CLASSES", 9)
    many = Features({"id": ClassLabel(num_classes=10)})
    with pytest.raises(ValueError, match="10 classes; at most 9"):
        label_names(Dataset.from_dict({"id": [0]}, features=many), "id")
    with pytest.raises(ValueError, match="has 10 different values in 10 rows"):  # without reading on
        label_names(Dataset.from_dict({"id": list(range(40)) * 2}).to_iterable_dataset(), "id")


def write_tar(path, count=6):
    """A WebDataset shard; returns where its members start."""
    with tarfile.open(path, "w") as tar:
        for index in range(count):
            for suffix, content in (("png", encode(PILImage.new("L", (8, 8)))), ("cls", b"%d" % (index % 2))):
                entry = tarfile.TarInfo(f"{index:03d}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    with tarfile.open(path) as tar:
        return [member.offset for member in tar.getmembers()]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_tar_that_is_cut_or_damaged(tmp_path, streaming):
    """Its reader takes what it has read by then for all."""
    shard = tmp_path / "part.tar"
    starts = write_tar(shard)
    content = shard.read_bytes()
    assert len(list(load_image_dataset(train_data_dir=tmp_path, streaming=streaming).select_columns("cls"))) == 6
    flipped = content[: starts[8]] + b"zz" + content[starts[8] + 2 :]
    damages = {
        content[: starts[8]]: "ends after 8 members, without a tar's end",
        content[: starts[8] + 514]: "ends in its member 9",
        flipped: f"the header at byte {starts[8]} has a wrong checksum",
        b"": "ends after 0 members",
    }
    for damaged, message in damages.items():
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"part.tar is cut or damaged.*{message}"):
            load_image_dataset(train_data_dir=tmp_path, streaming=streaming)


def test_formats_of_tar_are_read_and_huge_members_are_not(tmp_path):
    """Long names and Unicode ones have headers of their own."""
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=kind) as tar:
            tar.addfile(tarfile.TarInfo("ü.png" if kind == tarfile.USTAR_FORMAT else "ü" * 150 + ".png"))
        check_archive(tmp_path / "a.tar")
    entry = tarfile.TarInfo("a.png")
    entry.size = MAX_IMAGE_BYTES + 1
    (tmp_path / "a.tar").write_bytes(entry.tobuf() + bytes(1024))
    with pytest.raises(ValueError, match="a.tar has a file of 1,073,741,825 bytes"):
        check_archive(tmp_path / "a.tar")
    sparse = tarfile.TarInfo("a.png")
    sparse.pax_headers = {"GNU.sparse.realsize": str(2**40)}
    (tmp_path / "a.tar").write_bytes(sparse.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
    with pytest.raises(ValueError, match="a.tar has sparse files"):
        check_archive(tmp_path / "a.tar")


def test_tables_that_are_cut(tmp_path):
    table = Dataset.from_dict({"label": [0, 1] * 3000})
    table.save_to_disk(tmp_path / "saved")
    (shard,) = (tmp_path / "saved").glob("*.arrow")
    content = shard.read_bytes()
    ends = [at for at in range(8, len(content), 8) if content[at : at + 4] == b"\xff" * 4]  # of the schema and batches
    shard.write_bytes(content[: ends[3]])
    with pytest.raises(ValueError, match=f"{shard.name} is cut or damaged"):
        load_image_dataset(train_data_dir=tmp_path / "saved")
    shard.write_bytes(content)
    assert len(load_image_dataset(train_data_dir=tmp_path / "saved")) == 6000
    (tmp_path / "saved" / "state.json").write_text("[]")
    with pytest.raises(ValueError, match="state.json must hold an object"):
        load_image_dataset(train_data_dir=tmp_path / "saved")
    (tmp_path / "parquet").mkdir()
    table.to_parquet(tmp_path / "parquet" / "a.parquet")
    os.truncate(tmp_path / "parquet" / "a.parquet", 500)
    with pytest.raises(ValueError, match="a.parquet can't be read as Parquet"):
        load_image_dataset(train_data_dir=tmp_path / "parquet")


def test_a_zip_that_unpacks_to_far_more_than_it_is(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("0.png", encode(PILImage.new("L", (8, 8))))
    check_archive(tmp_path / "a.zip")
    content = bytearray((tmp_path / "a.zip").read_bytes())
    entry = content.index(b"PK\1\2")
    content[entry + 24 : entry + 28] = struct.pack("<I", 2**31)  # what its index claims
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(ValueError, match="a.zip has .* bytes and would unpack to 2,147,483,648"):
        load_image_dataset(train_data_dir=tmp_path)


def test_a_holdout_that_holds_out_nothing_is_said(tmp_path, caplog):
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(encode(PILImage.new("RGB", (8, 8))))
    load_image_dataset(train_data_dir=tmp_path, holdout=1e-12)
    assert "--holdout 1e-12 leaves no image of 2 outside of the split 'train'" in caplog.text
    for holdout in (float("nan"), float("inf"), -0.1, 1.0):
        with pytest.raises(ValueError, match=f"--holdout {holdout} must be at least 0 and less than 1"):
            load_image_dataset(train_data_dir=tmp_path, holdout=holdout)


@pytest.fixture
def latents(workspace, tmp_path, monkeypatch, capfd):
    """The command's exit code, and the last line that it wrote to stderr; a folder `images` is its data."""
    monkeypatch.chdir(tmp_path)
    for index in range(4):
        folder = tmp_path / "images" / ("cats" if index % 2 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        PILImage.new("RGB", (32, 32), (60 * index, 9, 9)).save(folder / f"{index}.png")

    def call(*flags, output="out"):
        data = ("--train_data_dir", "images", "--vae", str(workspace / "vae"), "--resolution", "32")
        monkeypatch.setattr(sys, "argv", ["dit-hf latents", *data, "--output_dir", output, *map(str, flags)])
        try:
            run(main)
            code = 0
        except SystemExit as end:
            code = end.code
        return code, capfd.readouterr().err.strip().splitlines()[-1:]

    return call


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--resolution", "0"), "'0' is not a whole number at least 8 and at most 8192"),
        (("--resolution", "100000"), "'100000' is not a whole number"),
        (("--resolution", "33"), "--resolution 33 is not divisible by 4"),
        (("--shard_size", "0"), "'0' is not a whole number at least 1"),
        (("--shard_size", str(10**30)), "is not a whole number at least 1 and at most 1048576"),
        (("--holdout", "nan"), "'nan' is not a finite number at least 0 and below 1"),
        (("--holdout", "-1"), "'-1' is not a finite number at least 0"),
        (("--image_column", "label"), "Column 'label' holds int64, not images"),
        (("--label_column", "image"), "Column 'image' holds images"),
        (("--train_data_dir", "a\0b"), "There is no folder 'a"),
        (("--output_dir", "a\0b"), "its name holds a null byte"),
        (("--output_dir", "images/out"), "--output_dir images/out is in the folder images that is read"),
        (("--output_dir", "file"), "--output_dir file is neither a folder"),
        (("--output_dir", "file/out"), "file is a file"),
        (("--output_dir", "dangling"), "--output_dir dangling is neither a folder nor a link to one"),
        (("--output_dir", "pipe"), "pipe is a pipe, socket or device"),
        (("--output_dir", "mine"), "mine/vae was not written by this command"),
    ],
)
def test_bad_flags_and_folders_are_one_line(latents, tmp_path, flags, message):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine" / "vae").mkdir(parents=True)
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.rglob("*"))
    code, (line,) = latents(*flags)
    assert (code, line[:7]) == (2, "error: ") and message in line
    assert sorted(tmp_path.rglob("*")) == before


def test_output_into_an_empty_folder_a_link_and_here(latents, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    for _ in range(2):  # new, and verified again
        assert latents(output="link")[0] == 0
    assert (tmp_path / "there" / "vae" / "config.json").exists() and (tmp_path / "link").is_symlink()
    assert not list((tmp_path / "there").rglob(".dit_hf-partial*"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert latents("--train_data_dir", "../images", output=".")[0] == 0
    assert (tmp_path / "here" / "index.json").exists()


def test_a_full_disk_is_one_line(latents, tmp_path):
    """A limit on files ends a write as a full disk does."""
    assert latents("--shard_size", "1", output="out")[0] == 0
    for name in ("shard-00003.safetensors", "vae/config.json"):
        (tmp_path / "out" / name).unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        code, (line,) = latents("--shard_size", "1", output="out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert "shard-00003.safetensors can't be written" in line and "The shards before it are whole and kept" in line
    assert not list((tmp_path / "out").glob(".partial*"))
    assert latents("--shard_size", "1", output="out")[0] == 0


@pytest.fixture
def example(monkeypatch, capfd):
    """The exit code of an example's script and the last line that it wrote to stderr."""

    def call(script, **flags):
        folder, name = script.split("/")
        monkeypatch.syspath_prepend(ROOT / "examples" / folder)
        words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
        try:
            run(importlib.import_module(name).main)
            code = 0
        except SystemExit as end:
            code = end.code
        return code, capfd.readouterr().err.strip().splitlines()[-1:]

    return call


def test_a_new_class_into_an_empty_folder(example, tmp_path):
    """A mount point can't be replaced; a killed run's files go."""
    (tmp_path / "data").mkdir()
    for index in range(2):
        PILImage.new("RGB", (64, 64), (90 * index, 0, 0)).save(tmp_path / "data" / f"{index}.png")
    output = tmp_path / "out"
    (output / "lost+found").mkdir(parents=True)
    (output / f".dit_hf-partial-{platform.node()}-4194303-1-out" / "coins").mkdir(parents=True)
    flags = {"train_data_dir": tmp_path / "data", "class_name": "coins", "output_dir": output}
    parts = (tiny_transformer(num_classes=2, learn_sigma=False), make_scheduler("flow_euler"), tiny_vae())
    DiTClassCondPipeline(*parts, {0: "sloth", 1: "lion"}).save_pretrained(tmp_path / "model")
    DiTClassCondPipeline(*parts).save_pretrained(tmp_path / "nameless")
    flags |= {"pretrained_model_name_or_path": tmp_path / "model", "prior_images_per_class": 3}
    flags |= {"num_inference_steps": 1}
    script = "finetune/prepare_new_class"
    for change, message in (
        ({"num_images": 0}, "'0' is not a whole number at least 1"),
        ({"guidance_scale": "nan"}, "'nan' is not a finite number"),
        ({"class_name": "a/b"}, "The class 'a/b' can't be a folder's name"),
        ({"class_name": "a\nb"}, "can't be a folder's name"),
        ({"class_name": " "}, "The class ' ' can't be a folder's name"),
        ({"class_name": "x" * 300}, "can't be a folder's name"),
        ({"pretrained_model_name_or_path": tmp_path / "nameless"}, "nameless names no classes"),
        ({"class_name": "sloth"}, "The model has a class 'sloth' already"),
        ({"output_dir": tmp_path / "data" / "out"}, "is in the folder"),
        ({"output_dir": ROOT / "README.md"}, "README.md is a file, not a folder"),
    ):
        code, (line,) = example(script, **flags | change)
        assert (code, line[:7]) == (2, "error: ") and message in line
    assert example(script, **flags)[0] == 0
    assert sorted(path.name for path in output.iterdir() if path.name in ("coins", "sloth")) == ["coins", "sloth"]
    assert not [path.name for path in output.iterdir() if path.name.startswith(".")]
    assert len(load_image_dataset(train_data_dir=output)) == 12  # six of them coins
    code, (line,) = example(script, **flags)
    assert code == 2 and "exists and is not empty" in line


@pytest.mark.parametrize(
    ("icons", "message"),
    [
        ("{", "icons.json can't be read as JSON"),
        ("[]", "icons.json must hold an object"),
        ('{"icons": {"a": 5}}', "icons.json: 'icons' is missing, or of another kind"),
        ('{"icons": {"a": {}}}', "icons.json can't be read as icons (key 'a'): KeyError"),
        ('{"icons": {"a": {"body": "<g"}}}', "icons.json can't be read as icons (key 'a')"),
        ('{"icons": {"a": {"body": "<g/>", "width": 1, "height": 1e9}}}', "An icon of 1 × 1000000000.0 can't be"),
        ('{"icons": {"a": {"body": "<g/>", "width": Infinity}}}', "An icon of inf × inf can't be"),
        ('{"icons": {"a": {"body": "<g/>"}}}', "There is no icon in noto; nothing is written"),
    ],
)
def test_damaged_icons_are_named(example, tmp_path, icons, message):
    (tmp_path / "noto").mkdir()
    (tmp_path / "noto" / "icons.json").write_text(icons)
    flags = {"icons_dir": tmp_path, "icon_sets": "noto", "one_class": "x", "output_dir": tmp_path / "out"}
    code, (line,) = example("train_autoencoder/prepare_emoji", **flags)
    assert (code, line[:7]) == (2, "error: ") and message in line
    assert not (tmp_path / "out").exists()


def test_many_small_classes_are_no_ids():
    names = [f"class {number}" for number in range(1600)]
    assert len(label_names(Dataset.from_dict({"label": names}))) == 1600


@pytest.mark.parametrize("where", ["stat", "open"])
def test_a_disk_that_fails_drops_no_image(tmp_path, monkeypatch, where):
    def fail(path, *args, **options):
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    (tmp_path / "a.png").write_bytes(b"content")
    with monkeypatch.context() as patch:
        patch.setattr(*((os, "stat") if where == "stat" else (Path, "read_bytes")), fail)
        with pytest.raises(ValueError, match="Stale file handle.*Re-run"):
            image_bytes({"path": str(tmp_path / "a.png"), "bytes": None}, "image 0")
    with pytest.raises(OSError, match="There is no file"):
        image_bytes({"path": str(tmp_path / "b.png"), "bytes": None}, "image 0")


def test_an_archive_that_is_not_read_is_not_checked(tmp_path):
    rows = {"image": [{"bytes": b"", "path": None}], "label": [0]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    (tmp_path / "backup.zip").write_bytes(b"damaged")
    assert len(load_image_dataset(train_data_dir=tmp_path)) == 1
