"""The Space's server, as a user starts it."""

import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager

from conftest import ROOT


APP = ROOT / "examples" / "space" / "app.py"


@contextmanager
def serve(model, folder):
    """The app as a user starts it, with all temporary files in a folder of ours; yields its address."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHINDUCTOR")}
    environment |= {"TMPDIR": str(folder), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, APP, "--model", str(model)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=folder
    ) as app:
        try:
            lines = []
            for line in app.stdout:
                lines.append(line)
                if found := re.search(r"http://[\d.]+:\d+", line):
                    threading.Thread(target=app.stdout.read, daemon=True).start()  # or it would wait for a reader
                    yield found[0]
                    break
            else:
                raise AssertionError("".join(lines))
        finally:
            app.terminate()
            assert app.wait(60) == 0
