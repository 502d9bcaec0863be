"""What the Space draws with: a pipeline, checked settings, and pictures that come step by step.

Shapes: `B` images, `C` channels, `h w` latent size.
"""

import json
import queue
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin

from dit_hf import DiTClassCondPipeline, make_scheduler, mix_classes
from dit_hf.optimization import SPEED_PRESETS
from dit_hf.seeds import seeded_generator


MAX_STEPS, MAX_IMAGES, MAX_SCALE, MAX_SEED = 250, 32, 20.0, 2**31 - 1
MAX_WORK = 2000  # images times steps of a set: the next visitor waits for it
PREVIEWS, PREVIEWED_IMAGES = 8, 8
# What each calls the shift of the noise levels that a model was trained with.
FLOW_SAMPLERS = {"flow_euler": "shift", "flow_heun": "shift", "flow_dpm++": "flow_shift", "flow_unipc": "flow_shift"}
DIFFUSION_SAMPLERS = ("dpm++", "unipc", "ddim", "ddpm")
OWN_SAMPLER = "default"
METADATA = "dit_hf"
# What a sampler must know of the diffusion that a model was trained with.
DIFFUSION = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")


class Cancelled(Exception):
    """The visitor wants no more."""


@dataclass(frozen=True)
class Settings:
    """All that a set of pictures depends on, but the model."""

    class_labels: list[str]
    images: int = 1
    seed: int = 0
    steps: int = 30
    guidance_scale: float = 3.0
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    sampler: str = OWN_SAMPLER
    mix_with: str = ""
    mix_share: float = 0.0

    @property
    def labels(self) -> list[str]:
        """The class of each picture."""
        return [name for name in self.class_labels for _ in range(self.images)]


class Drawn(NamedTuple):
    """Where a drawing stands; a solver of higher order takes more than one call of the model a step."""

    calls: int
    of: int
    pictures: list[Image.Image]
    finished: bool


