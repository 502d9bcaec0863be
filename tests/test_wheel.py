"""The wheel: it carries the bundled model, the README's example runs from it; bounds admit the pinned set."""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distribution, files, metadata, requires
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet


PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with nothing but what the wheel holds, which is made from the source distribution."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / "source" / name)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, folder / "source"]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("dit_hf-*.whl")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", folder / "site", wheel]
    subprocess.run(install, check=True, capture_output=True)
    return folder / "site"


def required(name):
    """What is installed with a distribution without extras."""
    found = set()
    for requirement in map(Requirement, requires(name) or []):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found |= {requirement.name} | required(requirement.name)
    return found


def test_the_readme_example_runs_from_the_wheel(installed, tmp_path):
    """With what the wheel requires, and nothing else."""
    (tmp_path / "required").mkdir()
    parts = {distribution(name).locate_file(file.parts[0]) for name in required("dit_hf") for file in files(name)}
    for part in map(Path, parts):
        if part.name != "..":
            (tmp_path / "required" / part.name).symlink_to(part)
    assert not (tmp_path / "required" / "transformers").exists()
    snippet = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    where = "\nimport dit_hf\nprint(dit_hf.__file__, dit_hf.__version__)\n"
    environment = os.environ | {"PYTHONPATH": f"{installed}:{tmp_path / 'required'}"}
    command = [sys.executable, "-S", "-c", snippet + where]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    command = [sys.executable, "-S", "-m", "dit_hf.console", "generate", "--class_labels", "sloth"]
    generated = subprocess.run(
        [*command, "--num_inference_steps", "2", "--output", "grid.png"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (tmp_path / "grid.png").is_file(), generated.stderr
    file, version = result.stdout.split()
    assert file.startswith(str(installed)) and re.fullmatch(r"\d+\.\d+\.\d+\S*", version)
    assert (tmp_path / "apple.png").stat().st_size > 500


def test_the_wheel_holds_types_weights_and_no_tests(installed):
    names = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    assert {"dit_hf/py.typed", "dit_hf/space/page.py", "dit_hf/commands/train.py"} <= names
    assert "dit_hf/bundled/emoji64/transformer/diffusion_pytorch_model.safetensors" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"dit_hf", "bin"}
    assert "bin/dit-hf" in names


def test_the_oldest_python_runs_what_is_required():
    (oldest,) = SpecifierSet(metadata("dit_hf")["Requires-Python"])
    for name in required("dit_hf"):
        assert SpecifierSet(metadata(name)["Requires-Python"] or "").contains(oldest.version), name


@pytest.mark.parametrize("requirement", map(Requirement, requires("dit_hf")), ids=str)
def test_bounds_admit_the_pinned_versions(requirement):
    if requirement.name == "dit_hf":
        return
    pins = {name.lower().replace("_", "-"): version for name, version in PINS.items()}
    assert requirement.specifier.contains(pins[requirement.name.lower().replace("_", "-")], prereleases=True)
