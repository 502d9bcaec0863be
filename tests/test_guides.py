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
FLAGS = {flag for script in (ROOT / "examples").rglob("*.py") for flag in re.findall(r'"(--\w+)"', script.read_text())}


def test_snippets_run(tmp_path):
    """All in one process, one after the other, for the time that imports take."""
    assert len(SNIPPETS) >= 5
    promised = [re.findall(r"^print.*# (.*)$", snippet, re.MULTILINE) for _, snippet in SNIPPETS]
    code = "\n".join(snippet for _, snippet in SNIPPETS)
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
