#!/usr/bin/env python
"""A page that draws with any class-conditional pipeline of dit_hf: a Gradio Space, or a server on this machine.

    python examples/space/app.py --model emoji64

Expected: the page answers at http://127.0.0.1:7860 after a few seconds.
"""

import argparse
import atexit
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple


# Before gradio is imported: nothing is reported to anyone, no browser keeps what was drawn, and all that is written lies
# in one folder that goes at the end.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("GRADIO_RUN_HISTORY", "False")
FOLDER = Path(tempfile.mkdtemp(prefix="dit_hf-space-")).resolve()
os.environ["GRADIO_TEMP_DIR"] = str(FOLDER)
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(FOLDER / "torch"))
os.environ.setdefault("MPLCONFIGDIR", str(FOLDER / "matplotlib"))  # gradio imports it
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)

sys.dont_write_bytecode = True  # the folder of the app stays as it is

import gradio as gr  # noqa: E402
from settings import (  # noqa: E402
    LABELS,
    MAX_IMAGES,
    MAX_SEED,
    MAX_STEPS,
    OWN_SAMPLER,
    Settings,
    read_controls,
    save_picture,
)
from studio import MAX_MINUTES, Studio  # noqa: E402

from dit_hf.command_line import run  # noqa: E402
from dit_hf.optimization import SPEED_PRESETS  # noqa: E402


# The presets that set what the controls set; compiling is nothing for a page where every set has another size.
FEW_STEPS = [name for name, preset in SPEED_PRESETS.items() if preset.solver]
INTRODUCTION = """# {name}
Pictures of a class, drawn by a Diffusion Transformer. Choose one or more classes and press **Generate**; the same settings
give the same pictures, and the snippet below draws them in Python. Every picture is a PNG with its settings in it."""


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--model", default=os.environ.get("DIT_HF_MODEL", "emoji64"), help="Bundled name, folder, or Hub id."
    )
    parser.add_argument(
        "--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), help="Address to listen at."
    )
    parser.add_argument("--port", type=int, help="Port; the first free one from 7860 if not given.")
    parser.add_argument("--queue_size", type=int, default=64, help="Sets that may wait; more are turned away.")
    parser.add_argument(
        "--max_minutes", type=float, default=MAX_MINUTES, help="A set that would take longer is refused."
    )
    return parser.parse_args()


class Drawing(NamedTuple):
    """One that is under way: to be ended, and whether it has."""

    stop: threading.Event
    ended: threading.Event


