"""Networks that turn images into features, each with its name, a checksum of its weights and its resize rule.

Shapes: `B` batch, `N` images, `H W` pixels, `D` pooled channels, `S` values of a spatial map, `K` classes.

A metric only compares with values of the same extractor, weights and resize rule; the rule alone changes a Fréchet
distance by a factor of ten.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from ..data.fingerprints import checksum
from ..data.pixels import normalize_pixels
from ..files import check_file, reading, writing
from .features import EfficientNetLite0


EFFICIENTNET, INCEPTION, PRECOMPUTED = "efficientnet-lite0", "inception", "precomputed"
# The second one checks what the first was used to choose.
EFFICIENTNETS = {EFFICIENTNET: 0, "efficientnet-lite2": 2}
PARTS = ("features", "spatial", "logits")
KNOWN = ("extractor", "image_size", "checksum", "digest")  # in the metadata of a file of features
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Of the last map, as ADM's sFID takes the first 7 of Inception's.
SPATIAL_CHANNELS = 7


@dataclass
class Features:
    """
    The output of an extractor for a set of images.

    Args:
        features (`torch.Tensor` of shape `(N, D)`): Pooled.
        spatial (`torch.Tensor` of shape `(N, S)`, *optional*): For sFID.
        logits (`torch.Tensor` of shape `(N, K)`, *optional*): For Inception Score.
        extractor (`dict`): Name, weights, resize rule.
        labels (`list[str]`, *optional*): Class names of the images; they are not saved.
        image_size (`tuple[int, int]`, *optional*): Height and width of the images before the extractor's resize.
        digest (`str`, *optional*): A hash of the images' pixels, which tells that a cached file is theirs.
    """

    features: torch.Tensor
    spatial: torch.Tensor | None
    logits: torch.Tensor | None
    extractor: dict[str, Any]
    labels: list[str] | None = None
    image_size: tuple[int, int] | None = None
    digest: str | None = None

    @property
    def parts(self) -> list[str]:
        """Which of `features`, `spatial`, `logits` there are."""
        return [name for name in PARTS if getattr(self, name) is not None]

    def is_of(self, extractor: dict[str, Any]) -> bool:
        """Whether they compare with features of an extractor."""
        return self.extractor == extractor

    def select(self, rows: torch.Tensor) -> "Features":
        """Those of some images: rows `(n,)`, int64."""
        tensors: dict[str, Any] = {name: getattr(self, name)[rows] for name in self.parts}
        labels = None if self.labels is None else [self.labels[row] for row in rows.tolist()]
        return replace(self, **tensors, labels=labels)

    def save(self, path: str | Path) -> None:
        """Writes a `.safetensors` that `Features.load` and `--feature_extractor precomputed` read."""
        tensors = {name: getattr(self, name).contiguous() for name in self.parts}
        metadata = {"extractor": json.dumps(self.extractor), "image_size": json.dumps(self.image_size)}
        metadata["checksum"] = json.dumps(_checksum(tensors))
        if self.digest is not None:
            metadata["digest"] = json.dumps(self.digest)
        with writing(path) as partial:
            save_file(tensors, partial, metadata=metadata)

    @classmethod
    def join(cls, parts: list["Features"]) -> "Features":
        """Those of several batches, in order."""
        tensors: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in parts[0].parts}
        return replace(parts[0], **tensors, labels=None)

    @classmethod
    def load(cls, path: str | Path) -> "Features":
        """Reads a `.safetensors` with `features` and perhaps `spatial`, `logits`; `ValueError` names a bad file."""
        check_file(path)
        with reading(path, "features"), safe_open(path, "pt") as file:
            names = [name for name in PARTS if name in file.keys()]  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in names}
            metadata = {name: json.loads(text) for name, text in (file.metadata() or {}).items() if name in KNOWN}
        if "features" not in tensors:
            raise ValueError(f"{path} has no tensor `features`.")
        for name, tensor in tensors.items():
            fits = tensor.ndim == 2 and 0 not in tensor.shape and tensor.dtype in FLOATING
            if not fits or not torch.isfinite(tensor).all():
                raise ValueError(f"{path}: `{name}` is not (images, channels) of finite floating-point numbers.")
        counts = {name: len(tensor) for name, tensor in tensors.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"{path} has tensors of different numbers of images: {counts}.")
        if "checksum" in metadata and metadata["checksum"] != _checksum(tensors):
            raise ValueError(f"{path} is damaged: its values are not those of its checksum. Delete it.")
        described, size = metadata.get("extractor") or {}, metadata.get("image_size")
        if not isinstance(described, dict) or not isinstance(described.get("name", ""), str):
            raise ValueError(f"{path}: `extractor` in its metadata must be a JSON object with a `name`.")
        if size is not None and not (isinstance(size, list) and [type(side) for side in size] == [int, int]):
            raise ValueError(f"{path}: `image_size` in its metadata must be a list of height and width.")
        extractor = {"name": PRECOMPUTED} | described
        parts = (tensors["features"], tensors.get("spatial"), tensors.get("logits"))
        size = None if size is None else (size[0], size[1])
        return cls(*parts, extractor, image_size=size, digest=metadata.get("digest"))


def _checksum(tensors):
    """A hash of names, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


