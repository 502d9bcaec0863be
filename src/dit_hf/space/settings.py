"""The settings of a set of images: the controls they come from, their bounds, and the PNGs that hold them."""

import json
from collections.abc import Container
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image, PngImagePlugin

from .._version import __version__


MAX_STEPS, MAX_IMAGES, MAX_SEED = 250, 32, 2**31 - 1
OWN_SAMPLER = "default"
ONE_STEP = "1 step"
METADATA = "dit_hf"
# The controls: their names in the API, in the order in which the handlers take them, and their labels on the page.
LABELS = {
    "class_labels": "Class",
    "images": "Images of each class",
    "seed": "Seed",
    "random_seed": "Random",
    "steps": "Steps",
    "guidance_scale": "Guidance scale",
    "guidance_start": "Guidance from",
    "guidance_end": "Guidance until",
    "sampler": "Sampler",
    "mix_with": "Mix with",
    "mix_share": "Weight of the mixed class",
}


@dataclass(frozen=True)
class Settings:
    """Everything that a set of images depends on, except for the model; any value is possible until it is checked."""

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
        """The class of each image."""
        return [name for name in self.class_labels for _ in range(self.images)]

    def check(self, classes: Container[str], samplers: list[str], max_scale: float) -> None:
        """Raises a `ValueError` that names the control of a value out of bounds: requests come from anywhere."""
        self._check_names(classes, samplers)
        bounds = {"images": (1, MAX_IMAGES), "seed": (0, MAX_SEED), "steps": (1, MAX_STEPS)}
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{LABELS[name]} must be a whole number from {low} to {high}.")
        maxima = {"guidance_scale": max_scale, "guidance_start": 1.0, "guidance_end": 1.0, "mix_share": 1.0}
        for name, maximum in maxima.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= maximum:
                raise ValueError(f"{LABELS[name]} must be a number from 0 to {maximum:g}.")
        if self.guidance_start >= self.guidance_end:
            raise ValueError("Guidance must start before it ends.")
        if len(self.labels) > MAX_IMAGES:
            raise ValueError(f"Classes times images are at most {MAX_IMAGES}.")

    def _check_names(self, classes, samplers):
        if not isinstance(self.class_labels, list):
            raise ValueError(f"{LABELS['class_labels']} must be a name or a list of names.")
        if not self.class_labels:
            raise ValueError("Choose at least one class.")
        if len(self.class_labels) > MAX_IMAGES:
            raise ValueError(f"Choose at most {MAX_IMAGES} classes.")
        others = [] if self.mix_with == "" else [self.mix_with]
        for control, names in (("class_labels", self.class_labels), ("mix_with", others)):
            for name in names:
                if not isinstance(name, str) or name not in classes:
                    raise ValueError(f"{LABELS[control]}: there is no class {str(name)[:60]!r}.")
        if not isinstance(self.sampler, str) or self.sampler not in samplers:
            raise ValueError(f"There is no sampler {str(self.sampler)[:60]!r}; choose one of {', '.join(samplers)}.")


def read_controls(*values) -> Settings:
    """The controls' values in their order, as they come from a page or a program."""
    controls = dict(zip(LABELS, values, strict=True))
    if not isinstance(controls.pop("random_seed"), bool):
        raise ValueError(f"{LABELS['random_seed']} must be true or false.")
    names, other = controls["class_labels"], controls["mix_with"]
    controls["class_labels"] = [names] if isinstance(names, str) else names
    controls["mix_with"] = "" if other is None else other
    for name in ("images", "seed", "steps"):
        value = controls[name]  # 3.0 is whole too
        controls[name] = int(value) if isinstance(value, float) and value.is_integer() else value
    return Settings(**controls)


def save_image(image: Image.Image, settings: Settings, index: int, model: str, path: Path) -> None:
    """Writes a PNG that holds its settings; `index` is its number in the set, which its noise depends on."""
    metadata = PngImagePlugin.PngInfo()
    recorded = asdict(settings) | {"index": index, "model": model, "version": __version__}
    metadata.add_text(METADATA, json.dumps(recorded))
    image.save(path, pnginfo=metadata)
