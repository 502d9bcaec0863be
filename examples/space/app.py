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


# Before gradio is imported: nothing is reported to anyone, and all that is written lies in one folder that goes at the end.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
FOLDER = Path(tempfile.mkdtemp(prefix="dit_hf-space-")).resolve()
os.environ["GRADIO_TEMP_DIR"] = str(FOLDER)
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(FOLDER / "torch"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)

import gradio as gr  # noqa: E402
from studio import (  # noqa: E402
    MAX_IMAGES,
    MAX_SEED,
    MAX_STEPS,
    Settings,
    Studio,
    read_settings,
    save_picture,
)

from dit_hf.command_line import run  # noqa: E402
from dit_hf.optimization import SPEED_PRESETS  # noqa: E402


QUEUE_SIZE = 64
# The presets that set what the controls set; compiling is nothing for a page where every set has another size.
FEW_STEPS = [name for name, preset in SPEED_PRESETS.items() if preset.solver]
# The page's controls, in the order in which the handlers take them.
CONTROLS = (
    "class_labels",
    "images",
    "seed",
    "random_seed",
    "steps",
    "guidance_scale",
    "guidance_start",
    "guidance_end",
)
CONTROLS += ("sampler", "mix_with", "mix_share")
INTRODUCTION = """# {name}
Pictures of a class, drawn by a Diffusion Transformer. Choose one or more classes and press **Generate**; the same settings
give the same pictures, and the snippet below draws them in Python."""


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
        labels = [class_labels] if isinstance(class_labels, str) else list(class_labels or [])
        settings = Settings(
            class_labels=labels,
            images=_whole(images),
            seed=random.randint(0, MAX_SEED) if random_seed else _whole(seed),
            steps=_whole(steps),
            guidance_scale=_number(guidance_scale),
            guidance_start=_number(guidance_start),
            guidance_end=_number(guidance_end),
            sampler=sampler,
            mix_with=mix_with or "",
            mix_share=_number(mix_share),
        )
        try:
            self.studio.check(settings)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        session = request.session_hash or ""
        drawing = self._running[session] = Drawing(threading.Event(), threading.Event())
        try:
            yield from self._draw(settings, drawing.stop)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        except Exception as error:
            raise gr.Error("This set could not be drawn; try fewer images or other settings.") from error
        finally:
            drawing.stop.set()
            drawing.ended.set()
            if self._running.get(session) is drawing:
                del self._running[session]

    def _draw(self, settings, stop):
        seed, snippet = settings.seed, self.studio.snippet(settings)
        yield gr.skip(), "Waiting for its turn …", seed, snippet
        for drawn in self.studio.draw(settings, stop):
            if drawn.finished:
                count = f"Pictures: {len(drawn.pictures)}, steps: {settings.steps}, seed: {seed}."
                yield self._files(drawn.pictures, settings), count, seed, snippet
            else:
                yield drawn.pictures, f"Step {drawn.calls} of {drawn.of}", seed, snippet
        if stop.is_set():
            yield gr.skip(), "Cancelled.", seed, snippet

    def _files(self, pictures, settings):
        """Pictures as PNGs with their settings, and their captions."""
        files = []
        for picture, name in zip(pictures, settings.labels, strict=True):
            path = FOLDER / f"{uuid.uuid4().hex}.png"
            save_picture(picture, settings, self.studio.model, path)
            files.append((str(path), name.split(",")[0]))
        return files

    def speed(self, name):
        """The controls of a preset."""
        return self.studio.speed_settings(name) if name in FEW_STEPS else [gr.skip()] * 4

    def cancel(self, request: gr.Request):
        """Ends what this visitor is having drawn; until it has ended, the browser ignores another click on Generate."""
        if drawing := self._running.get(request.session_hash or ""):
            drawing.stop.set()
            drawing.ended.wait(timeout=10)
        return "Cancelled."

    def end(self):
        """Stops whatever is being drawn, and waits for it."""
        for drawing in list(self._running.values()):
            drawing.stop.set()
        self.studio.wait()

    def reuse(self, chosen):
        """The controls as they were for a picture of this server."""
        path = Path(chosen or "").resolve()
        if FOLDER not in path.parents:
            raise gr.Error("Click a picture first.", print_exception=False)
        try:
            settings = asdict(read_settings(path))
        except OSError as error:
            raise gr.Error("This picture is gone.", print_exception=False) from error
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return [settings.get(name, False) for name in CONTROLS]


