"""Damaged, oversized and strange checkpoints are refused by name, before their size costs anything."""

import json
import os
import platform
import zipfile

import pytest
import torch
from conftest import FIXTURES, tiny_transformer
from safetensors.torch import save_file

from dit_hf import DiTTransformer2DModel
from dit_hf.checkpoints import FAMILIES
from dit_hf.checkpoints.parity import measure_parity
from dit_hf.checkpoints.parsing import parse_checkpoint
from dit_hf.checkpoints.reading import read_checkpoint
from dit_hf.checkpoints.saving import save_original
from dit_hf.commands import convert, export


def original_weights(name="dit_p2"):
    return torch.load(FIXTURES / f"{name}.pt", weights_only=True)


def pack_again(target, change, compression=zipfile.ZIP_STORED):
    """The fixture in a new zip archive, whose checksums are right, with records changed."""
    with zipfile.ZipFile(FIXTURES / "dit_p2.pt") as source, zipfile.ZipFile(target, "w", compression) as archive:
        for record in source.infolist():
            archive.writestr(record.filename, change(record.filename, source.read(record)))


def cut(number, count):
    return lambda name, content: content[:-count] if name.endswith(f"/data/{number}") else content


def flip(file, position):
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def test_a_cut_record_is_not_filled_with_its_neighbours(tmp_path):
    for number, count in ((0, 4), (3, 64), (5, 1)):
        pack_again(tmp_path / "cut.pt", cut(number, count))
        with pytest.raises(ValueError, match=r"cut\.pt: its tensors need .* bytes in .* the file is damaged"):
            read_checkpoint(tmp_path / "cut.pt")
    pack_again(tmp_path / "whole.pt", lambda name, content: content)
    assert read_checkpoint(tmp_path / "whole.pt").keys() == original_weights().keys()


def test_a_compressed_archive_is_not_read_as_numbers(tmp_path):
    pack_again(tmp_path / "small.pt", lambda name, content: content, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"small\.pt: its '.*' is compressed"):
        read_checkpoint(tmp_path / "small.pt")