class Extractor(nn.Module):
    """
    A network that maps images `(B, 3, H, W)` in [-1, 1] to a dictionary of its `parts`.

    Attributes:
        parts (`tuple[str, ...]`): Of `"features"`, `"spatial"`, `"logits"`.
        description (`dict`): Name, checksum of the weights, resize rule.
    """

    parts: tuple[str, ...]
    description: dict[str, Any]


class EfficientNetExtractor(Extractor):
    """EfficientNet-Lite: pooled last map, its first 7 channels flattened, ImageNet logits."""

    parts = PARTS

    def __init__(self, resolution: int = 112, name: str = EFFICIENTNET):
        super().__init__()
        self.network = EfficientNetLite0(resolution, EFFICIENTNETS[name])
        rule = f"{resolution}×{resolution}, bicubic, antialias, clamped, (x - 127) / 128"
        self.description = {"name": name, "weights": checksum(self)[:16], "resize": rule}

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images `(B, 3, H, W)` in [-1, 1] to `features` `(B, 1280)`, `spatial` `(B, S)`, `logits` `(B, 1000)`."""
        last_map = self.network.last_map(images)
        pooled = last_map.mean(dim=(2, 3))
        logits = self.network.network._fc(pooled)
        return {"features": pooled, "spatial": last_map[:, :SPATIAL_CHANNELS].flatten(1), "logits": logits}


class VisionModel(nn.Module):
    """A vision model of transformers, frozen, and how it wants its images."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, name: str):
        super().__init__()
        try:
            from transformers import AutoImageProcessor, AutoModel
        except ModuleNotFoundError as error:
            raise ImportError(f"{__name__} needs transformers: pip install 'dit_hf[evaluate]'.") from error
        with reading(name, "a vision model of transformers"):
            model = AutoModel.from_pretrained(name)
            self.model = getattr(model, "vision_model", model).eval().requires_grad_(False)
            processor = AutoImageProcessor.from_pretrained(name)
            for statistic in ("mean", "std"):
                values = torch.tensor(getattr(processor, f"image_{statistic}")).view(1, 3, 1, 1)
                self.register_buffer(statistic, values, persistent=False)
            size = getattr(processor, "crop_size", None) or processor.size
            self.side = size.get("height") or size["shortest_edge"]

    @torch.no_grad()
    def forward(self, images: torch.Tensor):
        """Images `(B, 3, H, W)` in [-1, 1] to the model's output."""
        images = F.interpolate(images, size=(self.side, self.side), mode="bicubic", antialias=True).clamp(-1, 1)
        return self.model(pixel_values=((images + 1) / 2 - self.mean) / self.std)


