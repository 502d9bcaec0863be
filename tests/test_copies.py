"""What self-contained model files share is copied, as in diffusers; here the copies are held to their originals."""

import ast
import re
from functools import cache

import pytest
from conftest import ROOT


SOURCE = ROOT / "src"
COPIED = re.compile(r"^ *# Copied from (?P<origin>dit_hf[\w.]+)(?: with (?P<old>\w+)->(?P<new>\w+))?$")


@cache
def definitions(path):
    """Source of each function and class of a file, without its indentation, by dotted name and by first line."""
    source = path.read_text(encoding="utf-8")
    by_name, by_line = {}, {}

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                name = f"{prefix}{child.name}"
                first = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
                lines = source.splitlines()[first - 1 : child.end_lineno]
                indent = len(lines[0]) - len(lines[0].lstrip())
                by_name[name] = by_line[first] = "\n".join(line[indent:] for line in lines)
                visit(child, f"{name}.")
            else:
                visit(child, prefix)

    visit(ast.parse(source), "")
    return by_name, by_line


def find_copies():
    for path in sorted(SOURCE.rglob("*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if "# Copied from" in line:
                yield pytest.param(path, number, line, id=f"{path.name}:{number}")


@pytest.mark.parametrize(("path", "number", "line"), find_copies())
def test_a_copy_is_its_original(path, number, line):
    mark = COPIED.match(line)
    assert mark, f"{line.strip()!r} is not of the form `# Copied from dit_hf.module.name` or `... with Old->New`"
    # The original is `module.name` or `module.Class.method`.
    parts = mark["origin"].split(".")
    split = next(i for i in range(len(parts), 0, -1) if SOURCE.joinpath(*parts[:i]).with_suffix(".py").is_file())
    original = definitions(SOURCE.joinpath(*parts[:split]).with_suffix(".py"))[0][".".join(parts[split:])]
    if mark["old"]:
        original = original.replace(mark["old"], mark["new"])
    assert definitions(path)[1][number + 1] == original
