"""Times that can be compared: candidates in turn, in one process, medians with their spread."""

import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch


PACKAGES = ("torch", "diffusers", "torchao")


def environment(device: torch.device) -> dict:
    """What a result depends on: hardware, versions, command, date."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")] or [platform.machine()]
        flags = {flag for line in lines if line.startswith("flags") for flag in line.split()}
        extensions = sorted(flags & {"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"})
        hardware = f"{names[0]}, {torch.get_num_threads()} threads, {' '.join(extensions)}"
    return {
        "date": date.today().isoformat(),
        "hardware": hardware,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "command": shlex.join(["python", *sys.argv]),
    }


def clock(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call; a GPU's own, by events."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def compare(
    candidates: dict[str, Callable[[], object]], device: torch.device, seconds: float, least: int = 5, most: int = 25
) -> dict:
    """
    Times candidates against the first of them.

    Each is called once to warm up (its time is `first_seconds`: with compilation), then all in turn until `seconds`
    are over, `least` to `most` rounds, every other one backwards, so that nobody always comes after the same. A ratio
    is the median of the rounds' ratios, so that what slows a whole round down cancels out.

    Returns:
        `dict`: name -> `seconds` (median), `ratio` to the first, its `spread` (quartiles), `first_seconds`, `times` of
        the rounds.
    """
    first = {name: clock(call, device) for name, call in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    started = time.perf_counter()
    for rounds in range(most):
        if rounds >= least and time.perf_counter() - started > seconds:
            break
        for name, call in list(candidates.items())[:: -1 if rounds % 2 else 1]:
            times[name].append(clock(call, device))
    baseline = next(iter(times.values()))
    results = {}
    for name, taken in times.items():
        ratios = [mine / other for mine, other in zip(taken, baseline, strict=True)]
        lower, middle, upper = statistics.quantiles(ratios, n=4, method="inclusive")
        results[name] = {
            "seconds": statistics.median(taken),
            "ratio": middle,
            "spread": [lower, upper],
            "first_seconds": first[name],
            "times": taken,
        }
    return results


class Product:
    """A product of large square matrices, timed among the candidates: what the machine can do at that moment."""

    def __init__(self, device: torch.device, side: int = 4096):
        self.operations = 2 * side**3
        self.matrices = [torch.randn(side, side, device=device) for _ in range(2)]

    def __call__(self):
        return self.matrices[0] @ self.matrices[1]

    def share(self, operations: float, found: dict) -> float:
        """Operations a second of our model over the product's, the median of the rounds that `compare` has found."""
        rounds = zip(found["product"]["times"], found["ours"]["times"], strict=True)
        return operations / self.operations * statistics.median(product / ours for product, ours in rounds)


def peak_memory(command: list, kinds: tuple[str, ...] = ("RssAnon",)) -> int:
    """Largest memory of a command, bytes, read every 5 ms; private if not told otherwise. Linux only."""
    peak = 0
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            peak = max(peak, _resident_bytes(process.pid, kinds))
            time.sleep(0.005)
        if process.returncode != 0:
            errors.seek(0)
            raise ValueError(f"The command failed: {errors.read().decode()[-500:]}")
    return peak


def _resident_bytes(pid, kinds):
    """Memory of a process of the given kinds, 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(kinds))
