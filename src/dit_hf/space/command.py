"""Opens the Gradio page of a class-conditional pipeline, as a server on this machine or as a Space on the Hub.

    dit-hf space --pretrained_model_name_or_path emoji64

Expected: the page answers at http://127.0.0.1:7860 after a few seconds.
"""

import atexit
import errno
import os
import shutil
import signal
import socket
import sys
import tempfile
from glob import escape
from pathlib import Path

from ..command_line import ArgumentParser, integer, real, run
from ..files import first_line, partial_path, remove, remove_leftovers


FIRST_PORT, PORTS = 7860, 100
# Gradio's own variables would share the page, serve other folders or start other servers; these few are read here.
GRADIO_VARIABLES = ("GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT", "GRADIO_ROOT_PATH")


def parse_args():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pretrained_model_name_or_path",
        "--model",
        default=os.environ.get("DIT_HF_MODEL") or "emoji64",
        help="Folder, Hub id, or bundled name; by default the environment variable DIT_HF_MODEL.",
    )
    parser.add_argument(
        "--host", default=os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1", help="Address to listen on."
    )
    parser.add_argument(
        "--port",
        type=integer(at_least=0, at_most=65535),
        default=os.environ.get("GRADIO_SERVER_PORT") or None,
        help="Port; 0 takes any free port. By default GRADIO_SERVER_PORT, or the first free port from 7860 on.",
    )
    parser.add_argument(
        "--queue_size",
        type=integer(at_least=1, at_most=1000),
        default=64,
        help="Number of sets that may wait, half of them of one address; more are refused.",
    )
    parser.add_argument(
        "--max_minutes", type=real(above=0, at_most=1440), default=5.0, help="A set that would take longer is refused."
    )
    return parser.parse_args()


def find_port(host: str, port: int | None) -> int:
    """
    A port that can be listened on.

    Args:
        host (`str`): Name or address of this machine.
        port (`int`, *optional*): 0 for any; if not given, the first free one from 7860.

    Returns:
        `int`

    Raises:
        ValueError: if there is none, or the host is none of this machine's.
    """
    tried = range(FIRST_PORT, FIRST_PORT + PORTS) if port is None else [port]
    for candidate in tried:
        try:
            family, kind, *_, place = socket.getaddrinfo(host.strip("[]"), candidate, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(place)
                return probe.getsockname()[1]
        except (OSError, UnicodeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            if getattr(error, "errno", None) != errno.EADDRINUSE:
                break
    raise ValueError(f"can't listen on --host {host} --port {tried[0]}: {reason}. Choose another one.")


def isolate() -> Path:
    """
    Keeps gradio and torch, which are imported only later, to one temporary folder that is removed at the end, and from
    reporting to anyone; removes what killed servers have left.
    """
    temporary = Path(tempfile.gettempdir())
    remove_leftovers(temporary)
    own = partial_path(temporary / "space").name
    for leftover in temporary.glob(f"{escape(own)}*"):  # a restarted container has the same processes
        remove(leftover)
    folder = Path(tempfile.mkdtemp(prefix=f"{own}-")).resolve()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if ignored := [name for name in os.environ if name.startswith("GRADIO_") and name not in GRADIO_VARIABLES]:
        print(f"Ignored, as this page takes its settings from flags: {', '.join(sorted(ignored))}.", flush=True)
    for name in (*ignored, "GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT"):
        os.environ.pop(name, None)
    (folder / "images").mkdir()
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder / "images")}
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "torch"))
    os.environ.setdefault("MPLCONFIGDIR", str(folder / "matplotlib"))  # gradio imports it
    return folder / "images"


def main():
    args = parse_args()
    port = find_port(args.host, args.port)
    for name in ("SIGTERM", "SIGHUP"):  # so that the folder is removed then too
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: sys.exit(0))
    folder = isolate()
    from .generation import ImageGenerator

    generator = ImageGenerator(args.pretrained_model_name_or_path, args.max_minutes)
    from starlette.middleware import Middleware

    from .page import CSS, Page, build
    from .requests import Gate

    page = Page(generator, folder, args.queue_size)
    gate = Middleware(Gate, blocks=(blocks := build(page)), clients=page.clients, folder=folder)
    try:
        blocks.launch(
            server_name=args.host,
            server_port=None if args.port is None else port,  # none: Gradio's choice, as others start meanwhile
            app_kwargs={"middleware": [gate]},
            footer_links=["api"],
            css=CSS,
            run_history=False,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            max_threads=args.queue_size + 64,  # sets that wait are known to Gradio as running
            state_session_capacity=1000,
        )
    finally:  # before Python waits for the threads that generate
        page.end()


if __name__ == "__main__":
    run(main)
