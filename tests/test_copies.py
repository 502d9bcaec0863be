"""Code that carried files share is written once and copied, as diffusers copies: a copy equals its original."""

import ast
import importlib
import inspect
import re
import textwrap

import pytest
from conftest import ROOT


# `# Copied from dit_hf.module.Name with Old->New, Other->Another`, directly above a function or a class.
MARK = re.compile(r"^\s*# Copied from (dit_hf\.\w+)\.([\w.]+)(?: with (.+))?$")


def definitions(source, scope=""):
    """The functions and classes of a file, nested ones too, by their dotted names."""
    waiting = [(scope, node) for node in ast.parse(source).body]
    while waiting:
        scope, node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            scope = f"{scope}.{node.name}".lstrip(".")
            yield scope, node
        waiting += [(scope, child) for child in ast.iter_child_nodes(node)]


def text_of(source, node):
    """With its decorators, not indented."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return textwrap.dedent("\n".join(source.splitlines()[first - 1 : node.end_lineno])), first


def copies():
    """Every copy: its place, its text, and the text of what it was copied from after the replacements."""
    for path in sorted((ROOT / "src" / "dit_hf").rglob("*.py")):
        source = path.read_text()
        marks = {number: match for number, line in enumerate(source.splitlines(), 1) if (match := MARK.match(line))}
        for name, node in definitions(source):
            text, first = text_of(source, node)
            if match := marks.pop(first - 1, None):
                yield pytest.param(text, *match.groups(), id=f"{path.stem}.{name}")
        assert not marks, f"{path.name}:{min(marks)}: nothing that could be a copy follows"


@pytest.mark.parametrize(("text", "module", "name", "replacements"), copies())
def test_copies_equal_their_originals(text, module, name, replacements):
    source = inspect.getsource(importlib.import_module(module))
    expected, _ = text_of(source, dict(definitions(source))[name])
    for replacement in filter(None, (replacements or "").split(", ")):
        expected = expected.replace(*replacement.split("->"))
    assert text == expected
