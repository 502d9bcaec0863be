"""The results of bench.py as Markdown."""

import statistics


def markdown(results: dict) -> str:
    """Every part that was measured, under its date, hardware, versions and command."""
    parts = {name: part for name, part in TABLES.items() if name in results}
    return "\n\n".join(f"{_heading(name, results[name])}\n\n{table(results[name])}" for name, table in parts.items())


def _heading(name, part):
    where = part["environment"]
    versions = ", ".join(f"{package} {version}" for package, version in where["versions"].items())
    machine = f"{where['date']}, {where['hardware']}, Python {where['python']}, {versions}"
    return f"### {name}\n\n{machine}: `{where['command']}`"


def _rows(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _ratio(row):
    low, high = row["spread"]
    return f"{row['ratio']:.3f} ({low:.3f}–{high:.3f})"


def _times_as_fast(row):
    low, high = row["spread"]
    return f"{1 / row['ratio']:.2f} ({1 / high:.2f}–{1 / low:.2f})"


def forward(part):
    ratios = [row["ours"]["ratio"] for row in part["rows"]]
    text = (
        f"Ratio to the stock model's time: geometric mean {statistics.geometric_mean(ratios):.3f}, largest "
        f"{max(ratios):.3f}. The peak is a product of 4096×4096 float32 matrices timed in the same rounds.\n\n"
    )
    rows = [
        [
            row["model"],
            f"{row['pixels']}²",
            row["batch"],
            f"{row['stock']['seconds'] * 1000:.0f}",
            f"{row['ours']['seconds'] * 1000:.0f}",
            _ratio(row["ours"]),
            f"{row['share_of_peak']:.0%}",
        ]
        for row in part["rows"]
    ]
    return text + _rows(["model", "pixels", "batch", "stock ms", "ours ms", "ratio (quartiles)", "of peak"], rows)


def compiled(part):
    text = f"{part['model']}, batch {part['batch']}, random weights, modulation given, of order 1; "
    text += "the peak is float32's.\n\n"
    rows = [
        [
            name,
            f"{row['ours']['seconds'] * 1000:.0f}",
            _times_as_fast(row["ours"]),
            f"{row['ours']['ratio'] / row['eager']['ratio']:.2f}",
            f"{row['share_of_peak']:.0%}",
            f"{row['relative_error']:.1e}",
            f"{row['ours']['first_seconds']:.0f}",
        ]
        for name, row in part["rows"].items()
    ]
    header = ["compiled", "ms", "times as fast as stock (quartiles)", "of the same, uncompiled", "of float32 peak"]
    header += ["relative error", "first call s"]
    return text + _rows(header, rows)


def training(part):
    ratios = [row["ours"]["ratio"] for row in part["rows"]]
    text = (
        f"Ratio to the stock model's time: geometric mean {statistics.geometric_mean(ratios):.3f}, largest "
        f"{max(ratios):.3f}. Without the optimizer; at 512² batches that take minutes a step are omitted.\n\n"
    )
    rows = [
        [
            row["model"],
            f"{row.get('pixels', 256)}²",
            row["batch"],
            f"{row['stock']['seconds']:.2f}",
            f"{row['ours']['seconds']:.2f}",
            _ratio(row["ours"]),
            f"{row['share_of_peak']:.0%}",
        ]
        for row in part["rows"]
    ]
    return text + _rows(["model", "pixels", "batch", "stock s", "ours s", "ratio (quartiles)", "of peak"], rows)


def memory(part):
    full, int8 = part["our"]["file_bytes"], part["int8"]
    loading = [
        [
            name,
            f"{part[name]['parameters'] / 1e6:.1f} M",
            f"{part[name]['file_bytes'] / full:.2f}",
            f"{part[name]['load_over_file'] * part[name]['file_bytes'] / full:.2f}",
            f"{part[name]['load_seconds']:.1f}",
        ]
        for name in ("our", "stock")
    ]
    loading.append(
        ["our, int8", "", f"{int8['file_over_float32_file']:.2f}", f"{int8['load_over_float32_file']:.2f}", ""]
    )
    header = [part["model"], "parameters", "file", "peak of loading and a first pass", "s of both"]
    text = "File and memory as fractions of our float32 file.\n\n" + _rows(header, loading)
    private = [
        [f"{name} of {preset}", option, f"{gigabytes:.1f}"]
        for key, name in (("training", "training step of 8"), ("drawing", "first image"))
        for preset, options in part[key].items()
        for option, gigabytes in options.items()
    ]
    return text + "\n\n" + _rows(["peak of private memory", "", "GB"], private)


def sampling(part):
    batches = list(part["rows"])
    first = part["rows"][batches[0]]
    rows = []
    for name in first:
        cells = [part["rows"][batch][name] for batch in batches]
        rows.append(
            [name]
            + [f"{row['seconds'] / int(batch):.3f}" for row, batch in zip(cells, batches, strict=True)]
            + [_times_as_fast(row) for row in cells]
            + [f"{cells[0]['first_seconds']:.0f}"]
        )
    header = ["setting", *(f"s/image, batch {batch}" for batch in batches)]
    header += [*(f"times as fast (quartiles), batch {batch}" for batch in batches), "first call s"]
    note = (
        "Largest difference of a pixel between stock and ours, after 10 steps: "
        f"{part['largest_difference_of_pixels']:.1e}. First calls find what rows above have compiled.\n\n"
    )
    return note + _rows(header, rows)


def growth(part):
    rows = [[cell, f"{row['seconds']:.3f}", _ratio(row)] for cell, row in part["rows"].items()]
    return _rows(["call, with changes to the first", "s", "times the first (quartiles)"], rows)


def quality(part):
    distance, kernel = "fd_efficientnet_lite0", "kid"
    baseline = part["rows"]["DDIM"][distance]
    rows = [
        [name, f"{row[distance]:.0f}", f"{row[distance] / baseline:.3f}"]
        + [f"{row[metric]:.3f}" for metric in (kernel, "precision", "recall")]
        for name, row in part["rows"].items()
    ]
    text = (
        f"{part['num_samples']} samples, {part['held_out']} held-out images, {part['extractor']}. Rows are kept from "
        "one run to the next: the command is that of the last, and `--settings` with a row's name measures that "
        "row.\n\n"
    )
    return text + _rows(["setting", distance, "over DDIM's", kernel, "precision", "recall"], rows)


TABLES = {
    "forward": forward,
    "compiled": compiled,
    "training": training,
    "memory": memory,
    "sampling": sampling,
    "growth": growth,
    "quality": quality,
}
