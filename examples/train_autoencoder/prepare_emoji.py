"""Rasterises emoji sets from npm into a class-conditional image dataset (Parquet, `datasets` layout).

    npm i --prefix outputs/npm --ignore-scripts \
        @iconify-json/{noto@1.2.9,noto-v1@1.2.5,twemoji@1.2.5,fluent-emoji-flat@1.2.6,fluent-emoji@1.2.7} \
        @iconify-json/{fxemoji@1.2.2,emojione@1.2.3}
    python examples/train_autoencoder/prepare_emoji.py --icons_dir outputs/npm/node_modules/@iconify-json \
        --output_dir outputs/emoji64

Expected: two minutes; 10 thousand images in 1,898 classes. A class is a glyph that three sets contain (two, for a
flag), in one skin tone: "red apple", "flag: Japan", "woman cook". The column `group` has Unicode's nine groups. The
split `test` has one image of each glyph that has four or more, chosen by hash, unless it nearly equals a training
image. Blank icons and exact copies are dropped.
"""

import hashlib
import io
import math
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import resvg_py
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from glyphs import NAMING_SETS, Glyphs, read_entries
from PIL import Image as PILImage
from tqdm import tqdm

from dit_hf.bundled import resolve_pipeline
from dit_hf.command_line import ArgumentParser, integer, run
from dit_hf.data.pixels import open_image
from dit_hf.files import check_writable, read_json, reading, writing
from dit_hf.pipeline_dit_class_cond import ClassNames
from dit_hf.training.finetuning import class_names


