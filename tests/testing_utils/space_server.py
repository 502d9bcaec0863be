"""The Space's server, as a user starts it."""

import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

from conftest import ROOT


APP = ROOT / "examples" / "space" / "app.py"


# What would hide that the app writes where it should not.
HIDING = ("GRADIO_", "TORCHINDUCTOR", "PYTHONDONTWRITEBYTECODE", "XDG_", "HF_HOME")


@contextmanager
def serve(model, folder, *flags, app=APP, log=None, end=signal.SIGTERM, **variables):
    """
    The page as a user starts it, with all temporary files in a folder of ours; yields its address. It may log no
    traceback. Without a model, the variables name it; without an app, `dit-hf space` is run. A list that is given
    receives the lines of the log. A signal ends it.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(HIDING)}
    environment |= {"TMPDIR": str(folder), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"} | variables
    program = [app] if app else ["-m", "dit_hf.space.command"]
    named = ["--pretrained_model_name_or_path", str(model)] if model else []
    command = [sys.executable, *program, *named, *flags]
    lines = [] if log is None else log
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=folder
    ) as server:
        reader = threading.Thread(target=lambda: lines.extend(server.stdout), daemon=True)  # or it would wait for one
        try:
            for line in server.stdout:
                lines.append(line)
                if found := re.search(r"http://[\d.]+:\d+", line):
                    reader.start()
                    yield found[0]
                    break
            else:
                raise AssertionError("".join(lines))
        finally:
            server.send_signal(end)
            try:
                assert server.wait(60) == 0
            finally:
                server.kill()  # or leaving `Popen` would wait for one that hangs
    reader.join()
    assert "Traceback" not in (log := "".join(lines)), log