class Page:
    """The page's handlers; one a server."""

    def __init__(self, studio: Studio):
        self.studio = studio
        self._running: dict[str, Drawing] = {}

    def generate(
        self,
        class_labels,
        images,
        seed,
        random_seed,
        steps,
        guidance_scale,
        guidance_start,
        guidance_end,
        sampler,
        mix_with,
        mix_share,
        request: gr.Request,
    ):
        """Draws, with previews on the way: pictures, what is going on, the seed that was used, Python for the same."""
        if random_seed is True:
            seed = random.randint(0, MAX_SEED)
        values = [class_labels, images, seed, random_seed, steps, guidance_scale, guidance_start, guidance_end]
        try:
            settings = self._checked(*values, sampler, mix_with, mix_share)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        session = request.session_hash or ""
        drawing = self._running[session] = Drawing(threading.Event(), threading.Event())
        try:
            yield from self._draw(settings, drawing.stop)
        except Exception as error:
            self._running.pop(session, None)
            known = isinstance(error, ValueError)
            message = str(error) if known else "This set could not be drawn; try fewer images or other settings."
            raise gr.Error(message, print_exception=not known) from error
        else:
            self._running.pop(session, None)
        finally:  # what the browser's Cancel has closed stays, as `cancel` may come to look for it only then
            drawing.stop.set()
            drawing.ended.set()

    def _checked(self, *values):
        settings = read_controls(*values)
        self.studio.check(settings)
        return settings

    def _draw(self, settings, stop):
        """What the page shows, and at the end the settings, for Reuse."""
        seed, snippet = settings.seed, self.studio.snippet(settings)
        captions = [name.split(",")[0] for name in settings.labels]
        yield gr.skip(), "Waiting for its turn …", seed, snippet, gr.skip()
        for drawn in self.studio.draw(settings, stop):
            if drawn.finished:
                count = f"Pictures: {len(drawn.pictures)}, steps: {settings.steps}, seed: {seed}."
                files = self._files(drawn.pictures, settings)
                yield list(zip(files, captions, strict=True)), count, seed, snippet, settings
            else:
                unit = "Step" if drawn.of == settings.steps else "Call"
                status = f"{unit} {drawn.calls} of {drawn.of}"
                yield list(zip(drawn.pictures, captions, strict=False)), status, seed, snippet, gr.skip()
        if stop.is_set():
            yield gr.skip(), "Cancelled.", seed, snippet, gr.skip()

    def _files(self, pictures, settings):
        """Pictures as PNGs with their settings."""
        paths = [FOLDER / f"{uuid.uuid4().hex}.png" for _ in pictures]
        for index, (picture, path) in enumerate(zip(pictures, paths, strict=True)):
            save_picture(picture, settings, index, self.studio.model, path)
        return [str(path) for path in paths]

    def describe(self, *values):
        """Python for the controls as they are, or what is wrong with them."""
        try:
            return self.studio.snippet(self._checked(*values))
        except ValueError as error:
            return f"# {error}"

    def speed(self, name):
        """The controls of a preset."""
        return self.studio.speed_settings(name) if name in FEW_STEPS else [gr.skip()] * 4

    def cancel(self, request: gr.Request):
        """Ends what this visitor is having drawn; until it has ended, the browser ignores another click on Generate."""
        drawing = self._running.pop(request.session_hash or "", None)
        if drawing is None:
            return "Nothing is being drawn."
        drawing.stop.set()
        drawing.ended.wait(timeout=10)
        return "Cancelled."

    def leave(self, request: gr.Request):
        """Ends the drawing of a visitor who has closed the page."""
        if drawing := self._running.pop(request.session_hash or "", None):
            drawing.stop.set()

    def end(self):
        """Stops whatever is being drawn, waits for it, and draws nothing more."""
        for drawing in list(self._running.values()):
            drawing.stop.set()
        self.studio.close()

    def reuse(self, settings: Settings | None):
        """The controls as they were for the last finished set, no speed preset, and what is going on."""
        if settings is None:
            return [gr.skip()] * (len(LABELS) + 1) + ["Draw a set first."]
        controls = asdict(settings) | {"random_seed": False}
        return [*(controls[name] for name in LABELS), "", f"Settings of the set with seed {settings.seed}."]


def build(page: Page, queue_size: int) -> gr.Blocks:
    """The page."""
    studio = page.studio
    with gr.Blocks(title="dit_hf", delete_cache=(600, 600)) as blocks:
        gr.Markdown(INTRODUCTION.format(name=Path(studio.model).name))
        with gr.Row():
            with gr.Column(min_width=300):
                controls = first_controls(studio.classes) | further_controls(studio)
                with gr.Row():
                    generate = gr.Button("Generate", variant="primary", min_width=120)
                    cancel = gr.Button("Cancel", min_width=120)
                names, rows = examples(studio)
                gr.Examples(rows, [controls[name] for name in names], label="Examples", visible_columns=[0, 1, 2, 3])
            with gr.Column(min_width=300):
                gallery = gr.Gallery(label="Pictures", columns=4, format="png", interactive=False)
                status = status_line()
                reuse = gr.Button("Reuse settings of the last set")
                snippet = gr.Code(label="Python", language="python", interactive=False)
                # What a program gets; the page's snippet goes by the controls.
                drawn_by = gr.Code(label="Python", language="python", visible=False)
        finished = gr.State(None)
        inputs = [controls[name] for name in LABELS]
        outputs = [gallery, status, controls["seed"], drawn_by, finished]
        # Here and below, inputs come as they were sent: gradio's own checks are long-winded, or end in a traceback.
        drawing = generate.click(
            page.generate, inputs, outputs, api_name="generate", preprocess=False, show_progress_on=gallery
        )
        hidden = {"api_visibility": "private", "queue": False, "preprocess": False}
        drawing.failure(lambda: "Not drawn.", None, status, **hidden)
        cancel.click(page.cancel, None, status, cancels=[drawing], queue=False, api_name="cancel")
        blocks.unload(page.leave)
        filled = [controls[name] for name in ("steps", "sampler", "guidance_start", "guidance_end")]
        controls["speed"].input(page.speed, controls["speed"], filled, **hidden)
        reuse.click(page.reuse, finished, [*inputs, controls["speed"], status], **hidden)
        # When the page is opened, and whenever a control changes.
        gr.on(None, page.describe, inputs, snippet, show_progress="hidden", trigger_mode="always_last", **hidden)
    return blocks.queue(max_size=queue_size, default_concurrency_limit=1, api_open=False)


