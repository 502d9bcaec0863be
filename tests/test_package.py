"""The package as a whole: quick and quiet import, one direction of imports, metadata."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

import dit_hf


SOURCE = ROOT / "src" / "dit_hf"
# A module may import what stands above it or before it in its line, never what stands below.
LAYERS = (
    ("_version", "files", "command_line", "seeds", "dtypes", "bundled"),
    ("transformer_dit", "transformer_jit", "transformer_ddt", "presets", "complexity"),
    ("scheduling_flow_match_sde", "scheduling_flow_match_truncated_euler"),
    ("pipeline_dit_class_cond", "schedulers", "mixing", "modulation_table", "model_folders"),
    ("hub", "data", "checkpoints"),
    ("models", "pipeline", "optimization", "conversion"),
    ("evaluation",),
    ("training",),
    ("space",),
    ("commands",),
    ("console",),
)
ORDER = [name for layer in LAYERS for name in layer]
SELF_CONTAINED = (
    *("transformer_dit.py", "transformer_jit.py", "transformer_ddt.py"),
    *("scheduling_flow_match_sde.py", "scheduling_flow_match_truncated_euler.py"),
    "pipeline_dit_class_cond.py",
)

TIMED_IMPORT = """
import sys, time, socket, os
import torch, diffusers
def refuse(*args, **kwargs):
    raise AssertionError("import dit_hf touched the network")
socket.socket.connect = refuse
before = time.perf_counter()
import dit_hf
print(time.perf_counter() - before)
assert os.listdir(os.curdir) == [], os.listdir(os.curdir)
from dit_hf import DiTClassCondPipeline
"""


NEEDS = {
    "dit_hf.training.lora": ("peft", "train"),
    "dit_hf.space.page": ("gradio", "demo"),
}
WITHOUT = """
import importlib, sys
sys.modules |= dict.fromkeys(("datasets", "gradio", "peft"))
for module in sys.argv[1:]:
    try:
        importlib.import_module(module)
    except ImportError as error:
        print(error)
from dit_hf import DiTClassCondPipeline
from dit_hf.data.images import load_image_dataset
import dit_hf.training.trainer  # works on cached latents without it
try:
    load_image_dataset("images", "train")
except ImportError as error:
    print(error)
try:
    DiTClassCondPipeline.from_bundled().load_lora_weights({})
except ImportError as error:
    print(error)
try:
    DiTClassCondPipeline.from_bundled().fuse_lora()
except ImportError as error:
    print(error)
"""


def test_a_missing_extra_is_named():
    command = [sys.executable, "-c", WITHOUT, *NEEDS]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert output.pop() == output[-1]
    lora = output.pop()
    assert output.pop() == "dit_hf.data needs datasets: pip install 'dit_hf[train]'."
    assert lora == "LoRA needs peft: pip install 'dit_hf[train]', or peft and transformers."
    for line, (missing, extra) in zip(output, NEEDS.values(), strict=True):
        assert line.endswith(f"needs {missing}: pip install 'dit_hf[{extra}]'.")


def test_import_is_quick_and_leaves_nothing(tmp_path):
    """And quiet: libraries that warn of each other when diffusers' models are imported are not heard."""
    command = [sys.executable, "-c", TIMED_IMPORT]
    result = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert float(result.stdout) < 0.2
    assert result.stderr == ""


def module_imports(path):
    """Modules that a file imports anywhere, by their absolute names: `dit_hf.data.images` for `..data.images`."""
    package = ("dit_hf", *path.relative_to(SOURCE).parts[:-1])
    waiting = list(ast.parse(path.read_text()).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            name = ".".join(part for part in (base, node.module) if part)
            yield from ([f"{name}.{alias.name}" for alias in node.names] if node.module is None else [name])
        else:
            assert "import_module" not in ast.dump(node).split("body=")[0], f"{path.name} imports by a string"
            waiting += ast.iter_child_nodes(node)


@pytest.mark.parametrize("name", SELF_CONTAINED)
def test_files_that_travel_import_torch_and_diffusers_only(name):
    allowed = {"torch", "diffusers"} | sys.stdlib_module_names
    assert {module.split(".")[0] for module in module_imports(SOURCE / name)} <= allowed


def test_imports_run_one_way():
    for path in SOURCE.rglob("*.py"):
        package = path.relative_to(SOURCE).with_suffix("").parts[0]
        if package == "__init__":  # imports lazily, by name
            continue
        for module in module_imports(path):
            top, _, rest = module.partition(".")
            target = rest.split(".")[0]
            if top == "dit_hf" and target != package:
                if package == "commands" and target in dit_hf.__all__:
                    continue
                assert target and target not in dit_hf.__all__, f"{path.name} imports the whole package"
                assert ORDER.index(target) < ORDER.index(package), f"{path.name} imports {module}"


def test_every_module_has_a_place_in_the_order():
    found = {path.relative_to(SOURCE).with_suffix("").parts[0] for path in SOURCE.rglob("*.py")}
    assert found - {"__init__"} == set(ORDER)


def test_nothing_pulls_in_torchvision():
    from importlib.metadata import distributions

    assert not [name for d in distributions() if (name := d.metadata["Name"]) in ("torchvision", "timm")]


def test_public_names():
    assert set(dit_hf.__all__) <= set(dir(dit_hf))
    assert all(getattr(dit_hf, name) is not None for name in dit_hf.__all__)
    with pytest.raises(AttributeError, match="'no_such_name'"):
        getattr(dit_hf, "no_such_name")  # noqa: B009
    assert (
        f"## [{'Unreleased' if 'dev' in dit_hf.__version__ else dit_hf.__version__}]"
        in (ROOT / "CHANGELOG.md").read_text()
    )