class TransformersExtractor(Extractor):
    """A vision model of transformers (DINOv2 …): its class token, or the mean of its patches where it has none."""

    parts = ("features",)

    def __init__(self, name: str):
        super().__init__()
        self.network = VisionModel(name)
        last_words = {parameter.split(".")[-1] for parameter, _ in self.network.named_parameters()}
        self.has_class_token = not last_words.isdisjoint(("cls_token", "class_embedding"))
        mean, std = (
            [round(value, 4) for value in part.flatten().tolist()] for part in (self.network.mean, self.network.std)
        )
        rule = f"{self.network.side}×{self.network.side}, bicubic, antialias, clamped, mean {mean}, std {std}"
        self.description = {"name": str(name), "weights": checksum(self)[:16], "resize": rule}

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images `(B, 3, H, W)` in [-1, 1] to `features` `(B, D)`."""
        hidden = self.network(images).last_hidden_state
        if hidden.ndim == 4:  # a convolutional network's map
            return {"features": hidden.mean(dim=(2, 3))}
        # Not `pooler_output`: where a checkpoint has none, transformers draws one at random.
        return {"features": hidden[:, 0] if self.has_class_token else hidden.mean(dim=1)}


class InceptionExtractor(Extractor):
    """The Inception network of published FID, through torch-fidelity where it is installed."""

    parts = PARTS

    def __init__(self, weights: str | Path):
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except (ImportError, RuntimeError) as error:
            raise ValueError(
                f"The Inception network needs torch-fidelity, which does not import here: {error}"
            ) from error
        with reading(weights, "the Inception network's weights"):
            # Checked first, as torch-fidelity would run what is pickled in the file.
            torch.load(weights, map_location="cpu", weights_only=True)
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], str(weights)
            )
        self.network.eval().requires_grad_(False)
        # ADM's spatial features: TensorFlow's `mixed_6/conv`, whose channels come first in the block's output.
        self.network.Mixed_6d.register_forward_hook(self._keep_spatial)
        rule = "299×299, TensorFlow 1's bilinear, of 8-bit images"
        self.description = {"name": INCEPTION, "weights": checksum(self)[:16], "resize": rule}

    def _keep_spatial(self, block, inputs, output):
        # Channels last, as in ADM's statistics.
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images `(B, 3, H, W)` in [-1, 1] to `features` `(B, 2048)`, `spatial` `(B, 2023)`, `logits` `(B, 1008)`."""
        pixels = ((images + 1) * 127.5).round().to(torch.uint8)
        features, logits = self.network(pixels)
        return {"features": features, "spatial": self._spatial, "logits": logits}


def load_extractor(name: str, weights: str | Path | None = None, resolution: int = 112) -> Extractor:
    """
    An extractor by name.

    Args:
        name (`str`):
            `"efficientnet-lite0"`, `"efficientnet-lite2"`, `"inception"`, or a vision model of transformers by id or
            folder.
        weights (`str` or `Path`, *optional*): The TensorFlow-ported Inception weights.
        resolution (`int`, defaults to 112): Pixels per side that EfficientNet-Lite resizes images to.

    Returns:
        `Extractor`

    Raises:
        ValueError: if there is no such extractor, or what it needs is missing.
    """
    if name == INCEPTION and weights is None:
        raise ValueError("The Inception extractor needs --extractor_weights, the file of TensorFlow-ported weights.")
    if name != INCEPTION and weights is not None:
        raise ValueError(f"--extractor_weights has no effect on the extractor {name!r}; it is for {INCEPTION}.")
    if name == INCEPTION:
        check_file(weights)  # type: ignore[arg-type]
    try:
        if name in EFFICIENTNETS:
            return EfficientNetExtractor(resolution, name)
        if name == INCEPTION:
            return InceptionExtractor(weights)  # type: ignore[arg-type]
    except ImportError as error:
        raise ValueError(str(error)) from error
    try:
        return TransformersExtractor(name)
    except ImportError as error:
        raise ValueError(str(error)) from error
    except ValueError as error:
        raise ValueError(
            f"{name!r} is not an extractor: not {', '.join(EFFICIENTNETS)} or {INCEPTION}, nor a vision model: {error}"
        ) from error


def extract(images: torch.Tensor, extractor: Extractor, batch_size: int = 64) -> Features:
    """
    Features of 8-bit images, one batch after the other.

    Args:
        images (`torch.Tensor` of shape `(N, 3, H, W)`): uint8.
        extractor (`Extractor`): From [`load_extractor`].
        batch_size (`int`, defaults to 64): Images at once.

    Returns:
        `Features`: on the CPU, without labels.

    Raises:
        ValueError: if the extractor returns values that are not finite.
    """
    device = next(extractor.parameters()).device
    parts = [extractor(normalize_pixels(batch.to(device))) for batch in images.split(batch_size)]
    found = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
    if bad := [name for name, tensor in found.items() if not torch.isfinite(tensor).all()]:
        raise ValueError(f"The extractor gives `{bad[0]}` that are not finite.")
    size = (images.shape[-2], images.shape[-1])
    description = dict(extractor.description)
    return Features(found["features"], found.get("spatial"), found.get("logits"), description, image_size=size)