def _whole(value):
    """A whole number as such; what is none stays for the check to refuse."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _number(value):
    """A number, or one that is out of every bound."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else float("nan")


def build(page: Page) -> gr.Blocks:
    """The page."""
    studio, classes = page.studio, page.studio.classes
    with gr.Blocks(title="dit_hf", delete_cache=(600, 600)) as blocks:
        gr.Markdown(INTRODUCTION.format(name=Path(studio.model).name))
        with gr.Row():
            with gr.Column(min_width=300):
                controls = first_controls(classes) | further_controls(studio)
                with gr.Row():
                    generate = gr.Button("Generate", variant="primary", min_width=120)
                    cancel = gr.Button("Cancel", min_width=120)
                gr.Examples([[[name]] for name in classes[:9]], [controls["class_labels"]], label="Examples")
            with gr.Column(min_width=300):
                gallery = gr.Gallery(label="Pictures", columns=4, format="png", interactive=False)
                status = gr.Textbox(label="Status", interactive=False)
                reuse = gr.Button("Reuse settings of the chosen picture")
                snippet = gr.Code(label="Python", language="python", interactive=False)
        chosen = gr.State("")
        inputs = [controls[name] for name in CONTROLS]
        drawing = generate.click(
            page.generate, inputs, [gallery, status, controls["seed"], snippet], api_name="generate"
        )
        cancel.click(page.cancel, None, status, cancels=[drawing], queue=False, api_name="cancel")
        filled = [controls[name] for name in ("steps", "sampler", "guidance_start", "guidance_end")]
        controls["speed"].input(page.speed, controls["speed"], filled, api_visibility="private", queue=False)
        gallery.select(_chosen, None, chosen, api_visibility="private", queue=False)
        reuse.click(page.reuse, chosen, inputs, api_visibility="private", queue=False)
    return blocks.queue(max_size=QUEUE_SIZE, default_concurrency_limit=1)


def first_controls(classes):
    """What everyone sets."""
    return {
        "class_labels": class_choice(classes),
        "speed": gr.Dropdown(
            [("as set below", ""), *FEW_STEPS], value="", label="Speed", info="Sets steps, sampler and guidance."
        ),
        "images": gr.Slider(1, MAX_IMAGES, value=4, step=1, label="Images of each class"),
        "seed": gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED),
        "random_seed": gr.Checkbox(False, label="Random", info="A new seed for every set."),
        "steps": gr.Slider(1, MAX_STEPS, value=30, step=1, label="Steps"),
    }


def class_choice(classes):
    """Several classes; a program may also send one as it is."""
    choice = gr.Dropdown(classes, value=[classes[0]], multiselect=True, max_choices=MAX_IMAGES, label="Class")
    # The handler checks the names, with shorter words than a list of a thousand classes.
    choice.preprocess = lambda payload: [payload] if isinstance(payload, str) else payload
    return choice


def further_controls(studio):
    """What some set."""
    with gr.Accordion("Guidance, sampler, mixing", open=False):
        return {
            "guidance_scale": gr.Slider(
                0, studio.max_scale, value=min(4, studio.max_scale), step=0.1, label="Guidance scale"
            ),
            "guidance_start": gr.Slider(0, 1, value=0, step=0.05, label="Guidance from"),
            "guidance_end": gr.Slider(0, 1, value=1, step=0.05, label="Guidance until"),
            "sampler": gr.Dropdown(studio.samplers, value=studio.samplers[0], label="Sampler"),
            "mix_with": gr.Dropdown(
                [("none", ""), *((name, name) for name in studio.classes)], value="", label="Mix with"
            ),
            "mix_share": gr.Slider(0, 1, value=0.5, step=0.05, label="Share of the mixed class"),
        }


def _chosen(event: gr.SelectData):
    return event.value["image"]["path"]


def main():
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # the folder goes then too
    page = Page(Studio(args.model))
    atexit.register(page.end)
    build(page).launch(server_name=args.host, server_port=args.port, footer_links=["api"], max_file_size=1)


if __name__ == "__main__":
    run(main)
