"""The guides' snippets run and print what they say; their links and flags exist."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT


GUIDES = sorted((ROOT / "docs").glob("*.md"))
SNIPPETS = [
    (guide.name, snippet)
    for guide in GUIDES
    for snippet in re.findall(r"```python\n(.*?)```", guide.read_text(), re.DOTALL)
]
FLAG = r'"(--\w+)"'
SCRIPTS = [script for folder in ("examples", "conversion", "benchmarks") for script in (ROOT / folder).rglob("*.py")]
FLAGS = {flag for script in SCRIPTS for flag in re.findall(FLAG, script.read_text())}
COMMANDS = [
    (guide.name, line)
    for guide in GUIDES
    for block in re.findall(r"```bash\n(.*?)```", guide.read_text(), re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if re.search(r"(examples|conversion)/\S+\.py", line)
]


def test_snippets_run(tmp_path):
    """All in one process, for the time that imports take, but without the names of those before."""
    assert len(SNIPPETS) >= 5
    promised = [re.findall(r"^print.*# (.*)$", snippet, re.MULTILINE) for _, snippet in SNIPPETS]
    code = f"for snippet in {[snippet for _, snippet in SNIPPETS]!r}: exec(snippet, {{'__name__': '__main__'}})"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
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


def test_commands_name_scripts_and_flags_that_exist():
    """Flags are those of the script or of a module beside it, which it takes them from."""
    assert len(COMMANDS) >= 10
    for guide, line in COMMANDS:
        name, arguments = re.search(r"((?:examples|conversion)/\S+\.py)(.*)", line).groups()
        assert (ROOT / name).exists(), (guide, name)
        texts = [path.read_text() for path in (ROOT / name).parent.glob("*.py")]
        known = {flag for text in texts for flag in re.findall(FLAG, text)} | {"--help"}
        assert set(re.findall(r"--\w+", arguments)) <= known, (guide, line)
