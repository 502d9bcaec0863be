"""Scripts in separate processes, forked from one that has imported what takes a fresh one six seconds."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path


TIMEOUT = 600  # seconds
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["accelerate", "datasets", "dit_hf.evaluation.metrics", "dit_hf.training.lora", "dit_hf.commands.train"]
)


def run_forked(command, folder=".", check=False):
    """
    As `subprocess.run` of `[sys.executable, script, *flags]`, its words captured. What a library reads from the
    environment when it is imported, it has read: a test of that starts a new interpreter.
    """
    command = [str(part) for part in command[1:]]
    with tempfile.TemporaryDirectory() as captured:
        streams = [Path(captured, name) for name in ("output", "errors")]
        process = SERVER.Process(target=_execute, args=(command, Path(folder).resolve(), dict(os.environ), streams))
        process.start()
        process.join(TIMEOUT)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(command, TIMEOUT)
        output, errors = (stream.read_text() for stream in streams)
    result = subprocess.CompletedProcess(command, process.exitcode, output, errors)
    if check:
        assert result.returncode == 0, result.stderr
    return result


def _execute(command, folder, environment, streams):
    for number, stream in enumerate(streams, 1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    script, tests = Path(command[0]), str(Path(__file__).parents[1])
    sys.path[:] = [str(script.resolve().parent), *(path for path in sys.path if path != tests)]
    sys.argv[:] = command
    runpy.run_path(str(script), run_name="__main__")
