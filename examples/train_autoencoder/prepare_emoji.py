#!/usr/bin/env python
"""Rasterises seven emoji sets from npm into a class-conditional image dataset (Parquet, `datasets` layout).

    npm i --prefix outputs/npm --ignore-scripts \
        @iconify-json/{noto@1.2.9,noto-v1@1.2.5,twemoji@1.2.5,fluent-emoji-flat@1.2.6,fluent-emoji@1.2.7} \
        @iconify-json/{fxemoji@1.2.2,emojione@1.2.3}
    python examples/train_autoencoder/prepare_emoji.py --icons_dir outputs/npm/node_modules/@iconify-json \
        --output_dir outputs/emoji64

Expected: two minutes; 10 thousand images in 9 classes, one skin tone per glyph. A tenth of the glyph names is held
out, in all sets at once. Held-out images with a near duplicate in training are dropped: `man-pilot` if `woman-pilot`
is trained on, and an image that occurs under a second name. Blank icons and exact copies are dropped.
"""

import hashlib
import io
import math
import re
from collections import Counter
from pathlib import Path

import resvg_py
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from tqdm import tqdm

from dit_hf.command_line import ArgumentParser, integer, real, run
from dit_hf.data.pixels import open_image
from dit_hf.files import check_writable, read_json, reading, writing


ICON_SETS = ("noto", "noto-v1", "twemoji", "fluent-emoji-flat", "fluent-emoji", "fxemoji", "emojione")
# The sets whose metadata follow Unicode's own grouping, in order of trust: they decide a glyph's class.
REFERENCE_SETS = ("noto", "twemoji", "fluent-emoji-flat", "noto-v1")
CLASSES = ("activities", "animals", "flags", "food", "objects", "people", "smileys", "symbols", "travel")
CLASS_OF_CATEGORY = {
    "Activities": "activities",
    "Animals & Nature": "animals",
    "Nature": "animals",
    "Flags": "flags",
    "Food": "food",
    "Food & Drink": "food",
    "Objects": "objects",
    "People": "people",
    "People & Body": "people",
    "Places": "travel",
    "Smileys & Emotion": "smileys",
    "Symbols": "symbols",
    "Travel": "travel",
    "Travel & Places": "travel",
}
SKIN_TONE = re.compile(r"-((medium-)?(light|dark)|medium)-skin-tone|-tone-?[1-5]")
PERSON_PREFIX = re.compile(r"^(man|woman|men|women|person|people|boy|girl|male|female)-")
FLUENT_SKIN_TONE = re.compile(r"-(medium-light|medium-dark|light|medium|dark)(-|$)")
# Of an icon's sides; a longer one would take memory out of all proportion.
MAX_ASPECT = 16


def glyph_key(name):
    """The name under which a glyph is known across sets: `woman-cook` and `womancook` agree."""
    return re.sub(r"[^a-z0-9]", "", name.removeprefix("flag-for-").replace("flag-", ""))


def read_entries(file, key, kind, default=None):
    """The entries of a package's JSON file by name: dictionaries, or lists of names."""
    entries = read_json(file).get(key, default)
    values = list(entries.values()) if isinstance(entries, dict) else [None]
    names = [name for value in values if isinstance(value, list) for name in value]
    if not all(isinstance(value, kind) for value in values) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{file}: {key!r} is missing, or of another kind.")
    return entries


def is_skin_tone_variant(name, names):
    """True for every tone but the neutral one, which all sets have."""
    if SKIN_TONE.search(name):
        return True
    match = FLUENT_SKIN_TONE.search(name)
    return bool(match) and name[: match.start()] in names


def class_table(icons_dir):
    """Glyph key -> class, from the reference sets."""
    table = {}
    for icon_set in REFERENCE_SETS:
        for category, names in read_entries(icons_dir / icon_set / "metadata.json", "categories", list).items():
            for name in names:
                if category in CLASS_OF_CATEGORY:
                    table.setdefault(glyph_key(name), CLASS_OF_CATEGORY[category])
    return table


def own_classes(icons_dir, icon_set):
    """Icon name -> class, from a set's own metadata (fluent-emoji ships none)."""
    file = icons_dir / icon_set / "metadata.json"
    categories = read_entries(file, "categories", list, {}) if file.exists() else {}
    return {
        name: CLASS_OF_CATEGORY[category]
        for category, names in categories.items()
        if category in CLASS_OF_CATEGORY
        for name in names
    }


