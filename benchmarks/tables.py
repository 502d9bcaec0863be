"""The figures of bench.py as Markdown."""


def markdown(results: dict) -> str:
    """Every part that was measured, under its date, hardware, versions and command."""
    parts = {name: part for name, part in TABLES.items() if name in results}
    return "\n\n".join(f"{_heading(name, results[name])}\n\n{table(results[name])}" for name, table in parts.items())


def _heading(name, part):
    where = part["environment"]
    versions = ", ".join(f"{package} {version}" for package, version in where["versions"].items())
    return f"### {name}\n\n{where['date']}, {where['hardware']}, Python {where['python']}, {versions}: `{where['command']}`"


def _rows(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _geometric_mean(values):
    product = 1.0
    for value in values:
        product *= value
    return product ** (1 / len(values))


def _ratio(row):
    low, high = row["spread"]
    return f"{row['ratio']:.3f} ({low:.3f}–{high:.3f})"


def forward(part):
    ratios = [row["ours"]["ratio"] for row in part["rows"]]
    text = (
        f"Ratio to the stock model's time: geometric mean {_geometric_mean(ratios):.3f}, largest {max(ratios):.3f}. "
        "The peak is a product of 4096×4096 float32 matrices timed in the same rounds.\n\n"
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
    text = f"{part['model']}, batch {part['batch']}, modulation given; the peak is float32's.\n\n"
    rows = [
        [
            name,
            f"{row['ours']['seconds'] * 1000:.0f}",
            f"{1 / row['ours']['ratio']:.2f}",
            f"{row['share_of_peak']:.0%}",
            f"{row['relative_error']:.1e}",
            f"{row['ours']['first_seconds']:.0f}",
        ]
        for name, row in part["rows"].items()
    ]
    header = ["compiled", "ms", "times as fast as stock eager", "of float32 peak", "relative error", "first call s"]
    return text + _rows(header, rows)


def training(part):
    rows = [
        [
            row["model"],
            row["batch"],
            f"{row['stock']['seconds']:.2f}",
            f"{row['ours']['seconds']:.2f}",
            _ratio(row["ours"]),
        ]
        for row in part["rows"]
    ]
    return _rows(["model", "batch", "stock s", "ours s", "ratio (quartiles)"], rows)


def memory(part):
    rows = [
        [name, f"{part[name]['parameters'] / 1e6:.1f} M", f"{part[name]['load_over_file']:.2f}"]
        + [f"{part[name]['load_seconds']:.2f} s"]
        for name in ("our", "stock")
    ]
    int8 = part["int8"]
    rows.append(["int8", f"file {int8['file_over_float32_file']:.2f}", f"{int8['load_over_float32_file']:.2f}", ""])
    steps = [
        [f"{preset}, step of 8", name, f"{gigabytes:.1f} GB", ""]
        for preset, pair in part["training"].items()
        for name, gigabytes in pair.items()
    ]
    return _rows([part["model"], "", "peak over the float32 file", "time"], rows + steps)


def sampling(part):
    batches = list(part["rows"])
    first = part["rows"][batches[0]]
    rows = []
    for name in first:
        cells = [part["rows"][batch][name] for batch in batches]
        rows.append(
            [name]
            + [f"{row['seconds'] / int(batch):.3f}" for row, batch in zip(cells, batches, strict=True)]
            + [f"{1 / row['ratio']:.1f}" for row in cells]
            + [f"{cells[-1]['first_seconds']:.0f}"]
        )
    header = ["setting", *(f"s/image, batch {batch}" for batch in batches)]
    header += [*(f"times as fast, batch {batch}" for batch in batches), "first call s"]
    note = f"Largest difference of a pixel between stock and ours: {part['largest_difference_of_pixels']:.1e}.\n\n"
    return note + _rows(header, rows)


def growth(part):
    rows = [[cell, f"{row['seconds']:.3f}", f"{row['ratio']:.2f}"] for cell, row in part["rows"].items()]
    return _rows(["call, with changes to the first", "s", "times the first"], rows)


def quality(part):
    metrics = ("fid", "fid_over_ddim", "kid", "precision", "recall")
    digits = (0, 3, 3, 3, 3)
    rows = [
        [name, *(f"{row[metric]:.{places}f}" for metric, places in zip(metrics, digits, strict=True))]
        for name, row in part["rows"].items()
    ]
    return f"{part['num_samples']} samples, {part['extractor']}.\n\n" + _rows(["setting", *metrics], rows)


TABLES = {
    "forward": forward,
    "compiled": compiled,
    "training": training,
    "memory": memory,
    "sampling": sampling,
    "growth": growth,
    "quality": quality,
}
