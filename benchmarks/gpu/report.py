"""Results in a JSON file that grows, cell by cell, within a time budget."""

import gc
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch


def free() -> None:
    """Gives back what the models of a cell held; compiled blocks are in cycles that hold them."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Report:
    """
    Cells of results by name; those that the file has already are not measured again.

    Args:
        path (`Path`): The JSON file.
        minutes (`float`): No cell is begun that is expected to end after this time.
        facts (`dict`): What all of them depend on.
    """

    def __init__(self, path: Path, minutes: float, facts: dict):
        self.path, self.end = path, time.monotonic() + 60 * minutes
        self.content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        known = self.content.get("environment", {})
        if any(known.get(name) != facts[name] for name in ("hardware", "python", "versions")):
            self.content = {"cells": {}}  # of another machine
        self.content["environment"] = facts

    def measure(self, name: str, seconds: float, cell: Callable[[], dict]) -> dict | None:
        """
        The result of a cell, measured unless the file has it; None if there was an error, or no time for it.

        Args:
            name (`str`): Of the cell.
            seconds (`float`): What it is expected to take.
            cell (`Callable`): Measures it.
        """
        known = self.content["cells"].get(name)
        if known is not None and "error" not in known:
            return known
        if time.monotonic() + seconds > self.end:
            print(f"{name}: no time left", flush=True)
            return None
        started = time.monotonic()
        try:
            result = cell()
        except Exception as error:  # the other cells are measured all the same
            result = {"error": f"{type(error).__name__}: {error}"[:2000], "traceback": traceback.format_exc()[-4000:]}
        free()
        result["cell_seconds"] = round(time.monotonic() - started, 1)
        self.content["cells"][name] = result
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1), encoding="utf-8")
        partial.replace(self.path)
        print(f"{name}: {json.dumps({key: value for key, value in result.items() if key != 'traceback'})}", flush=True)
        return None if "error" in result else result
