"""A hook of mkdocs: READMEs of the repository become pages, and links between them and the guides work on the site.

In `docs/*.md` links are relative to the file, as GitHub wants them; those that leave `docs/` would point to nothing
on the site.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File


ROOT = Path(__file__).parents[1]
# Of the README's links, which are absolute, so that they hold on the package index.
REPOSITORY = re.compile(r"https://(?:github\.com/dit-hf/dit_hf/blob|raw\.githubusercontent\.com/dit-hf/dit_hf)/main/")
FOLDERS = ("benchmarks", "conversion", "pipelines/*", "examples/*", "src/dit_hf/bundled/*")
# Path in the repository -> path on the site; the repository's README would take the front page's place.
PAGES = {"README.md": "repository.md"} | {
    name: name
    for name in ("CONTRIBUTING.md", "CHANGELOG.md")
    + tuple(
        path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in sorted(ROOT.glob(f"{folder}/README.md"))
    )
}
SOURCES = {page: name for name, page in PAGES.items()}


def on_files(files, config):
    """Adds the READMEs to what lies in docs/."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links to files of the repository become links of the site; a link to a file that is no page becomes text."""
    markdown = REPOSITORY.sub("", markdown)
    here = page.file.src_uri
    folder = posixpath.dirname(SOURCES.get(here, f"docs/{here}"))

    def relink(match):
        text, target = match.groups()
        name = posixpath.normpath(posixpath.join(folder, target))
        if not (ROOT / name).exists():
            return match[0]  # an address, an anchor, or code; or wrong, which mkdocs says
        if name.startswith("docs/"):
            place = name.removeprefix("docs/")
        else:
            place = PAGES.get(name) or PAGES.get(f"{name}/README.md")
        return f"{text}({posixpath.relpath(place, posixpath.dirname(here) or '.')})" if place else text[1:-1]

    return re.sub(r"(\[[^\[\]]*\])\(([^()\s:#]+)\)", relink, markdown)
