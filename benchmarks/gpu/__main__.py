"""The cells, in the order of their value."""

import argparse
import statistics
from functools import partial
from pathlib import Path

import torch
from timing import clock, environment

from . import correctness, sampling, training
from .report import Report


def measure_gemm(device: torch.device, side: int) -> dict:
    """Operations per second of a bfloat16 product of square matrices, the median of ten."""
    first, second = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = [clock(lambda: first @ second, device) for _ in range(13)][3:]
    return {"flops": 2 * side**3 / statistics.median(times), "side": side}


def measure_widths(device: torch.device, batch: int, seconds: float) -> dict:
    """Attention of XL/2's heads, 72 wide, beside that of 64, 80 and 128: what padding would cost or save."""
    from timing import compare

    candidates = {}
    for width in (72, 64, 80, 128):
        query, key, value = (torch.randn(batch, 16, 256, width, device=device, dtype=torch.bfloat16) for _ in range(3))
        candidates[str(width)] = partial(torch.nn.functional.scaled_dot_product_attention, query, key, value)
    found = compare(candidates, device, seconds)
    return {width: {"ms": 1000 * times["seconds"], "ratio": times["ratio"]} for width, times in found.items()}


def main():
    parser = argparse.ArgumentParser(prog="gpu.sh", description="Measures training and sampling on one device.")
    parser.add_argument("--minutes", type=float, default=9, help="No cell is begun that would end later.")
    parser.add_argument("--output", type=Path, help="JSON that grows; outputs/gpu.json if not given.")
    parser.add_argument("--quick", action="store_true", help="Tiny sizes, to try the script on any machine.")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.quick:
        parser.error("there is no CUDA device; --quick tries the script without one")
    args.output = args.output or Path("outputs", "gpu-quick.json" if args.quick else "gpu.json")
    report = Report(args.output, args.minutes, environment(device))

    # Quick: the time that a cell may take, sizes, batches and steps are tiny, and so are the expectations.
    def choose(real, tiny):
        return tiny if args.quick else real

    product = report.measure("gemm", 5, partial(measure_gemm, device, choose(8192, 512)))
    if product is None:
        return
    gemm, large, small = product["flops"], choose("DiT-XL/2", "DiT-S/8"), choose("DiT-S/2", "DiT-S/8")
    size, seconds = choose(32, 16), choose(4, 0.1)
    train = partial(training.throughput, gemm=gemm, device=device, seconds=seconds)
    sample = partial(sampling.sampling, large, size, gemm=gemm, device=device, seconds=seconds)
    steps = choose(50, 2)
    cells = [
        ("correctness: forwards", 20, partial(correctness.forwards, device)),
        ("correctness: trajectory", 5, partial(correctness.trajectory, device)),
        ("correctness: training", 50, partial(correctness.training, device)),
        ("correctness: a step waits for nothing", 15, partial(correctness.waiting, device)),
        (f"training: {large} 256", 110, partial(train, large, size, choose(128, 2))),
        ("profile", 40, partial(training.profile, large, size, choose(128, 2), device)),
        ("sampling: batch 64", 90, partial(sample, choose(64, 2), steps)),
        ("sampling: batch 1", 80, partial(sample, 1, steps)),
        (f"data: {small}", 35, partial(_data, small, size, choose(1024, 4), device, args.quick)),
        (f"training: {large} 256, batch 256", 40, partial(train, large, size, choose(256, 4), beside=False)),
        (f"training: {small} 256", 30, partial(train, small, size, choose(1024, 4), beside=False)),
        ("attention: widths of a head", 5, partial(measure_widths, device, choose(128, 1), seconds)),
        ("training: DiT-L/2 256", 35, partial(train, choose("DiT-L/2", small), size, choose(256, 2), beside=False)),
        ("training: DiT-B/2 256", 30, partial(train, choose("DiT-B/2", small), size, choose(512, 2), beside=False)),
        (f"training: {large} 512", 45, partial(train, large, 2 * size, choose(64, 2), beside=False)),
        (
            f"training: {large} 256, checkpointing",
            40,
            partial(train, large, size, choose(256, 2), beside=False, checkpointing=True),
        ),
        ("sampling: batch 8", 45, partial(sample, choose(8, 2), steps)),
        ("sampling: CUDA graphs", 150, partial(sampling.graphs, large, size, 1, steps, device, seconds)),
        (f"data: {large}", 45, partial(_data, large, size, choose(128, 2), device, args.quick)),
    ]
    for name, expected, cell in cells:
        report.measure(name, choose(expected, 1), cell)
    missing = [name for name, *_ in cells if "error" in report.content["cells"].get(name, {"error": "missing"})]
    print(
        f"{args.output}: {len(cells) - len(missing)} of {len(cells)} cells",
        *(["missing:", *missing] if missing else []),
    )


def _data(preset, size, batch, device, quick):
    shards, shard_size, steps = (2, 16, 2) if quick else (8, 2048, 40)
    return training.data_path(preset, size, batch, shards, shard_size, steps, device)


if __name__ == "__main__":
    main()