def test_a_flipped_bit_is_seen(tmp_path):
    file = tmp_path / "flipped.pt"
    torch.save(original_weights(), file)
    with zipfile.ZipFile(file) as archive:
        offsets = [record.header_offset for record in archive.infolist() if "/data/" in record.filename]
    flip(file, (offsets[3] + offsets[4]) // 2)
    with pytest.raises(ValueError, match=r"flipped\.pt: Bad CRC-32 .*get the file again"):
        read_checkpoint(file)


def test_a_file_without_checksums_is_read(tmp_path):
    if not hasattr(torch.serialization, "set_crc32_options"):
        pytest.skip("this torch always writes checksums")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(original_weights(), tmp_path / "plain.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_checkpoint(tmp_path / "plain.pt").keys() == original_weights().keys()


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_named(value, ending, tmp_path):
    weights = original_weights()
    weights["blocks.1.mlp.fc1.weight"][7] = value
    file = tmp_path / f"bad.{ending}"
    (save_file if ending == "safetensors" else torch.save)(weights, file)
    with pytest.raises(ValueError, match=r"48 of 9,216 values of 'blocks.1.mlp.fc1.weight' are NaN or infinite"):
        parse_checkpoint(file, 4)


def test_a_value_without_room_in_the_type_is_named(tmp_path):
    weights = original_weights()
    weights["blocks.1.mlp.fc1.weight"][7] = 1e6
    torch.save(weights, tmp_path / "large.pt")
    with pytest.raises(ValueError, match=r"values up to 1e\+06, which torch.float16 has no room for"):
        DiTTransformer2DModel.from_single_file(tmp_path / "large.pt", 4, dtype="float16")


STRANGE = {
    "holds torch.int64": lambda: torch.ones(3, dtype=torch.int64),
    "holds torch.bool": lambda: torch.ones(3, dtype=torch.bool),
    "holds torch.complex64": lambda: torch.ones(3, dtype=torch.complex64),
    "holds torch.float8_e4m3fn": lambda: torch.ones(3).to(torch.float8_e4m3fn),
    "is a view that repeats its storage": lambda: torch.ones(1).expand(10**6, 10**6),
    "sparse": lambda: torch.ones(3).to_sparse(),
    "meta tensor": lambda: torch.ones(3, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("message", STRANGE)
def test_only_plain_tensors_are_weights(message, tmp_path):
    torch.save(original_weights() | {"pos_embed": STRANGE[message]()}, tmp_path / "strange.pt")
    with pytest.raises(ValueError, match=rf"strange\.pt: 'pos_embed' .*{message}"):
        parse_checkpoint(tmp_path / "strange.pt", 4)


@pytest.mark.parametrize("index", ["100000000", "9" * 5000, "60"])
def test_a_block_beyond_the_keys_is_refused(index, tmp_path):
    torch.save(original_weights() | {f"blocks.{index}.attn.qkv.bias": torch.ones(3)}, tmp_path / "deep.pt")
    with pytest.raises(ValueError, match=r"deep\.pt: 'blocks\.[0-9]+.*block that 33 keys can't have"):
        parse_checkpoint(tmp_path / "deep.pt", 4)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop"])
def test_what_is_no_file_is_not_opened(kind, tmp_path):
    file = tmp_path / "odd.pt"
    {
        "pipe": lambda: os.mkfifo(file),
        "device": lambda: file.symlink_to("/dev/zero"),
        "folder": file.mkdir,
        "loop": lambda: file.symlink_to(file),
    }[kind]()
    with pytest.raises(ValueError, match=r"odd\.pt"):
        read_checkpoint(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 10**9}, "config.json: `num_layers` is 1000000000; .* from 1 to 1024"),
        ({"num_layers": 20}, "'transformer_blocks.10.* is missing, as are"),
        ({"num_layers": 2.5}, "`num_layers` is 2.5; it must be a whole number"),
        ({"num_layers": True}, "`num_layers` is True; it must be a whole number"),
        ({"num_layers": 3}, "'transformer_blocks.2.* is missing"),
        ({"num_layers": 1}, "'transformer_blocks.1.* is not a weight of the model"),
        ({"num_attention_heads": 10**9}, "num_attention_heads"),
        ({"num_classes": 10**7}, "'class_embed.weight' has shape .*; the config needs"),
        ({"sample_size": 10**9}, "sample_size"),
        ({"sample_size": 2**15}, "`sample_size` is 32768; it must be a whole number from 1 to 16384"),
        ({"sample_size": "32"}, "`sample_size` is '32'"),
        ({"patch_size": 0}, "`patch_size` is 0"),
        ({"mlp_ratio": float("nan")}, "`mlp_ratio` is nan"),
        ({"mlp_ratio": 1e300}, "mlp_ratio"),
        ({"mlp_ratio": 10**400}, "mlp_ratio"),
        ([1], "config.json must hold an object; it holds a list"),
    ],
)
def test_configurations_are_bounded_by_their_weights(change, message, tmp_path):
    tiny_transformer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change if isinstance(change, dict) else change))
    with pytest.raises(ValueError, match=message):
        DiTTransformer2DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/passwd", "absent.safetensors", 3, ""])
def test_an_index_names_files_of_its_folder(name, tmp_path):
    tiny_transformer().save_pretrained(tmp_path, max_shard_size="50KB")
    (index,) = tmp_path.glob("*.index.json")
    content = json.loads(index.read_text())
    content["weight_map"][min(content["weight_map"])] = name
    index.write_text(json.dumps(content))
    with pytest.raises((ValueError, OSError), match=r"index\.json has the file .*|absent\.safetensors"):
        DiTTransformer2DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_verified_means_every_weight(dtype):
    checkpoint = parse_checkpoint(FIXTURES / "sit_p2.pt", 4, "sit")
    model = DiTTransformer2DModel.from_single_file(FIXTURES / "sit_p2.pt", 4, "sit", dtype=dtype)
    assert measure_parity(checkpoint, model).holds
    row = model.class_embed.weight.data[5]  # of a class whose output is not compared
    before = row.clone()
    row[3] += 1e-3  # less than rounding of the largest weight in half precision
    assert not measure_parity(checkpoint, model).holds
    row.copy_(before)
    row[3] = float("nan")
    assert not measure_parity(checkpoint, model).holds


