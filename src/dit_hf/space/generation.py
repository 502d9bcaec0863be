"""Image generation behind the Space: one pipeline, checked settings, previews on the way.

Shapes: `B` images, `C` channels, `h w` latent size.
"""

import queue
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image

from ..files import printable
from ..mixing import mix_classes
from ..optimization import SPEED_PRESETS, SpeedPreset, speed_preset
from ..pipeline import DiTClassCondPipeline
from ..pipeline_dit_class_cond import CALL_DEFAULTS, largest_scale, takes_jumps
from ..schedulers import make_scheduler, trained_options
from ..seeds import drawn_classes, seeded_generator
from .settings import MAX_STEPS, ONE_STEP, OWN_SAMPLER, Settings


MAX_SCALE = 20.0
MAX_LISTED, MAX_FOUND = 2500, 100  # classes that a page holds; more are searched for, and so many found
MAX_NAME = 200  # characters
JOINERS = "\u200c\u200d"  # of Persian words, of emoji
MAX_MINUTES = 5.0  # per set: the next visitor waits for it
PREVIEWS, PREVIEWED_IMAGES = 8, 8
OPENING_CLASSES, OPENING_SECONDS = 12, 30.0  # what the page shows first, unless it would take longer
FLOW_SAMPLERS = ("flow_euler", "flow_heun", "flow_dpm++", "flow_unipc")
JUMP_SAMPLERS = ("flow_lcm",)  # of flow maps; not all have learned the jumps that flow_map takes
DIFFUSION_SAMPLERS = ("dpm++", "unipc", "ddim", "ddpm")


class Cancelled(Exception):
    """The visitor has cancelled."""


class Progress(NamedTuple):
    """State of a generation; a solver of higher order calls the model more than once per step."""

    calls: int
    total_calls: int
    images: list[Image.Image]
    finished: bool


