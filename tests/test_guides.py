"""The guides' snippets run and print what they say; their links and flags exist."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT
from testing_utils.scripts import run_forked


GUIDES = sorted((ROOT / "docs").glob("*.md"))
SNIPPETS = [
    (guide.name, snippet)
    for guide in GUIDES
    for snippet in re.findall(r"```python\n(.*?)```", guide.read_text(), re.DOTALL)
]
FLAG = r'"(--\w+)"'
COMMAND_FOLDER = ROOT / "src" / "dit_hf" / "commands"
FOLDERS = (ROOT / "examples", ROOT / "conversion", ROOT / "benchmarks", COMMAND_FOLDER)
SCRIPTS = [script for folder in FOLDERS for script in folder.rglob("*.py")]
FLAGS = {"--help", *(flag for script in SCRIPTS for flag in re.findall(FLAG, script.read_text()))}
COMMANDS = [
    (guide.name, line)
    for guide in GUIDES
    for block in re.findall(r"```bash\n(.*?)```", guide.read_text(), re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if re.search(r"(examples|conversion)/\S+\.py", line)
]


def test_snippets_run(tmp_path):
    """
    All in one process, for the time that imports take, but without the names of those before; nothing is compiled,
    which takes minutes: tests/test_speed.py does so with small networks.
    """
    assert len(SNIPPETS) >= 5
    promised = [re.findall(r"^print.*# (.*)$", snippet, re.MULTILINE) for _, snippet in SNIPPETS]
    code = f"for snippet in {[snippet for _, snippet in SNIPPETS]!r}: exec(snippet, {{'__name__': '__main__'}})"
    environment = os.environ | {"TORCH_COMPILE_DISABLE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [line for lines in promised for line in lines]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_links_and_flags_exist(guide):
    text = guide.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (guide.parent / target).exists(), target
    if guide.name != "log.md":  # which tells of flags that are gone
        for flag in re.findall(r"`(--\w+)", text):
            assert flag in FLAGS, flag
    for path in re.findall(r"`((?:examples|conversion|tests|docs)/[\w./]+)`", text):
        assert (ROOT / path).exists() or guide.name == "log.md", path


UNWRAPPED = ("src/dit_hf/bundled/emoji64/README.md",)  # huggingface_hub writes the card
MARKDOWN = [
    path
    for folder in ("", "benchmarks", "conversion", "docs/**", "examples/*", "pipelines/*", "tests/fixtures")
    for path in sorted(ROOT.glob(f"{folder}/*.md" if folder else "*.md"))
    if path.relative_to(ROOT).as_posix() not in UNWRAPPED
]


def test_lines_of_prose_have_at_most_120_characters():
    """Tables, code and YAML are not prose; the address of a link does not count."""
    assert len(MARKDOWN) > 25
    for path in MARKDOWN:
        text = re.sub(r"\A---\n.*?\n---\n", "", path.read_text(), flags=re.DOTALL)
        text = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)
        for line in re.sub(r"\]\([^)]*\)", "]()", text).splitlines():
            assert len(line) <= 120 or line.startswith("|"), (path.relative_to(ROOT), line)


# What these commands want is not here, or is in the README of an example, whose tests run them.
ELSEWHERE = (
    "DiT-XL-2-256x256",
    "dit-xl-2-256",
    "accelerate launch",
    "--push_to_hub",
    "outputs/other",
    "coins",
    "space",
)
SHORT = {
    "train_dit.py": "--max_train_steps 2 --validation_images 9 --validation_inference_steps 2 "
    "--validation_images_per_class 1",
    "sample.py": "--num_samples 18 --num_inference_steps 2",
    "compute_metrics.py": "--bootstrap 2",
}


def test_commands_run_one_after_the_other(tmp_path):
    """From the images that the guide on training generates to metrics and a tuned model, with few steps."""
    for name in ("examples", "conversion", "src", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    (images,) = [snippet for guide, snippet in SNIPPETS if guide == "training.md" and '"pictures"' in snippet]
    (encoder,) = [snippet for _, snippet in SNIPPETS if "outputs/tiny-encoder" in snippet]
    images = images.replace("num_images_per_label=40", "num_images_per_label=16")
    (tmp_path / "prepare.py").write_text(images + encoder)
    run_forked([sys.executable, "prepare.py"], tmp_path, check=True)
    for guide in ("converting.md", "training.md", "evaluating.md", "finetuning.md"):
        lines = [line for page, line in COMMANDS if page == guide and not any(words in line for words in ELSEWHERE)]
        assert len(lines) >= 2
        for line in lines:
            flags = " ".join(words for script, words in SHORT.items() if script in line)
            run_forked(shlex.split(f"{line} {flags}"), tmp_path, check=True)
    written = {path.name for path in (tmp_path / "outputs").iterdir()}
    assert {
        "tiny-dit",
        "back.pt",
        "tiny-rae",
        "rae_stat.pt",
        "mine",
        "watched",
        "metrics.json",
        "reference.npz",
        "tuned",
        "lora",
    } <= written


def sources(script):
    """A script, the modules beside it, the command it runs, and the commands that this one takes flags from."""
    if "dit_hf.space.command" in script.read_text():
        return [ROOT / "src" / "dit_hf" / "space" / "command.py"]
    commands = re.findall(r"dit_hf\.commands\.(\w+)", script.read_text())
    for command in commands:
        commands += re.findall(r"^from \.(\w+) import", (COMMAND_FOLDER / f"{command}.py").read_text(), re.MULTILINE)
    return [*script.parent.glob("*.py"), *(COMMAND_FOLDER / f"{command}.py" for command in commands)]


def test_commands_name_scripts_and_flags_that_exist():
    """Flags are those of the script, or of the modules that it takes them from."""
    assert len(COMMANDS) >= 10
    for guide, line in COMMANDS:
        name, arguments = re.search(r"((?:examples|conversion)/\S+\.py)(.*)", line).groups()
        assert (ROOT / name).exists(), (guide, name)
        known = {flag for path in sources(ROOT / name) for flag in re.findall(FLAG, path.read_text())} | {"--help"}
        assert set(re.findall(r"--\w+", arguments)) <= known, (guide, line)