ICON_SETS = ("noto", "noto-v1", "twemoji", "fluent-emoji-flat", "fluent-emoji", "fxemoji", "emojione")
# The sets whose metadata follow Unicode's own grouping, in order of trust: they decide a glyph's group.
REFERENCE_SETS = ("noto", "twemoji", "fluent-emoji-flat", "noto-v1")
GROUPS = ("activities", "animals", "flags", "food", "objects", "people", "smileys", "symbols", "travel")
GROUP_OF_CATEGORY = {
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
FLUENT_SKIN_TONE = re.compile(r"-(medium-light|medium-dark|light|medium|dark)(-|$)")
# Of an icon's sides; a longer one would take memory out of all proportion.
MAX_ASPECT = 16
# A class has images of this many sets, or of all if there are fewer; the flag of a country looks alike in all.
MIN_SETS, MIN_SETS_OF_FLAG = 3, 2
# A class of fewer images has none to spare for the test split.
MIN_IMAGES_TO_HOLD_OUT = 4
# A held-out image is closer than this to no training image: root mean square of pixels in [0, 1].
NEAR_COPY = 0.05


def is_skin_tone_variant(name, names):
    """True for every tone but the neutral one, which all sets have."""
    if SKIN_TONE.search(name):
        return True
    match = FLUENT_SKIN_TONE.search(name)
    return bool(match) and name[: match.start()] in names


def group_table(icons_dir, glyphs):
    """Glyph -> group, from the reference sets."""
    table = {}
    for icon_set in REFERENCE_SETS:
        for category, names in read_entries(icons_dir / icon_set / "metadata.json", "categories", list).items():
            for name in names:
                if category in GROUP_OF_CATEGORY and (glyph := glyphs.find(name)) is not None:
                    table.setdefault(glyph, GROUP_OF_CATEGORY[category])
    return table


def glyph_labels(icons_dir, icon_sets):
    """A function of an icon's name: its labels, or `None` if it shows no known glyph."""
    glyphs = Glyphs(icons_dir, icon_sets)
    groups = group_table(icons_dir, glyphs)

    def labels(name):
        glyph = glyphs.find(name)
        return {"label": glyphs.class_name(glyph), "group": groups[glyph]} if glyph in groups else None

    return labels


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


def rows_of_set(icons_dir, icon_set, labels, resolution):
    """Yields one row per icon that has labels; skips blank ones and all skin tones but the neutral one."""
    file = icons_dir / icon_set / "icons.json"
    icons = read_json(file) | {"icons": read_entries(file, "icons", dict)}
    for name, icon in tqdm(sorted(icons["icons"].items()), desc=icon_set):
        if is_skin_tone_variant(name, icons["icons"]) or (own := labels(name)) is None:
            continue
        with reading(file, f"icons (key {name!r})"):  # of damaged ones, the rasteriser raises all kinds
            image = rasterise(icon, icons, resolution)
        if image.convert("L").getextrema() == (255, 255):
            continue
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        yield {"image": {"bytes": buffer.getvalue(), "path": None}, "name": name, "set": icon_set} | own


def without_copies(rows):
    """Rows whose image has not been seen before: some countries share a flag."""
    seen = set()
    return [row for row in rows if (image := row["image"]["bytes"]) not in seen and not seen.add(image)]


def drawn_by_enough(rows, num_sets):
    """Rows of the classes that enough of the sets contain, by class name."""
    classes = defaultdict(list)
    for row in rows:
        classes[row["label"]].append(row)

    def is_enough(rows):
        needed = MIN_SETS_OF_FLAG if rows[0].get("group") == "flags" else MIN_SETS
        return len({row["set"] for row in rows}) >= min(needed, num_sets)

    return {name: classes[name] for name in sorted(classes) if is_enough(classes[name])}


def classes_of_pipeline(classes, id2label):
    """Rows by class name, of the classes that a pipeline has, under its names and in its order."""
    known, kept = ClassNames(id2label), {}
    for label, rows in classes.items():
        ids = [known.find(name) for name in (label, *label.split(","))]
        if (found := next((key for key in ids if key is not None), None)) is not None:
            kept.setdefault(found, []).extend(rows)
    return {id2label[key]: [row | {"label": id2label[key]} for row in kept[key]] for key in sorted(kept)}


def split_class(rows):
    """(training rows, held-out rows) of one class: a hash decides, so that it needs no list and never changes."""
    if len(rows) < MIN_IMAGES_TO_HOLD_OUT:
        return rows, []
    chosen = min(rows, key=lambda row: hashlib.sha256(f"{row['set']}/{row['name']}".encode()).digest())
    return [row for row in rows if row is not chosen], [chosen]


def pixels(rows):
    """(B, D) float32 in [0, 1], at 32 × 32."""
    images = [open_image(io.BytesIO(row["image"]["bytes"])).resize((32, 32), PILImage.Resampling.BOX) for row in rows]
    return torch.from_numpy(np.stack(images)).flatten(1).float() / 255


def without_near_copies(held_out, train):
    """Held-out rows that no training image nearly equals: `man-pilot` in one set may be `pilot` in another."""
    if not held_out:
        return []
    train_pixels = pixels(train)
    nearest = torch.cat([torch.cdist(part, train_pixels).amin(dim=1) for part in pixels(held_out).split(256)])
    is_new = nearest / train_pixels.shape[1] ** 0.5 >= NEAR_COPY
    return [row for row, keep in zip(held_out, is_new.tolist(), strict=True) if keep]


def write_split(path, rows, names):
    """One Parquet file; `names` are those of all classes, whether the split has images of them or not."""
    columns = {"image": Image(), "label": ClassLabel(names=names), "name": Value("string"), "set": Value("string")}
    if "group" in rows[0]:
        columns["group"] = ClassLabel(names=list(GROUPS))
    with writing(path) as partial:
        Dataset.from_list(rows, features=Features(columns)).to_parquet(partial)
    groups = Counter(row.get("group", row["label"]) for row in rows)
    num_classes = len({row["label"] for row in rows})
    print(f"{path.stem}: {len(rows)} images, {num_classes} classes; by group: {dict(sorted(groups.items()))}")


def parse_args():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--icons_dir", type=Path, required=True, help="Folder that holds the @iconify-json packages.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Where train.parquet and test.parquet go.")
    parser.add_argument("--icon_sets", nargs="+", default=ICON_SETS, help="Packages to take icons from.")
    parser.add_argument("--one_class", help="Give all icons this class, whatever they show.")
    parser.add_argument(
        "--classes_of", help="Pipeline to fine-tune, such as emoji64: keep its classes, by name, and no others."
    )
    parser.add_argument("--resolution", type=integer(8, 1024), default=64, help="Pixels per side.")
    args = parser.parse_args()
    if args.one_class and args.classes_of:
        parser.error("pass --one_class or --classes_of, not both")
    check_writable(args.output_dir)
    if there := [name for name in ("train", "test") if (args.output_dir / f"{name}.parquet").exists()]:
        parser.error(f"{args.output_dir} holds {there[0]}.parquet already; choose another --output_dir, or remove it")
    needed = dict.fromkeys((*args.icon_sets, *(() if args.one_class else (*REFERENCE_SETS, *NAMING_SETS))))
    missing = [name for name in needed if not (args.icons_dir / name / "icons.json").exists()]
    if missing:
        parser.error(
            f"--icons_dir {args.icons_dir} lacks {', '.join(missing)}; the npm command is at the top of this file"
        )
    return args


def read_classes(pretrained_model_name_or_path):
    """The class names of a pipeline, by id."""
    id2label = class_names(resolve_pipeline(pretrained_model_name_or_path))
    if not id2label:
        raise ValueError(f"--classes_of {pretrained_model_name_or_path} names no classes; omit it.")
    return {key: id2label[key] for key in sorted(id2label)}


def main():
    args = parse_args()
    known = read_classes(args.classes_of) if args.classes_of else {}
    one = {"label": args.one_class}
    labels = (lambda name: one) if args.one_class else glyph_labels(args.icons_dir, args.icon_sets)
    rows = [row for name in args.icon_sets for row in rows_of_set(args.icons_dir, name, labels, args.resolution)]
    classes = drawn_by_enough(without_copies(rows), len(args.icon_sets))
    if not classes:
        what = "icon" if args.one_class else "glyph that enough of them share"
        raise ValueError(f"There is no {what} in {', '.join(args.icon_sets)}; nothing is written.")
    if known:
        classes = classes_of_pipeline(classes, known)
        print(f"{len(classes)} of the {len(known)} classes of {args.classes_of} have images.")
        if not classes:
            raise ValueError(f"No glyph of {', '.join(args.icon_sets)} is a class of {args.classes_of}.")
    names = list(known.values() if known else classes)
    splits = [(rows, []) if args.one_class else split_class(rows) for rows in classes.values()]
    train, held_out = ([row for split in splits for row in split[index]] for index in (0, 1))
    chosen, held_out = len(held_out), without_near_copies(held_out, train)
    print(f"{chosen - len(held_out)} of {chosen} held-out images nearly equal a training image and are dropped.")
    write_split(args.output_dir / "train.parquet", train, names)
    if held_out:
        write_split(args.output_dir / "test.parquet", held_out, names)
    else:
        print("There is no test split; `--holdout 0.1` of the training holds out a tenth of the images.")
    print(f"Dataset: {args.output_dir}")


if __name__ == "__main__":
    run(main)