def run(module, monkeypatch, **flags):
    arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", ["dit-hf", *arguments])
    module.main()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"--id2label: There is no file .*names\.json"),
        ("{", r"names\.json can't be read as JSON"),
        ("3", r"names\.json must hold an object or a list; it holds a int"),
        ('{"x": "a"}', r"names\.json: 'x' is not a class id"),
        ('{"-1": "a"}', r"names\.json: '-1' is not a class id"),
        ("[1]", r"names\.json: the name of class 0 is 1; write it in quotes"),
        ('{"1": "a", "01": "b"}', r"names\.json names class 1 twice"),
        ('["a"]', "names 1 classes; the model has 10, 0 to 9"),
        ("[]", "names 0 classes; the model has 10, 0 to 9"),
    ],
)
def test_class_names_are_checked_before_work(content, message, tmp_path, monkeypatch):
    names = tmp_path / "names.json"
    if content is not None:
        names.write_text(content)
    flags = {"checkpoint_path": FIXTURES / "dit_p2.pt", "num_attention_heads": 4, "id2label": names}
    with pytest.raises(ValueError, match=message):
        run(convert, monkeypatch, **flags, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_conversion_goes_into_a_folder_that_cant_be_replaced(tmp_path, monkeypatch):
    """`.`, a link to an empty folder, and one with what a killed run has left."""
    flags = {"checkpoint_path": FIXTURES / "dit_p2.pt", "num_attention_heads": 4}
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / f".dit_hf-partial-{platform.node()}-4194303-1-here" / "vae").mkdir(parents=True)
    inode = (tmp_path / "here").stat().st_ino
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "link").symlink_to(tmp_path / "here")
    for place in (".", tmp_path / "link"):
        run(convert, monkeypatch, **flags, output_dir=place)
        assert (tmp_path / "here").stat().st_ino == inode  # as a mount point needs it
        names = {path.name for path in (tmp_path / "here").iterdir()}
        assert names == {"README.md", "model_index.json", "pipeline_dit_class_cond.py", "scheduler", "transformer"}
        assert "# here" in (tmp_path / "here" / "README.md").read_text()
        with pytest.raises(ValueError, match="is not empty"):
            run(convert, monkeypatch, **flags, output_dir=place)
        for path in (tmp_path / "here").iterdir():
            path.rename(tmp_path / f"{len(list(tmp_path.iterdir()))}")


def test_a_failed_verification_is_no_failed_write(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError("Input/output error")

    flags = {"checkpoint_path": FIXTURES / "dit_p2.pt", "num_attention_heads": 4}
    monkeypatch.setattr(convert, "verify", fails)
    with pytest.raises(ValueError, match="out can't be verified: Input/output error"):
        run(convert, monkeypatch, **flags, output_dir=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_needs_no_place_to_write(monkeypatch, capsys):
    flags = ["--output_dir", "/proc/out", "--num_attention_heads", "4", "--checkpoint_path", FIXTURES / "dit_p2.pt"]
    monkeypatch.setattr("sys.argv", ["dit-hf", "--dry_run", *map(str, flags)])
    convert.main()
    assert "2 blocks" in capsys.readouterr().out


def test_an_export_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    flags = {"pretrained_model_name_or_path": tmp_path / "absent", "family": "dit"}
    (tmp_path / "there.pt").write_text("mine")
    (tmp_path / "dangling.pt").symlink_to(tmp_path / "nowhere")
    for name, message in (
        ("there.pt", "exists; choose"),
        ("dangling.pt", "exists; choose"),
        ("there.pt/under.pt", "there.pt is a file"),
        ("out.bin", "must end in .pt or .safetensors"),
        ("/proc/out.pt", "can't be written"),
    ):
        with pytest.raises(ValueError, match=message):
            run(export, monkeypatch, **flags, checkpoint_path=tmp_path / name)
    assert (tmp_path / "there.pt").read_text() == "mine"


def test_training_only_weights_are_checked(tmp_path):
    model = tiny_transformer(timestep_scale=0.001, learn_sigma=False)
    file = tmp_path / "projectors.safetensors"
    for weights, message in (
        ({"projectors.0.weight": torch.ones(3, dtype=torch.int64)}, "holds torch.int64"),
        ({"blocks.0.attn.qkv.bias": torch.ones(144)}, "is unknown"),
    ):
        save_file(weights, file)
        with pytest.raises(ValueError, match=rf"projectors\.safetensors: .*{message}"):
            save_original(model, FAMILIES["repa"], tmp_path / "out.pt", file)
    file.write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match=r"projectors\.safetensors can't be read as a file of weights"):
        save_original(model, FAMILIES["repa"], tmp_path / "out.pt", file)
    assert os.listdir(tmp_path) == ["projectors.safetensors"]
