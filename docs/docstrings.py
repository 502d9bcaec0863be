"""An extension of griffe: docstrings in Hugging Face's style, as Markdown for the reference's pages.

`docstring_style: google` would find the same sections, but takes the types' backticks and asterisks literally.
"""

import re
import textwrap

import griffe


SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Example):")
ENTRY = re.compile(r" {4}(\S.*?)(?: (\(.*?\)))?:(?: (.*))?$")


def to_markdown(text: str) -> str:
    """Sections become bold headings, their entries lists, examples code; what stands before them stays."""
    before, *rest = re.split(rf"^{SECTION.pattern}\n", text, flags=re.MULTILINE)
    parts = [before.strip()]
    for name, body in zip(rest[::2], rest[1::2], strict=True):
        body = body.strip("\n")
        if name == "Example":
            body = f"```pycon\n{textwrap.dedent(body).strip()}\n```"
        elif name == "Returns":
            body = textwrap.dedent(body)
        else:
            body = "\n".join(_entry(line) for line in body.splitlines())
        parts.append(f"**{name}**\n\n{body}")
    return "\n\n".join(part for part in parts if part)


def _entry(line):
    """The first line of an entry as a list's; those that follow are indented deeper already."""
    match = ENTRY.match(line)
    if match is None:
        return line
    name, kind, words = match.groups()
    return f"- `{name}`{f' {kind}' if kind else ''}: {words or ''}".rstrip()


def _inherit(subclass, base):
    """What has no docstring gets the base's; `forward = __call__`, for type checkers, makes way for the base's."""
    if subclass.docstring is None:
        subclass.docstring = base.docstring
    if "forward" in base.members:
        subclass.members.pop("forward", None)
    for name in subclass.members.keys() & base.members.keys():
        if subclass.members[name].docstring is None:
            subclass.members[name].docstring = base.members[name].docstring


class Docstrings(griffe.Extension):
    """Rewrites every docstring as it is found, and gives subclasses that only declare types those of their bases."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)

    def on_package(self, *, pkg, **kwargs):
        for module in ("models", "pipeline"):
            for subclass in pkg[module].classes.values():
                for base in reversed(subclass.resolved_bases):  # the carried class is the last
                    _inherit(subclass, base)
