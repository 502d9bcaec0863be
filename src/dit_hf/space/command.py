"""Opens the Gradio page of a class-conditional pipeline, as a server on this machine or as a Space on the Hub.

    dit-hf space --pretrained_model_name_or_path emoji64

Expected: the page answers at http://127.0.0.1:7860 after a few seconds.
"""

import atexit
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from ..command_line import ArgumentParser, run


def parse_args():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pretrained_model_name_or_path",
        "--model",
        default=os.environ.get("DIT_HF_MODEL", "emoji64"),
        help="Folder, Hub id, or bundled name; by default the environment variable DIT_HF_MODEL.",
    )
    parser.add_argument(
        "--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), help="Address to listen at."
    )
    parser.add_argument("--port", type=int, help="Port; the first free one from 7860 if not given.")
    parser.add_argument("--queue_size", type=int, default=64, help="Sets that may wait; more are turned away.")
    parser.add_argument("--max_minutes", type=float, default=5.0, help="A set that would take longer is refused.")
    return parser.parse_args()


def isolate() -> Path:
    """
    Keeps gradio and torch, which are imported only later, to one temporary folder that is removed at the end, and from
    reporting to anyone.
    """
    folder = Path(tempfile.mkdtemp(prefix="dit_hf-space-")).resolve()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("GRADIO_RUN_HISTORY", "False")
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "torch"))
    os.environ.setdefault("MPLCONFIGDIR", str(folder / "matplotlib"))  # gradio imports it
    return folder


def main():
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder is removed then too
    folder = isolate()
    from .page import ImageGenerator, Page, build

    page = Page(ImageGenerator(args.pretrained_model_name_or_path, args.max_minutes), folder)
    atexit.register(page.end)
    build(page, args.queue_size).launch(
        server_name=args.host, server_port=args.port, footer_links=["api"], max_file_size=1
    )


if __name__ == "__main__":
    run(main)
