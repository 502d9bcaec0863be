"""A cache of latents of ImageNet's size: time and memory of opening it, of an epoch's order, of a batch.

    python benchmarks/latents_cache.py

The shards are sparse files of zeros, which take no room on the disk. Expected: a minute.
"""

import argparse
import json
import struct
import tempfile
import time
from pathlib import Path

import torch

from dit_hf import DiTTransformer2DModel
from dit_hf.command_line import run
from dit_hf.data.latents import SHARD_SIZE, CachedLatents
from dit_hf.data.shards import FACTS, record_verified, shard_path, write_index
from dit_hf.training.batches import SeededBatches, draw_batch
from dit_hf.training.config import TrainingConfig
from dit_hf.training.objectives import VelocityObjective
from dit_hf.training.trainer import Trainer


IMAGENET = 1_281_167


def write_sparse(folder: Path, count: int, size: int) -> None:
    """A cache whose latents are zeros, in half precision, as `dit-hf latents` lays it out."""
    entries = []
    for number, start in enumerate(range(0, count, SHARD_SIZE)):
        rows = min(SHARD_SIZE, count - start)
        values, header, end = rows * 4 * size * size * 2, {}, 0
        for name in ("mean", "std", "mean_flipped", "std_flipped"):
            header[name] = {"dtype": "F16", "shape": [rows, 4, size, size], "data_offsets": [end, end + values]}
            end += values
        header["label"] = {"dtype": "I64", "shape": [rows], "data_offsets": [end, end + 8 * rows]}
        header["__metadata__"] = {FACTS: json.dumps({"fingerprint": "sparse", "unreadable": []})}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        path = shard_path(folder, number)
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end + 8 * rows)
        entries.append({"file": path.name, "count": rows, "sha256": "0" * 64})
    index = {"fingerprint": "sparse", "count": count, "unreadable": [], "vae": None, "encoder": None}
    index |= {"classes": [str(number) for number in range(1000)], "shards": entries}
    index |= {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    write_index(folder, index)
    record_verified(folder, index)


def timed(call):
    """A result, and the seconds that it took."""
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started


def resident() -> int:
    """Bytes of this process that are its own: mapped files are the system's to drop."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=IMAGENET, help="Images.")
    parser.add_argument("--size", type=int, default=32, help="Side of the latents.")
    parser.add_argument("--batch", type=int, default=256, help="Samples of a step.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_sparse(Path(folder), args.count, args.size)
        before = resident()
        latents, opening = timed(lambda: CachedLatents(folder))
        grown = resident() - before
        batches = SeededBatches(len(latents.labels), args.batch)
        _, order = timed(lambda: batches.indices(0))
        _, same = timed(lambda: batches.indices(1))

        def draw(step, part=slice(None)):
            return draw_batch(latents, VelocityObjective(), batches, step, part, 0.5, 0.1)

        draw(0)
        times = sorted(timed(lambda step=step: draw(step))[1] for step in range(1, 12))
        shares = sorted(timed(lambda step=step: draw(step, slice(0, 32)))[1] for step in range(12, 23))
        started = time.perf_counter()
        model = DiTTransformer2DModel.from_preset("DiT-S/8", sample_size=args.size, learn_sigma=False)
        trainer = Trainer(
            TrainingConfig(Path(folder) / "run", args.batch), model, CachedLatents(folder), VelocityObjective()
        )
        trainer.draw(0)
        starting = time.perf_counter() - started
    print(
        json.dumps(
            {
                "images": args.count,
                "threads": torch.get_num_threads(),
                "open_seconds": round(opening, 2),
                "open_bytes": grown,
                "start_seconds": round(starting, 2),
                "order_seconds": round(order, 4),
                "order_seconds_within_an_epoch": round(same, 6),
                "batch": args.batch,
                "draw_ms": round(1000 * times[5], 2),
                "draw_ms_of_32": round(1000 * shares[5], 2),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    run(main)
