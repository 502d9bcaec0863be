"""Every snippet of the README runs, and its table says what is measured."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from testing_utils.hub_server import HubServer


README = (ROOT / "README.md").read_text()
REPOSITORY = re.compile(r"https://(?:github\.com/dit-hf/dit_hf/blob|raw\.githubusercontent\.com/dit-hf/dit_hf)/main/")
# Types that a reader's checker must know, by the README's names.
REVEALED = {
    "pipe.transformer": "DiTTransformer2DModel",
    "pipe.scheduler": "SchedulerMixin",
    'pipe("sloth")': "ImagePipelineOutput",
    'pipe("sloth", output_type="latent").images': "Tensor",
    'pipe("sloth", return_dict=False)': "tuple",
    'DiTTransformer2DModel.from_preset("DiT-S/8")': "DiTTransformer2DModel",
    "model(torch.zeros(1), 3, torch.zeros(1))": "Transformer2DModelOutput",
    "model.forward(torch.zeros(1), 3, torch.zeros(1), return_dict=False)": "tuple",
    'make_scheduler("ddim")': "SchedulerMixin",
}
SNIPPETS = {language: re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) for language in ("python", "bash")}
SHELL_LINES = [line.split("  #")[0].strip() for block in SNIPPETS["bash"] for line in block.splitlines() if line]


@pytest.fixture
def checkout(tmp_path):
    """A folder that looks like the checkout, so that what a snippet writes stays out of it."""
    for name in ("examples", "conversion", "tests", "Makefile"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def run_shell(line, folder, **variables):
    environment = os.environ | variables | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(line, shell=True, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Variables of a Hub on loopback, for what publishes and what loads it again."""
    with HubServer() as server:
        yield server.environment(tmp_path_factory.mktemp("hub_home"))


@pytest.mark.parametrize("snippet", SNIPPETS["python"], ids=range(len(SNIPPETS["python"])))
def test_python_snippets_run(snippet, checkout, hub):
    command = [sys.executable, "-c", snippet]
    result = subprocess.run(command, cwd=checkout, env=os.environ | hub, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_python_snippets_pass_a_strict_type_checker(tmp_path):
    imports = "import torch\nfrom dit_hf import DiTClassCondPipeline, DiTTransformer2DModel, make_scheduler\n"
    setup = 'pipe = DiTClassCondPipeline.from_bundled()\nmodel = DiTTransformer2DModel.from_preset("DiT-S/8")\n'
    wrong = 'DiTTransformer2DModel.from_preset("DiT-Z/8")\nmake_scheduler("dimm")\n'
    snippets = {f"snippet_{number}": snippet for number, snippet in enumerate(SNIPPETS["python"])}
    snippets["revealed"] = imports + setup + "".join(f"reveal_type({expression})\n" for expression in REVEALED)
    snippets["wrong"] = imports + wrong
    for name, snippet in snippets.items():
        (tmp_path / f"{name}.py").write_text(snippet)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--allow-untyped-calls",
        "--no-error-summary",
        *(f"{name}.py" for name in snippets),
    ]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    lines = re.findall(r"^(\w+)\.py:\d+: (\w+): (.*)", output, re.MULTILINE)
    errors = {name: message for name, kind, message in lines if kind == "error"}
    assert list(errors) == ["wrong"] and output.count("wrong.py") == 2, output
    types = [message for name, kind, message in lines if name == "revealed"]
    assert len(types) == len(REVEALED)
    for revealed, expected in zip(types, REVEALED.values(), strict=True):
        assert re.search(rf'"(\w+\.)*{expected}\b', revealed), revealed


def test_shell_snippets_are_known():
    assert sorted({line.split()[0] for line in SHELL_LINES}) == ["dit-hf", "make", "pip"]
    assert len(README.splitlines()) < 150


def test_make_demo_generates_the_grid(checkout):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    recipe = subprocess.run(
        ["make", "-n", "demo"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    command = recipe.strip().splitlines()[-1].replace(".venv/bin/python", sys.executable)
    result = run_shell(command, checkout)
    assert result.returncode == 0, result.stderr
    assert re.search(r"60 images in [\d.]+ s: outputs/demo.png", result.stdout)
    assert (checkout / "outputs" / "demo.png").stat().st_size > 50_000


def test_the_console_command_runs(checkout):
    lines = [line for line in SHELL_LINES if line.startswith("dit-hf")]
    assert [line.split()[1] for line in lines] == ["convert", "verify", "export", "generate"]
    for line in lines:
        result = run_shell(line, checkout)
        assert result.returncode == 0 and result.stdout, result.stderr
    for name, size in (("sit-tiny/model_index.json", 100), ("sit-tiny.pt", 100_000), ("two.png", 3_000)):
        assert (checkout / "outputs" / name).stat().st_size > size


def test_files_and_links_exist():
    """Links are absolute, as the package index shows the README too."""
    targets = re.findall(r"\]\(([^)]+)\)", README)
    own = [REPOSITORY.sub("", target) for target in targets if REPOSITORY.match(target)]
    assert len(own) > 15 and all(target.startswith(("http", "#")) for target in targets)
    for target in own:
        assert (ROOT / target.partition("#")[0]).exists(), target
    tree = re.search(r"## Repository layout\n\n```\n(.*?)```", README, re.DOTALL).group(1)
    for line in tree.splitlines():
        name = line.split()[0].rstrip("/")
        assert (ROOT / ("src/dit_hf" if line.startswith("  ") else "") / name).exists(), name


def number_in_row(words, column=2):
    """The first number of a cell of the README's table."""
    (row,) = [line for line in README.splitlines() if line.startswith("|") and words in line]
    return float(re.search(r"[\d.]+", row.split("|")[column]).group())


def test_table_says_what_is_measured():
    path = ROOT / "benchmarks" / "compare_with_stock.py"
    spec = importlib.util.spec_from_file_location("compare_with_stock", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    measured = benchmark.measure()
    embedding = measured["relative error of the timestep embedding"]
    assert ", ".join(f"{embedding[step]['stock']:.2f}" for step in (100, 500, 999)) in README
    assert max(embedding[step]["ours"] for step in embedding) < 1.1e-5  # the table says 1e-6, 4e-6, 8e-6
    for millions in measured["DiT-XL/2 parameters (M)"].values():
        assert f"{millions} M" in README
    dropout = measured["label dropout"]
    assert dropout["stock"]["draws"] == 29
    mixed = number_in_row("samples whose label is dropped in some blocks") / 100
    assert dropout["stock"]["mixed"] == pytest.approx(mixed, abs=0.02)
    assert dropout["stock"]["unconditional"] == 0
    assert dropout["ours"]["draws"] == 1
    assert dropout["ours"]["mixed"] == 0
    assert dropout["ours"]["unconditional"] == pytest.approx(0.1, abs=0.02)
    # The rest of the table is in benchmarks/README.md.
    for row, outcomes in {
        "null class of 10 classes": ("IndexError", "runs"),
        "8×16 latents": ("RuntimeError", [1, 8, 8, 16]),
        "4×16 latents": ([1, 8, 8, 8], [1, 8, 4, 16]),
        "learned variance": ("TypeError", "runs"),
        "get_label_ids of one name": ("ValueError", [1]),
    }.items():
        assert (measured[row]["stock"], measured[row]["ours"]) == outcomes, row
    start = measured["Euler: std of the model's first input, 1 is right"]
    assert start["stock"] == pytest.approx(number_in_row("Euler sampler"), abs=0.002)
    assert start["ours"] == pytest.approx(number_in_row("Euler sampler", column=3), abs=0.05)
