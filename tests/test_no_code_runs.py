"""No pickle with code is opened, whatever file it hides in and whatever library asks for it."""

import argparse
import ast
import io
import json
import os
import pickle
import shutil
import tarfile

import pytest
import torch
from conftest import ROOT, tiny_transformer
from diffusers import AutoencoderKL

from dit_hf import DiTClassCondPipeline, DiTTransformer2DModel
from dit_hf.checkpoints import FAMILIES
from dit_hf.checkpoints.autoencoders import parse_autoencoder
from dit_hf.checkpoints.latents_stats import read_latents_stats
from dit_hf.checkpoints.reading import read_checkpoint
from dit_hf.checkpoints.saving import save_original
from dit_hf.schedulers import make_scheduler


SOURCES = sorted(
    path for folder in ("src", "conversion", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)
# Modules whose readers execute what they read, or which run programs.
FORBIDDEN = {"pickle", "_pickle", "cloudpickle", "joblib", "dill", "marshal", "shelve", "pty"}
# A reader of these names, by its dotted ending, and the keyword that makes it safe.
SAFE_ARGUMENT = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
# Readers that never execute anything, or that are our own.
SAFE_READERS = {
    "json.load",
    "json.loads",
    "load_file",
    "ModelCard.load",
    "Features.load",
    "yaml.safe_load",
    "tomllib.load",
}
READERS = {
    "load",
    "loads",
    "load_file",
    "load_state",
    "unsafe_load",
    "full_load",
    "load_all",
    "jit",
    "read_pickle",
    "Unpickler",
}
# Methods of these names that read no other file: of a dataset, a reader, an opened image, and of a class.
OWN = {"self.load", "load", "reader.load", "image.load"}
# Where they are safe: after the checks of checkpoints, and by an unpickler of a few classes without code.
REVIEWED = {
    "checkpointing.py": {"accelerator.load_state(str(folder))"},
    "saved_state.py": {"import pickle", "_IndexUnpickler(file).load()"},
}


def dotted(node):
    """`a.b.c` of a node; of a method of a result, `….c`."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "…"


def find_unsafe(source):
    """Calls of a source that could execute what a file holds, or let it choose its reader: (line, call)."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = {alias.name for alias in node.names} if isinstance(node, ast.Import | ast.ImportFrom) else set()
        modules = {node.module or ""} if isinstance(node, ast.ImportFrom) else names
        if names != {"UnpicklingError"}:  # an exception, no reader
            found += [(node.lineno, f"import {name}") for name in modules if name.split(".")[0] in FORBIDDEN]
        if not isinstance(node, ast.Call):
            continue
        name, keywords = dotted(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        last = name.rpartition(".")[2]
        if name in SAFE_ARGUMENT:
            argument, needed = SAFE_ARGUMENT[name]
            safe = argument in keywords and getattr(keywords[argument], "value", None) is needed
        elif name.endswith("Image.open"):
            safe = "formats" in keywords
        elif last in READERS:
            safe = name in SAFE_READERS | OWN
        else:
            safe = name not in ("eval", "exec", "os.system", "os.popen", "__import__") and not (
                "shell" in keywords and getattr(keywords["shell"], "value", None) is not False
            )
        if not safe:
            found.append((node.lineno, ast.unparse(node)))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_readers_execute_nothing(path):
    found = find_unsafe(path.read_text(encoding="utf-8"))
    assert {call for _, call in found} <= REVIEWED.get(path.name, set()), found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "yaml.unsafe_load(text)",
        "torch.jit.load(path)",
        "pd.read_pickle(path)",
        "Image.open(path)",
        "PIL.Image.open(path, mode='r')",
        "accelerator.load_state(folder)",
        "eval(text)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_an_unsafe_reader_is_found(source):
    assert find_unsafe(source)


class Attack:
    """Unpickled, it creates a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


class Settings(argparse.Namespace):
    """A subclass of what is allowed, whose state is set by code of its own."""

    def __setstate__(self, state):
        open(state["marker"], "w").close()


def write_tar(attack, file):
    with tarfile.open(file, "w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            content = pickle.dumps(attack, 2)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def settings_of(attack):
    settings = Settings()
    settings.marker = str(attack.marker)
    return settings


# So that a file is not refused for its size alone.
LARGE = torch.zeros(50_000)
FORMATS = {
    "pickle": lambda attack, file: file.write_bytes(pickle.dumps({"ema": attack})),
    "bare": lambda attack, file: file.write_bytes(pickle.dumps(attack, 2)),
    "zip": lambda attack, file: torch.save({"ema": attack, "large": LARGE}, file),
    "before 1.6": lambda attack, file: torch.save(
        {"ema": attack, "large": LARGE}, file, _use_new_zipfile_serialization=False
    ),
    "tar": write_tar,
    "in a namespace": lambda attack, file: torch.save({"args": argparse.Namespace(model=attack)}, file),
    "subclass": lambda attack, file: torch.save({"args": settings_of(attack)}, file),
    "key": lambda attack, file: torch.save({"ema": {(attack,): torch.ones(1)}}, file),
}


@pytest.fixture
def attack(tmp_path):
    """An object whose unpickling would leave a file, which must not be there at the end."""
    (tmp_path / "outside").mkdir()
    yield Attack(tmp_path / "outside" / "executed")
    assert os.listdir(tmp_path / "outside") == []


@pytest.mark.parametrize("kind", FORMATS)
def test_checkpoints_execute_nothing(kind, attack, tmp_path):
    FORMATS[kind](attack, tmp_path / "attack.pt")
    for read in (read_checkpoint, DiTTransformer2DModel.from_single_file, parse_autoencoder, read_latents_stats):
        with pytest.raises(ValueError, match="attack.pt") as raised:
            read(tmp_path / "attack.pt")
        assert "weights_only" not in str(raised.value)  # torch's advice how to execute it


@pytest.mark.parametrize("kind", ["pickle", "zip", "before 1.6"])
def test_the_attack_works(kind, tmp_path):
    """Where a pickle is executed, it leaves its file."""
    FORMATS[kind](Attack(tmp_path / "executed"), tmp_path / "attack.pt")
    with open(tmp_path / "attack.pt", "rb") as file:
        pickle.load(file) if kind == "pickle" else torch.load(file, weights_only=False)
    assert (tmp_path / "executed").exists()


def test_torchscript_is_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    with pytest.raises(ValueError, match="script.pt: it is a TorchScript archive, which holds code"):
        read_checkpoint(tmp_path / "script.pt")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A pipeline's folder, and a stock model's."""
    folder = tmp_path_factory.mktemp("saved")
    model = tiny_transformer()
    DiTClassCondPipeline(model, make_scheduler("ddpm")).save_pretrained(folder / "pipe")
    save_original(model, FAMILIES["diffusers"], folder / "stock")
    AutoencoderKL(block_out_channels=(32,)).save_config(folder / "vae")
    return folder


def load_pipeline(folder):
    return DiTClassCondPipeline.from_pretrained(folder / "pipe")


def load_pipeline_of_pickles(folder):
    return DiTClassCondPipeline.from_pretrained(folder / "pipe", use_safetensors=False)


def load_stock(folder):
    return DiTTransformer2DModel.from_pretrained(folder / "stock")


def load_adapters(folder):
    DiTClassCondPipeline(tiny_transformer(), make_scheduler("ddpm")).load_lora_weights(
        folder / "lora", weight_name="pytorch_lora_weights.bin"
    )


def load_vae(folder):
    return AutoencoderKL.from_pretrained(folder / "vae", use_safetensors=False)


@pytest.mark.parametrize("kind", ["zip", "before 1.6"])
@pytest.mark.parametrize(
    ("load", "file"),
    [
        (load_pipeline, "pipe/transformer/diffusion_pytorch_model.bin"),
        (load_pipeline_of_pickles, "pipe/transformer/diffusion_pytorch_model.bin"),
        (load_stock, "stock/diffusion_pytorch_model.bin"),
        (load_adapters, "lora/pytorch_lora_weights.bin"),
        (load_vae, "vae/diffusion_pytorch_model.bin"),
    ],
)
def test_folders_execute_nothing(load, file, kind, attack, saved, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    file = folder / file
    file.parent.mkdir(exist_ok=True)
    file.with_suffix(".safetensors").unlink(missing_ok=True)
    FORMATS[kind](attack, file)
    with pytest.raises((ValueError, OSError, RuntimeError)):
        load(folder)


@pytest.mark.parametrize("component", ["scheduler", "vae", "transformer"])
def test_no_module_is_imported_by_a_name_of_a_folder(component, saved, attack, tmp_path, monkeypatch):
    shutil.copytree(saved / "pipe", tmp_path / "pipe")
    (tmp_path / "stranger.py").write_text(f"open({str(attack.marker)!r}, 'w')\nclass Stranger: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(index | {component: ["stranger", "Stranger"]}))
    with pytest.raises(ValueError, match="has no such (scheduler|autoencoder)|its transformer is a Stranger"):
        DiTClassCondPipeline.from_pretrained(tmp_path / "pipe")


@pytest.mark.parametrize("value", [{"a": 1}, [], ["diffusers"], "x", [1, 2]])
def test_a_component_that_is_none_is_named(value, saved, tmp_path):
    shutil.copytree(saved / "pipe", tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(index | {"scheduler": value}))
    with pytest.raises(ValueError, match="model_index.json has scheduler: .*; it must be a library and a class"):
        DiTClassCondPipeline.from_pretrained(tmp_path / "pipe")
