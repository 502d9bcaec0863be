"""Which icons of different sets show the same glyph, and the names of a glyph.

A glyph is a character of Unicode, or a sequence of them. Some sets have a table of characters, which says what their
icons show; an icon of another set is recognised by its name or an alias of it.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from dit_hf.files import read_json


# Sets with a table of characters, the most trusted first: its name for a glyph comes first.
NAMING_SETS = ("noto", "fluent-emoji-flat", "twemoji")
FLAG = re.compile(r"^(?:flag-for-flag-|flag-for-|flag-)(?!in-)(.+)$|^(.+)flag$")
LOWER_CASE_WORDS = {"and", "of", "the", "da"}
# What names without punctuation lose.
SPELLING = {
    "oclock": "o'clock",
    "mans": "man's",
    "mens": "men's",
    "womans": "woman's",
    "womens": "women's",
    "Divoire": "d'Ivoire",
    "Sar": "SAR",
    "St": "St.",
    "Us": "US",
}
# The selector of emoji presentation, which some tables of characters write and others don't.
PRESENTATION = re.compile(r"-fe0f(?=-|$)")


def read_entries(file: Path, key: str | None, kind: type, default: dict | None = None) -> dict:
    """The entries of a package's JSON file, or of a key of it, by name: dictionaries, lists of names, or texts."""
    entries = read_json(file) if key is None else read_json(file).get(key, default)
    values = list(entries.values()) if isinstance(entries, dict) else [None]
    names = [name for value in values if isinstance(value, list) for name in value]
    if not all(isinstance(value, kind) for value in values) or not all(isinstance(name, str) for name in names):
        what = "its content" if key is None else f"{key!r}"
        raise ValueError(f"{file}: {what} is missing, or of another kind.")
    return entries


def name_key(name: str) -> str:
    """What the names of one glyph have in common across sets: `woman-cook` and `womancook` agree."""
    flag = FLAG.match(name)
    prefix = "flag:" if flag else ""
    return prefix + re.sub(r"[^a-z0-9]", "", (flag.group(1) or flag.group(2)) if flag else name)


def readable(name: str) -> str:
    """`red-apple` as "red apple", `flag-for-japan` as "flag: Japan"."""
    flag = FLAG.match(name)
    if flag is None or flag.group(1) is None:
        return " ".join(SPELLING.get(word, word) for word in name.split("-"))
    words = [word if word in LOWER_CASE_WORDS else word.capitalize() for word in flag.group(1).split("-")]
    return "flag: " + " ".join(SPELLING.get(word, word) for word in words)


class Glyphs:
    """
    Recognises icons by name.

    Args:
        icons_dir (`Path`): Folder that holds the @iconify-json packages, `NAMING_SETS` among them.
        icon_sets (`Iterable[str]`): Packages whose aliases help to recognise icons.
    """

    def __init__(self, icons_dir: Path, icon_sets: Iterable[str]):
        self._of_key: dict[str, str] = {}
        names = defaultdict(list)
        for icon_set in NAMING_SETS:
            for character, name in read_entries(icons_dir / icon_set / "chars.json", None, str).items():
                glyph = self._of_key.setdefault(name_key(name), PRESENTATION.sub("", character))
                names[glyph].append(name)
        self._parents: dict[str, str] = {}
        self._children = defaultdict(list)
        for icon_set in dict.fromkeys((*NAMING_SETS, *icon_sets)):
            for alias, parent in _aliases(icons_dir / icon_set):
                self._parents.setdefault(name_key(alias), name_key(parent))
                self._children[name_key(parent)].append(name_key(alias))
        for icon_set in NAMING_SETS:
            for alias, _ in _aliases(icons_dir / icon_set):
                if glyph := self.find(alias):
                    names[glyph].append(alias)
        self._names = dict(names)

    def find(self, name: str) -> str | None:
        """The characters that an icon shows, as hexadecimal code points; `None` if no table knows its name."""
        key = name_key(name)
        candidates = (key, self._parents.get(key), *self._children.get(key, ()))
        return next((self._of_key[other] for other in candidates if other in self._of_key), None)

    def class_name(self, glyph: str) -> str:
        """The names of a glyph as one text, that of the most trusted set first: "red apple, apple"."""
        names: dict[str, str] = {}
        for name in self._names[glyph]:
            text = readable(name).replace(",", "")
            names.setdefault(text.casefold().removeprefix("flag: "), text)
        return ", ".join(names.values())


def _aliases(folder):
    """Pairs of an icon's other name and its name; a mirrored or rotated alias is another image."""
    aliases = read_entries(folder / "icons.json", "aliases", dict, {})
    return [(alias, str(entry["parent"])) for alias, entry in aliases.items() if entry.keys() == {"parent"}]
