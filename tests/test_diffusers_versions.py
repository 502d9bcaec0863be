"""A saved folder gives the same image with every diffusers from the oldest on, and without private names."""

import ast
import builtins
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_design, tiny_inputs
from safetensors.torch import load_file, save_file

from dit_hf import (
    DiTClassCondPipeline,
    make_scheduler,
    pipeline_dit_class_cond,
    transformer_ddt,
    transformer_dit,
    transformer_jit,
)


# The oldest that works and later minors; the newest is the pinned one.
VERSIONS = ("0.38.0", "0.39.0", "0.40.0", "0.41.0")
TOO_OLD = "0.37.1"
CARRIED = (transformer_dit, transformer_jit, transformer_ddt, pipeline_dit_class_cond)
CALL = {"class_labels": "sloth", "output_type": "pt"}
SAMPLE = """
import sys, torch
from diffusers import AutoModel, DiffusionPipeline
folder, output = sys.argv[1:]
AutoModel.from_pretrained(folder, subfolder="transformer", trust_remote_code=True)
remote = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
assert type(remote).__module__.startswith("diffusers_modules."), type(remote)
from dit_hf import DiTClassCondPipeline
pipes = [remote, DiTClassCondPipeline.from_pretrained(folder)]
images = [pipe("sloth", generator=torch.Generator().manual_seed(0), output_type="pt").images for pipe in pipes]
from dit_hf import make_scheduler
for pipe in pipes:
    pipe.scheduler = make_scheduler("flow_euler")
call = {"num_inference_steps": 3, "output_type": "pt"}
images += [pipe("sloth", generator=torch.Generator().manual_seed(0), **call).images for pipe in pipes]
torch.save(images, output)
"""
FORWARD = """
import sys
from diffusers import AutoModel
from safetensors.torch import load_file, save_file
folder, inputs, output = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
save_file({"sample": model(**load_file(inputs)).sample.detach()}, output)
assert not [name for name in sys.modules if name.split(".")[0] == "dit_hf"]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "emoji64"
    DiTClassCondPipeline.from_bundled().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(folder):
    """Of the jumps, and of the guided velocity."""
    pipe = DiTClassCondPipeline.from_pretrained(folder)
    image = pipe(generator=torch.Generator().manual_seed(0), **CALL).images
    pipe.scheduler = make_scheduler("flow_euler")
    return image, pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=3, **CALL).images


def with_diffusers(version):
    """An environment in which another diffusers stands before the pinned one; it is installed once."""
    target = Path(sys.prefix, "diffusers", version)
    if not target.exists():
        partial = target.with_name(f"partial-{version}-{os.getpid()}")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", partial]
        subprocess.run([*command, f"diffusers=={version}"], check=True, capture_output=True)
        partial.rename(target)
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join([str(target), str(ROOT / "src")])}


def run_with(version, *arguments, script=SAMPLE):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, env=with_diffusers(version), capture_output=True, text=True, cwd="/")


@pytest.mark.parametrize("version", VERSIONS)
def test_the_same_images_with_every_version(version, folder, images, tmp_path):
    """By the code in the folder, and by the package."""
    result = run_with(version, folder, tmp_path / "images.pt")
    assert result.returncode == 0, result.stderr[-2000:]
    found = torch.load(tmp_path / "images.pt")
    assert [torch.equal(*pair) for pair in zip(found, (images[0],) * 2 + (images[1],) * 2, strict=True)] == [True] * 4


@pytest.mark.parametrize("name", ["jit", "dit_dh"])
def test_another_architecture_loads_without_the_package(name, tmp_path):
    model, paths = tiny_design(name), [tmp_path / name for name in ("model", "inputs", "output")]
    model.save_pretrained(paths[0])
    save_file(tiny_inputs(), paths[1])
    result = run_with(VERSIONS[0], *paths, script=FORWARD)
    assert result.returncode == 0, result.stderr[-2000:]
    expected = model(**tiny_inputs()).sample.detach()
    torch.testing.assert_close(load_file(paths[2])["sample"], expected, rtol=0, atol=1e-5)


def test_an_older_version_is_refused_in_one_line(folder, tmp_path):
    result = run_with(TOO_OLD, folder, tmp_path / "images.pt")
    assert result.stderr.splitlines()[-1] == (
        f"ImportError: DiTTransformer2DModel needs diffusers >= {VERSIONS[0]}; this is {TOO_OLD}. Run `pip install "
        "--upgrade diffusers`."
    )


def test_the_stated_bound_is_the_oldest_version():
    bound = VERSIONS[0].removesuffix(".0")
    assert f"    diffusers>={bound}\n" in (ROOT / "setup.cfg").read_text()
    assert {module.MIN_DIFFUSERS for module in CARRIED} == {VERSIONS[0]}


def optional_imports(module):
    """Names that a file imports from diffusers in a `try`."""
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, ast.Try):
            for statement in node.body:
                if isinstance(statement, ast.ImportFrom):
                    yield from ((statement.module, alias.name) for alias in statement.names)


def private_imports(module):
    """Names that a file imports from a module, or under a name, that is private to diffusers."""
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("diffusers"):
            names = [alias.name for alias in node.names]
            yield from ((node.module, name) for name in names if name.startswith("_") or "._" in node.module)


OPTIONAL = [(module, *name) for module in CARRIED for name in optional_imports(module)]


def test_private_names_are_optional():
    for module in CARRIED:
        assert set(private_imports(module)) <= set(optional_imports(module))
    assert len(OPTIONAL) >= 9


@pytest.mark.parametrize(("module", "source", "name"), OPTIONAL, ids=[name for *_, name in OPTIONAL])
def test_sampling_works_without_an_optional_name(module, source, name, monkeypatch):
    """The carried file is run as a module of its own in which the name can't be imported."""
    original = builtins.__import__

    def without_name(imported, globals=None, locals=None, fromlist=(), level=0):
        if imported == source and name in (fromlist or ()) and (globals or {}).get("__name__") == "carried":
            raise ImportError(f"cannot import name {name!r} from {source!r}")
        return original(imported, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", without_name)
    sample_with_the_carried_file(module)


@pytest.mark.parametrize(
    "name", ["hooks._helpers.TransformerBlockMetadata", "models._modeling_parallel.ContextParallelInput"]
)
def test_sampling_works_with_private_classes_of_another_signature(name, monkeypatch):
    monkeypatch.setattr(f"diffusers.{name}", type("Changed", (), {}))
    sample_with_the_carried_file(transformer_dit)


def sample_with_the_carried_file(module):
    spec = importlib.util.spec_from_file_location("carried", module.__file__)
    carried = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(carried)
    if module in (transformer_jit, transformer_ddt):
        model = tiny_design("jit" if module is transformer_jit else "dit_dh")
        transformer = getattr(carried, type(model).__name__)(**model.config).eval()
        transformer.load_state_dict(model.state_dict())
        assert torch.equal(transformer(**tiny_inputs()).sample, model(**tiny_inputs()).sample)
        return
    pipe = DiTClassCondPipeline.from_bundled()
    pipe.scheduler = make_scheduler("flow_euler")
    call = CALL | {"num_inference_steps": 3}
    # Not the fixture's: weights of a file that is mapped are aligned otherwise in memory, and round otherwise.
    expected = pipe(generator=torch.Generator().manual_seed(0), **call).images
    if module is transformer_dit:
        transformer = carried.DiTTransformer2DModel(**pipe.transformer.config).eval()
        transformer.load_state_dict(pipe.transformer.state_dict())
        pipe.transformer = transformer
    else:
        pipe = carried.DiTClassCondPipeline.from_pipe(pipe)
    assert torch.equal(pipe(generator=torch.Generator().manual_seed(0), **call).images, expected)