def rasterise(icon, defaults, resolution):
    """One icon's SVG body -> an RGB image on white, (resolution, resolution)."""
    box = [icon.get(key, defaults.get(key, fallback)) for key, fallback in (("left", 0), ("top", 0), ("width", 16))]
    left, top, width = box
    height = icon.get("height", defaults.get("height", width))
    numbers = all(isinstance(side, (int, float)) and math.isfinite(side) for side in (left, top, width, height))
    if not numbers or min(width, height) <= 0 or max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"An icon of {str(width)[:20]} × {str(height)[:20]} can't be rasterised.")
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", width=4 * resolution, skip_system_fonts=True)
    image = open_image(io.BytesIO(png)).convert("RGB")
    canvas = PILImage.new("RGB", (max(image.size),) * 2, "white")
    canvas.paste(image, ((canvas.width - image.width) // 2, (canvas.height - image.height) // 2))
    return canvas.resize((resolution, resolution), PILImage.Resampling.LANCZOS)


def rows_of_set(icons_dir, icon_set, classes, resolution, one_class=None):
    """Yields one row per glyph, of its own class or of one for all; skips blank ones and those without a class."""
    file = icons_dir / icon_set / "icons.json"
    icons = read_json(file) | {"icons": read_entries(file, "icons", dict)}
    own = own_classes(icons_dir, icon_set)
    for name, icon in tqdm(sorted(icons["icons"].items()), desc=icon_set):
        if is_skin_tone_variant(name, icons["icons"]):
            continue
        # Without its prefix "flag-for-turkey" would be looked up as the bird.
        label = "flags" if own.get(name) == "flags" else classes.get(glyph_key(name)) or own.get(name)
        label = one_class or label
        if label is None:
            continue
        with reading(file, f"icons (key {name!r})"):  # of damaged ones, the rasteriser raises all kinds
            image = rasterise(icon, icons, resolution)
        if image.convert("L").getextrema() == (255, 255):
            continue
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        yield {"image": {"bytes": buffer.getvalue(), "path": None}, "label": label, "name": name, "set": icon_set}


def is_held_out(name, fraction):
    """A decision by hash, so that it needs no list and never changes."""
    digest = hashlib.sha256(glyph_key(name).encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < fraction


def without_copies(rows):
    """Rows whose image has not been seen before."""
    seen = set()
    return [row for row in rows if (image := row["image"]["bytes"]) not in seen and not seen.add(image)]


def split_rows(rows, fraction):
    """(train, test): glyphs held out by name, less those of which training has a variant or the same image."""
    train = without_copies(row for row in rows if not is_held_out(row["name"], fraction))
    variants = {glyph_key(PERSON_PREFIX.sub("", row["name"])) for row in train}
    test = [row for row in rows if is_held_out(row["name"], fraction)]
    test = [row for row in test if glyph_key(PERSON_PREFIX.sub("", row["name"])) not in variants]
    return train, without_copies(train + test)[len(train) :]


def parse_args():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--icons_dir", type=Path, required=True, help="Folder that holds the @iconify-json packages.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Where train.parquet and test.parquet go.")
    parser.add_argument("--icon_sets", nargs="+", default=ICON_SETS, help="Packages to take icons from.")
    parser.add_argument("--one_class", help="Give all icons this class, whatever they show.")
    parser.add_argument("--resolution", type=integer(8, 1024), default=64, help="Pixels per side.")
    parser.add_argument(
        "--held_out", type=real(above=0, below=1), default=0.1, help="Fraction of glyph names kept for evaluation."
    )
    args = parser.parse_args()
    check_writable(args.output_dir)
    if there := [name for name in ("train", "test") if (args.output_dir / f"{name}.parquet").exists()]:
        parser.error(f"{args.output_dir} holds {there[0]}.parquet already; choose another --output_dir, or remove it")
    needed = (*args.icon_sets, *(() if args.one_class else REFERENCE_SETS))
    missing = [name for name in needed if not (args.icons_dir / name / "icons.json").exists()]
    if missing:
        parser.error(
            f"--icons_dir {args.icons_dir} lacks {', '.join(missing)}; the npm command is at the top of this file"
        )
    return args


def main():
    args = parse_args()
    names = [args.one_class] if args.one_class else list(CLASSES)
    features = Features(
        {"image": Image(), "label": ClassLabel(names=names), "name": Value("string"), "set": Value("string")}
    )
    classes = {} if args.one_class else class_table(args.icons_dir)
    options = (classes, args.resolution, args.one_class)
    rows = [row for name in args.icon_sets for row in rows_of_set(args.icons_dir, name, *options)]
    splits = dict(zip(("train", "test"), split_rows(rows, args.held_out), strict=True))
    if empty := [split for split, chosen in splits.items() if not chosen]:
        raise ValueError(f"No icon of {', '.join(args.icon_sets)} is in the split {empty[0]!r}; nothing is written.")
    for split, chosen in splits.items():
        with writing(args.output_dir / f"{split}.parquet") as partial:
            Dataset.from_list(chosen, features=features).to_parquet(partial)
        counts = Counter(row["label"] for row in chosen)
        print(f"{split}: {len(chosen)} images, {dict(sorted(counts.items()))}")
    print(f"Dataset: {args.output_dir}")


if __name__ == "__main__":
    run(main)