def status_line():
    """One line that a screen reader reads out whenever it changes."""
    announce = "element.setAttribute('role', 'status')"
    look = {"html_template": "Status: ${value}", "container": True, "padding": True}
    return gr.HTML("", label="Status", elem_id="status", js_on_load=announce, **look)


def examples(studio):
    """Controls, and rows of them: as the page opens, in few steps, and mixed with another class."""
    first, second, third = (studio.classes * 3)[:3]
    steps, sampler, start, end = studio.speed_settings(FEW_STEPS[0])
    rows = [
        [[first], 30, OWN_SAMPLER, "", 0.5, 0, 1],
        [[second], steps, sampler, "", 0.5, start, end],
        [[third], 30, OWN_SAMPLER, first, 0.5, 0, 1],
    ]
    return ("class_labels", "steps", "sampler", "mix_with", "mix_share", "guidance_start", "guidance_end"), rows


def first_controls(classes):
    """What everyone sets."""
    return {
        "class_labels": gr.Dropdown(
            classes, value=[classes[0]], multiselect=True, max_choices=MAX_IMAGES, label=LABELS["class_labels"]
        ),
        "speed": gr.Dropdown(
            [("as set below", ""), *FEW_STEPS], value="", label="Speed", info="Sets steps, sampler and guidance."
        ),
        "images": gr.Slider(1, MAX_IMAGES, value=4, step=1, label=LABELS["images"]),
        "seed": gr.Number(0, label=LABELS["seed"], precision=0, minimum=0, maximum=MAX_SEED),
        "random_seed": gr.Checkbox(False, label=LABELS["random_seed"], info="A new seed for every set."),
        "steps": gr.Slider(1, MAX_STEPS, value=30, step=1, label=LABELS["steps"]),
    }


def further_controls(studio):
    """What some set."""
    scale = min(4, studio.max_scale)
    own = f"model's own ({type(studio.pipe.scheduler).__name__.removesuffix('Scheduler')})"
    samplers = [(own if name == OWN_SAMPLER else name, name) for name in studio.samplers]
    others = [("none", ""), *((name, name) for name in studio.classes)]
    with gr.Accordion("Guidance, sampler, mixing", open=False):
        return {
            "guidance_scale": gr.Slider(0, studio.max_scale, value=scale, step=0.1, label=LABELS["guidance_scale"]),
            "guidance_start": gr.Slider(0, 1, value=0, step=0.05, label=LABELS["guidance_start"]),
            "guidance_end": gr.Slider(0, 1, value=1, step=0.05, label=LABELS["guidance_end"]),
            "sampler": gr.Dropdown(samplers, value=OWN_SAMPLER, label=LABELS["sampler"]),
            "mix_with": gr.Dropdown(others, value="", label=LABELS["mix_with"]),
            "mix_share": gr.Slider(0, 1, value=0.5, step=0.05, label=LABELS["mix_share"]),
        }


def main():
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # the folder goes then too
    page = Page(Studio(args.model, args.max_minutes))
    atexit.register(page.end)
    build(page, args.queue_size).launch(
        server_name=args.host, server_port=args.port, footer_links=["api"], max_file_size=1
    )


if __name__ == "__main__":
    run(main)