class ImageGenerator:
    """
    Generates with one pipeline, for one visitor at a time.

    Args:
        model (`str`): Folder, Hub id, or name of a bundled pipeline.
        max_minutes (`float`): A set that would take longer is refused.

    Raises:
        ValueError: if the model has neither a VAE nor image channels.
    """

    def __init__(self, model: str, max_minutes: float = MAX_MINUTES):
        self.max_minutes = max_minutes
        self.is_folder = Path(model).exists()
        self.model = Path(model).resolve().name if self.is_folder else model  # a folder's path is not published
        self.pipe = DiTClassCondPipeline.from_pretrained(model)
        self.pipe.to("cuda" if torch.cuda.is_available() else "cpu")
        self.pipe.set_progress_bar_config(disable=True)
        count = self.pipe.transformer.config.num_classes
        self.classes = shown_names([self.pipe.id2label.get(index, "") for index in range(count)])
        self._ids = {name: index for index, name in enumerate(self.classes)}
        config = self.pipe.transformer.config
        if self.pipe.vae is None and config.in_channels not in (1, 3):
            raise ValueError(f"{model} generates {config.in_channels} channels and has no VAE to decode them.")
        takes_guidance = config.class_dropout_prob > 0 and config.get("guidance_in_weights") is not True
        self.max_scale = MAX_SCALE if takes_guidance else 1.0
        self._overrides = self._sampler_overrides()
        self._schedulers = {OWN_SAMPLER: self.pipe.scheduler}
        self._schedulers |= {name: make_scheduler(name, **options) for name, options in self._overrides.items()}
        self.samplers = list(self._schedulers)
        self._lock = threading.Lock()
        self._presets: dict[str, SpeedPreset] = {name: speed_preset(self.pipe, name) for name in SPEED_PRESETS}
        self._measure()
        self.opening = self._opening_settings()
        self.opening_images = self._opening_images()

    @property
    def is_flow_map(self) -> bool:
        """Whether the model predicts mean velocities, so that it may take jumps."""
        return self.pipe.transformer.config.get("interval_embedding", False)

    @property
    def _recommended(self):
        return self.pipe.config.get("recommended_call") or {}

    def _sampler_overrides(self):
        """Samplers that fit the model, with the options of its own scheduler's diffusion or flow."""
        samplers = FLOW_SAMPLERS if self.pipe.is_flow_matching else DIFFUSION_SAMPLERS
        if self.is_flow_map:
            samplers = (*samplers, *JUMP_SAMPLERS)
        overrides = {name: trained_options(name, self.pipe.scheduler.config) for name in samplers}
        if "ddpm" in overrides and not self.pipe.transformer.config.get("learn_sigma"):
            overrides["ddpm"]["variance_type"] = "fixed_large"
        return overrides

    def _opening_settings(self):
        """An image of each of a few classes, as the pipeline recommends: what the page shows first."""
        call = self.pipe.resolve_call()
        if self.pipe._has_guided_jumps and takes_jumps(self.pipe.scheduler):
            # They ignore the guidance of the velocity, which the controls show for other samplers.
            call |= {name: value for name, value in self._recommended.items() if name.startswith("guidance")}
        start, end = call["guidance_interval"]
        return Settings(
            [self.classes[index] for index in drawn_classes(len(self.classes), OPENING_CLASSES)],
            steps=min(call["num_inference_steps"], MAX_STEPS),
            guidance_scale=min(largest_scale(call["guidance_scale"]), self.max_scale),
            guidance_start=start,
            guidance_end=end,
        )

    def _opening_images(self):
        if self.estimate(self.opening) > min(OPENING_SECONDS, 60 * self.max_minutes):
            return []
        *_, last = self.generate(self.opening, threading.Event())
        return last.images

    def find_classes(self, text: str = "", chosen: Iterable[str] = ()) -> list[str]:
        """
        Classes to choose from, as a browser can't hold any number of them.

        Args:
            text (`str`): A part of their names.
            chosen (`Iterable[str]`): Names that are listed first, as they are chosen already.

        Returns:
            `list[str]`: all if they are few, else some that fit.
        """
        if len(self.classes) <= MAX_LISTED:
            return self.classes
        first = [name for name in chosen if isinstance(name, str) and name in self._ids]
        found = (name for name in self.classes if text.casefold() in name.casefold() and name not in first)
        return [*first, *islice(found, MAX_FOUND)]

    @property
    def speeds(self) -> list[str]:
        """What `speed_settings` takes: the presets that have steps for this model, and one step for a flow map."""
        names = (name for name, preset in self._presets.items() if preset.solver)
        return [*names, *([ONE_STEP] if self.is_flow_map else [])]

    def speed_settings(self, name: str) -> list:
        """Steps, sampler and guidance interval of one of `speeds`."""
        if name == ONE_STEP:
            return [1, "flow_lcm", 0.0, 1.0]
        preset = self._presets[name]
        solver = f"flow_{preset.solver}" if self.pipe.is_flow_matching else preset.solver
        return [preset.num_inference_steps, solver, *(preset.guidance_interval or (0.0, 1.0))]

    def sampler_settings(self, name: str) -> list:
        """The recommended steps of a sampler of a flow map, which are fewer for jumps, and the guidance interval."""
        call = CALL_DEFAULTS | self._recommended
        steps = call["num_inference_steps"]
        if takes_jumps(self._schedulers[name]):
            steps = call.get("num_jumps", steps)
        return [min(steps, MAX_STEPS), self.opening.guidance_start, self.opening.guidance_end]

    def scale(self, settings: Settings) -> float:
        """The guidance scale of a set; jumps that were trained with guidance take none."""
        in_weights = self.pipe.transformer.config.get("guidance_in_weights")
        jumps = in_weights == "jumps" and takes_jumps(self._schedulers[settings.sampler])
        return 1.0 if jumps else settings.guidance_scale

    def check(self, settings: Settings) -> None:
        """Raises a `ValueError` if a value is out of its bounds, or the set would take too long."""
        settings.check(self._ids, self.samplers, self.max_scale)
        seconds = self.estimate(settings)
        if seconds > 60 * self.max_minutes:
            raise ValueError(f"This set would take about {seconds / 60:.0f} minutes; choose fewer images or steps.")

    def estimate(self, settings: Settings) -> float:
        """Seconds that a set takes, by the time that the first images took."""
        calls = settings.steps * self._schedulers[settings.sampler].order
        if self.scale(settings) != 1:
            calls *= 1 + settings.guidance_end - settings.guidance_start
        return len(settings.labels) * (calls * self._seconds_per_call + self._seconds_per_decoding)

    def generate(self, settings: Settings, stop: threading.Event) -> Iterator[Progress]:
        """
        Generates a set of images.

        Args:
            settings (`Settings`): Checked first.
            stop (`threading.Event`): Once set, generation ends after the current step.

        Returns:
            `Iterator[Progress]`: previews, about eight times; last, unless it was stopped, the images.

        Raises:
            ValueError: as [`check`].
        """
        self.check(settings)
        events: queue.Queue = queue.Queue()
        threading.Thread(target=self._work, args=(settings, stop, events), daemon=True).start()
        while not stop.is_set():
            try:
                event = events.get(timeout=0.1)
            except queue.Empty:
                continue
            if stop.is_set():
                return
            if isinstance(event, BaseException):
                raise event
            yield event
            if event.finished:
                return

    def _work(self, settings, stop, events):
        def on_step(pipe, index, timestep, tensors):
            if stop.is_set():
                raise Cancelled
            if (index + 1) % -(-pipe.num_timesteps // PREVIEWS) == 0:
                previews = self.preview(tensors["latents"][:PREVIEWED_IMAGES])
                events.put(Progress(index + 1, pipe.num_timesteps, previews, finished=False))
            return {}

        try:
            with self._lock, torch.inference_mode():
                if stop.is_set():
                    return
                self.pipe.scheduler = self._schedulers[settings.sampler]
                images = self._call(settings, on_step)
            events.put(Progress(1, 1, images, finished=True))
        except Cancelled:
            pass
        except Exception as error:  # the visitor's thread raises it
            events.put(error)

    def close(self) -> None:
        """Returns once nothing is being generated, and lets nothing be generated any more."""
        self._lock.acquire()

    def _call(self, settings, on_step):
        labels = [self._ids[name] for name in settings.class_labels]
        generators = [seeded_generator(settings.seed, index) for index in range(len(settings.labels))]
        mixed = nullcontext()
        if settings.mix_with and settings.mix_share > 0:
            mixed = mix_classes(self.pipe.transformer, self._ids[settings.mix_with], settings.mix_share)
        with mixed:
            return self.pipe(
                labels,
                num_images_per_label=settings.images,
                num_inference_steps=settings.steps,
                guidance_scale=self.scale(settings),
                guidance_interval=(settings.guidance_start, settings.guidance_end),
                generator=generators,
                callback_on_step_end=on_step,
            ).images

    def preview(self, latents: torch.Tensor) -> list[Image.Image]:
        """Latents `(B, C, h, w)` as rough images, by one matrix product instead of the decoder."""
        latents = latents.float().cpu()
        if self._colours is not None:
            latents = torch.einsum("bchw,cr->brhw", F.pad(latents, (0, 0, 0, 0, 0, 1), value=1.0), self._colours)
        pixels = ((latents.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        factor = self.pipe.vae_scale_factor
        images = [Image.fromarray(image if image.shape[-1] == 3 else image[..., 0]) for image in pixels]
        return [image.resize((image.width * factor, image.height * factor)) for image in images]

    def _measure(self):
        """Generates a few images, and fits what previews and estimates are computed from."""
        labels = list(range(min(4, len(self.classes))))
        latents, clock = [], [time.perf_counter()]

        def on_step(pipe, index, timestep, tensors):
            latents[:] = [tensors["latents"].float().cpu()]  # so that a GPU is waited for
            clock.append(time.perf_counter())
            return {}

        images = self.pipe(
            labels,
            num_inference_steps=4,
            guidance_scale=1.0,
            generator=[seeded_generator(0, index) for index in labels],
            output_type="pt",
            callback_on_step_end=on_step,
        ).images.cpu()
        clock.append(time.perf_counter())
        *calls, decoding = [(after - before) / len(labels) for before, after in pairwise(clock)]
        self._seconds_per_call, self._seconds_per_decoding = min(calls), decoding
        self._colours = None if self.pipe.vae is None else fit_colours(latents[0], images.float())

    def snippet(self, settings: Settings) -> str:
        """Python that generates the same images."""
        labels = [self._ids[name] for name in settings.class_labels]
        mixes = bool(settings.mix_with and settings.mix_share > 0)
        own = settings.sampler == OWN_SAMPLER
        imported = "DiTClassCondPipeline" + ("" if own else ", make_scheduler") + (", mix_classes" if mixes else "")
        call = f"""images = pipe(
    {labels},  # {", ".join(printable(name.split(",")[0]) for name in settings.class_labels)}
    num_images_per_label={settings.images},
    num_inference_steps={settings.steps},
    guidance_scale={self.scale(settings)},
    guidance_interval=({settings.guidance_start}, {settings.guidance_end}),
    generator=[seeded_generator({settings.seed}, index) for index in range({len(settings.labels)})],
).images"""
        if mixes:
            label = self._ids[settings.mix_with]
            body = "\n".join(f"    {line}" for line in call.splitlines())
            call = f"with mix_classes(pipe.transformer, {label}, {settings.mix_share}):\n{body}"
        options = [f"{name}={value!r}" for name, value in self._overrides.get(settings.sampler, {}).items()]
        recipe = ", ".join([repr(settings.sampler), *options])
        sampler = "" if own else f"pipe.scheduler = make_scheduler({recipe})\n"
        remark = "  # a folder of the server" if self.is_folder else ""
        return f"""from dit_hf import {imported}
from dit_hf.seeds import seeded_generator

pipe = DiTClassCondPipeline.from_pretrained({self.model!r}){remark}
{sampler}{call}"""


def shown_names(names: list[str]) -> list[str]:
    """
    Names of classes as the page shows them, each once: in one line, without control characters.

    Args:
        names (`list[str]`): By id; empty ones become the id.

    Returns:
        `list[str]`
    """
    spaced = (" ".join(name.split()) for name in names)
    lines = ["".join(c if c in JOINERS else printable(c) for c in name)[:MAX_NAME] for name in spaced]
    counts, taken, shown = Counter(lines), set(lines), []
    for index, line in enumerate(lines):
        name = line
        if not line or counts[line] > 1:
            name = f"{line} ({index})".strip() if line else str(index)
            while name in taken:
                name += f" ({index})"
            taken.add(name)
        shown.append(name)
    return shown


def fit_colours(latents: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """The linear map `(C + 1, 3)` from latents `(B, C, h, w)` to colours that fits their images in [0, 1] best."""
    colours = F.adaptive_avg_pool2d(images * 2 - 1, (latents.shape[-2], latents.shape[-1]))
    rows = F.pad(latents, (0, 0, 0, 0, 0, 1), value=1.0).movedim(1, -1).flatten(0, -2)
    return torch.linalg.lstsq(rows, colours.movedim(1, -1).flatten(0, -2)).solution