class Studio:
    """
    Draws with one pipeline, for one visitor at a time.

    Args:
        model (`str`): Name of a bundled pipeline, folder, or Hub id.
    """

    def __init__(self, model: str):
        self.model = model
        bundled = "/" not in model and not Path(model).exists()
        self.loader = "from_bundled" if bundled else "from_pretrained"
        self.pipe = getattr(DiTClassCondPipeline, self.loader)(model)
        self.pipe.to("cuda" if torch.cuda.is_available() else "cpu")
        self.pipe.set_progress_bar_config(disable=True)
        count = self.pipe.transformer.config.num_classes
        names = [self.pipe.id2label.get(index, str(index)) for index in range(count)]
        self.classes = [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names)]
        config = self.pipe.transformer.config
        if self.pipe.vae is None and config.in_channels not in (1, 3):
            raise ValueError(f"{model} draws {config.in_channels} channels and has no VAE to make pictures of them.")
        self.max_scale = MAX_SCALE if config.class_dropout_prob > 0 else 1.0  # no null class, no guidance
        self._overrides = self._sampler_overrides()
        self._schedulers = {OWN_SAMPLER: self.pipe.scheduler}
        self._schedulers |= {name: make_scheduler(name, **options) for name, options in self._overrides.items()}
        self.samplers = list(self._schedulers)
        self._lock = threading.Lock()
        self._colours = self._fit_colours()

    def _sampler_overrides(self):
        """Samplers that fit the model, and what its own scheduler says of its diffusion or flow."""
        own = self.pipe.scheduler.config
        if self.pipe.is_flow_matching:
            shift = own.get("shift", own.get("flow_shift", 1.0))
            return {name: {option: shift} for name, option in FLOW_SAMPLERS.items()}
        known = {name: own[name] for name in DIFFUSION if own.get(name) is not None}
        overrides = {name: dict(known) for name in DIFFUSION_SAMPLERS}
        if not self.pipe.transformer.config.learn_sigma:
            overrides["ddpm"]["variance_type"] = "fixed_large"
        return overrides

    def speed_settings(self, name: str) -> tuple[int, str, float, float]:
        """Steps, sampler and guidance interval of a preset of `dit_hf.optimize` that has them."""
        preset = SPEED_PRESETS[name]
        solver = f"flow_{preset.solver}" if self.pipe.is_flow_matching else preset.solver
        return preset.num_inference_steps, solver, *preset.guidance_interval

    def check(self, settings: Settings) -> None:
        """`ValueError` if anything is out of its bounds: requests come from anywhere."""
        if not settings.class_labels:
            raise ValueError("Choose at least one class.")
        if len(settings.class_labels) > MAX_IMAGES:
            raise ValueError(f"Choose at most {MAX_IMAGES} classes.")
        others = [settings.mix_with] if settings.mix_with else []
        for name in [*settings.class_labels, *others]:
            if name not in self.classes:
                raise ValueError(f"There is no class {str(name)[:60]!r}.")
        if settings.sampler not in self.samplers:
            raise ValueError(
                f"There is no sampler {str(settings.sampler)[:60]!r}; choose of {', '.join(self.samplers)}."
            )
        bounds = {"images": (1, MAX_IMAGES), "seed": (0, MAX_SEED), "steps": (1, MAX_STEPS)}
        for name, (low, high) in bounds.items():
            value = getattr(settings, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{name.capitalize()} must be a whole number from {low} to {high}.")
        if len(settings.class_labels) * settings.images > MAX_IMAGES:
            raise ValueError(f"Classes times images are at most {MAX_IMAGES}.")
        if len(settings.labels) * settings.steps > MAX_WORK:
            raise ValueError(f"Images times steps are at most {MAX_WORK}.")
        shares = {"guidance_scale": self.max_scale, "guidance_start": 1.0, "guidance_end": 1.0, "mix_share": 1.0}
        for name, high in shares.items():
            if not 0 <= getattr(settings, name) <= high:
                raise ValueError(f"{name.replace('_', ' ').capitalize()} must be from 0 to {high:g}.")
        if settings.guidance_start >= settings.guidance_end:
            raise ValueError("Guidance must start before it ends.")

    def draw(self, settings: Settings, stop: threading.Event) -> Iterator[Drawn]:
        """
        Draws pictures.

        Args:
            settings (`Settings`): Checked first.
            stop (`threading.Event`): Once set, drawing ends after the step under way.

        Returns:
            `Iterator[Drawn]`: previews, some eight times; last, unless it was stopped, the pictures.
        """
        self.check(settings)
        events: queue.Queue = queue.Queue()
        threading.Thread(target=self._work, args=(settings, stop, events), daemon=True).start()
        while not stop.is_set():
            try:
                event = events.get(timeout=0.1)
            except queue.Empty:
                continue
            if isinstance(event, BaseException):
                raise event
            if not stop.is_set():
                yield event
            if event.finished:
                return

    def _work(self, settings, stop, events):
        def on_step(pipe, index, timestep, tensors):
            if stop.is_set():
                raise Cancelled
            if (index + 1) % -(-pipe.num_timesteps // PREVIEWS) == 0:
                previews = self.preview(tensors["latents"][:PREVIEWED_IMAGES])
                events.put(Drawn(index + 1, pipe.num_timesteps, previews, finished=False))
            return {}

        try:
            with self._lock, torch.inference_mode():
                if stop.is_set():
                    return
                self.pipe.scheduler = self._schedulers[settings.sampler]
                images = self._call(settings, on_step)
            events.put(Drawn(1, 1, images, finished=True))
        except Cancelled:
            self.pipe.maybe_free_model_hooks()
        except Exception as error:  # the visitor's thread raises it
            events.put(error)

    def wait(self) -> None:
        """Returns once nothing is being drawn."""
        with self._lock:
            pass

    def _call(self, settings, on_step):
        labels = [self.classes.index(name) for name in settings.class_labels]
        generators = [seeded_generator(settings.seed, index) for index in range(len(settings.labels))]
        mixed = nullcontext()
        if settings.mix_with and settings.mix_share > 0:
            mixed = mix_classes(self.pipe.transformer, self.classes.index(settings.mix_with), settings.mix_share)
        with mixed:
            return self.pipe(
                labels,
                num_images_per_label=settings.images,
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance_scale,
                guidance_interval=(settings.guidance_start, settings.guidance_end),
                generator=generators,
                callback_on_step_end=on_step,
            ).images

    def preview(self, latents: torch.Tensor) -> list[Image.Image]:
        """Latents `(B, C, h, w)` as small pictures, by one matrix product instead of the decoder."""
        latents = latents.float().cpu()
        if self._colours is not None:
            latents = torch.einsum("bchw,cr->brhw", F.pad(latents, (0, 0, 0, 0, 0, 1), value=1.0), self._colours)
        pixels = ((latents.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        factor = self.pipe.vae_scale_factor
        pictures = [Image.fromarray(image if image.shape[-1] == 3 else image[..., 0]) for image in pixels]
        return [picture.resize((picture.width * factor, picture.height * factor)) for picture in pictures]

    def _fit_colours(self):
        """The linear map `(C + 1, 3)` from latents to colours that fits some decoded pictures best; None without a VAE."""
        if self.pipe.vae is None:
            return None
        labels = list(range(min(4, len(self.classes))))
        generators = [seeded_generator(0, index) for index in labels]
        options = {"num_inference_steps": 4, "guidance_scale": 1.0}
        kept = {}
        images = self.pipe(
            labels,
            generator=generators,
            output_type="pt",
            callback_on_step_end=lambda pipe, index, timestep, tensors: kept.update(tensors) or {},
            **options,
        ).images
        latents = kept["latents"].float().cpu()
        colours = F.adaptive_avg_pool2d(images.float().cpu() * 2 - 1, latents.shape[-2:])
        rows = F.pad(latents, (0, 0, 0, 0, 0, 1), value=1.0).movedim(1, -1).flatten(0, -2)
        return torch.linalg.lstsq(rows, colours.movedim(1, -1).flatten(0, -2)).solution

    def snippet(self, settings: Settings) -> str:
        """Python that draws the same pictures."""
        labels = [self.classes.index(name) for name in settings.class_labels]
        mixes = bool(settings.mix_with and settings.mix_share > 0)
        own = settings.sampler == OWN_SAMPLER
        imported = "DiTClassCondPipeline" + ("" if own else ", make_scheduler") + (", mix_classes" if mixes else "")
        call = f"""images = pipe(
    {labels},  # {", ".join(name.split(",")[0] for name in settings.class_labels)}
    num_images_per_label={settings.images},
    num_inference_steps={settings.steps},
    guidance_scale={settings.guidance_scale},
    guidance_interval=({settings.guidance_start}, {settings.guidance_end}),
    generator=[seeded_generator({settings.seed}, index) for index in range({len(settings.labels)})],
).images"""
        if mixes:
            label = self.classes.index(settings.mix_with)
            body = "\n".join(f"    {line}" for line in call.splitlines())
            call = f"with mix_classes(pipe.transformer, {label}, {settings.mix_share}):\n{body}"
        options = [f"{name}={value!r}" for name, value in self._overrides.get(settings.sampler, {}).items()]
        recipe = ", ".join([repr(settings.sampler), *options])
        sampler = "" if own else f"pipe.scheduler = make_scheduler({recipe})\n"
        return f"""from dit_hf import {imported}
from dit_hf.seeds import seeded_generator

pipe = DiTClassCondPipeline.{self.loader}({self.model!r})
{sampler}{call}"""


def save_picture(image: Image.Image, settings: Settings, model: str, path: Path) -> None:
    """Writes a PNG that knows how it was drawn."""
    metadata = PngImagePlugin.PngInfo()
    metadata.add_text(METADATA, json.dumps(asdict(settings) | {"model": model}))
    image.save(path, pnginfo=metadata)


def read_settings(path: str | Path) -> Settings:
    """Settings of a PNG of [`save_picture`]; `ValueError` if it has none."""
    with Image.open(path) as image:
        text = getattr(image, "text", {}).get(METADATA)
    if text is None:
        raise ValueError("This picture has no settings in it.")
    values = json.loads(text)
    names = [field.name for field in fields(Settings)]
    if not isinstance(values, dict) or any(name not in values for name in names):
        raise ValueError("This picture was not drawn by this page.")
    return Settings(**{name: values[name] for name in names})
