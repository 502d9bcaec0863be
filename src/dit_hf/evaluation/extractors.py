"""Networks that turn images into features, each with its name, a checksum of its weights and its resize rule.

Shapes: `B` batch, `N` images, `H W` pixels, `D` pooled channels, `S` values of a spatial map, `K` classes.

A figure is only comparable with figures of the same extractor, weights and resize rule; the rule alone moves it by a factor
of ten.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..data.fingerprints import checksum
from ..data.pixels import normalize_pixels
from .features import EfficientNetLite0


EFFICIENTNET, INCEPTION, PRECOMPUTED = "efficientnet-lite0", "inception", "precomputed"
# Of the last map, as ADM's sFID takes the first 7 of Inception's.
SPATIAL_CHANNELS = 7


@dataclass
class Features:
    """
    What an extractor says of images.

    Args:
        features (`torch.Tensor` of shape `(N, D)`): Pooled.
        spatial (`torch.Tensor` of shape `(N, S)`, *optional*): For sFID.
        logits (`torch.Tensor` of shape `(N, K)`, *optional*): For Inception Score.
        extractor (`dict`): Name, weights, resize rule.
        labels (`list[str]`, *optional*): Class names of the images; they are not saved.
    """

    features: torch.Tensor
    spatial: torch.Tensor | None
    logits: torch.Tensor | None
    extractor: dict[str, Any]
    labels: list[str] | None = None

    def select(self, rows: torch.Tensor) -> "Features":
        """Those of some images: rows `(n,)`, int64."""
        parts = (getattr(self, name) for name in ("features", "spatial", "logits"))
        features, spatial, logits = (None if part is None else part[rows] for part in parts)
        labels = None if self.labels is None else [self.labels[row] for row in rows.tolist()]
        return Features(features, spatial, logits, self.extractor, labels)  # type: ignore[arg-type]

    def save(self, path: str | Path) -> None:
        """Writes a `.safetensors` that `Features.load` and `--feature_extractor precomputed` read."""
        tensors = {"features": self.features, "spatial": self.spatial, "logits": self.logits}
        partial = Path(path).with_name(f"partial-{Path(path).name}")
        partial.parent.mkdir(parents=True, exist_ok=True)
        given = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
        save_file(given, partial, metadata={"extractor": json.dumps(self.extractor)})
        partial.replace(path)

    @classmethod
    def join(cls, parts: list["Features"]) -> "Features":
        """Those of several batches, in order."""
        columns = ([getattr(part, name) for part in parts] for name in ("features", "spatial", "logits"))
        features, spatial, logits = (None if column[0] is None else torch.cat(column) for column in columns)
        return cls(features, spatial, logits, parts[0].extractor)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path) -> "Features":
        """Reads a `.safetensors` with `features` and perhaps `spatial`, `logits`; `ValueError` names a bad file."""
        try:
            with safe_open(path, "pt") as file:
                names = [name for name in ("features", "spatial", "logits") if name in file.keys()]  # noqa: SIM118
                tensors = {name: file.get_tensor(name) for name in names}
                extractor = json.loads((file.metadata() or {}).get("extractor", "{}"))
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(f"{path} can't be read as features: {error}") from error
        if "features" not in tensors:
            raise ValueError(f"{path} has no tensor `features`.")
        for name, tensor in tensors.items():
            if tensor.ndim != 2 or not tensor.is_floating_point() or not torch.isfinite(tensor).all():
                raise ValueError(f"{path}: `{name}` is not (images, channels) of finite floating-point numbers.")
        counts = {name: len(tensor) for name, tensor in tensors.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"{path} has tensors of different numbers of images: {counts}.")
        return cls(
            tensors["features"], tensors.get("spatial"), tensors.get("logits"), extractor or {"name": PRECOMPUTED}
        )


class EfficientNetExtractor(nn.Module):
    """EfficientNet-Lite0: pooled last map, its first 7 channels flattened, ImageNet logits."""

    def __init__(self, resolution: int = 112):
        super().__init__()
        self.network = EfficientNetLite0(resolution)
        rule = f"{resolution}×{resolution}, bicubic, antialias, clamped, (x - 127) / 128"
        self.description = {"name": EFFICIENTNET, "weights": checksum(self)[:16], "resize": rule}

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
        from transformers import AutoImageProcessor, AutoModel

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


class TransformersExtractor(nn.Module):
    """A vision model of transformers (DINOv2 …): its class token, or the mean of its patches where it has none."""

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


class InceptionExtractor(nn.Module):
    """The Inception network of published FID, through torch-fidelity where it is installed."""

    def __init__(self, weights: str | Path):
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except (ImportError, RuntimeError) as error:
            raise ValueError(
                f"The Inception network needs torch-fidelity, which does not import here: {error}"
            ) from error
        try:
            torch.load(
                weights, map_location="cpu", weights_only=True
            )  # torch-fidelity would run what is pickled in it
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], str(weights)
            )
        except (OSError, RuntimeError, UnpicklingError) as error:
            raise ValueError(f"{weights} can't be read as the Inception network's weights: {error}") from error
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
        """Images `(B, 3, H, W)` in [-1, 1] to `features` `(B, 2048)`, `spatial` `(B, 2023)` and `logits` `(B, 1008)`."""
        pixels = ((images + 1) * 127.5).round().to(torch.uint8)
        features, logits = self.network(pixels)
        return {"features": features, "spatial": self._spatial, "logits": logits}


def load_extractor(name: str, weights: str | Path | None = None, resolution: int = 112) -> nn.Module:
    """
    An extractor by name.

    Args:
        name (`str`): `"efficientnet-lite0"`, `"inception"`, or a vision model of transformers by id or folder.
        weights (`str` or `Path`, *optional*): The TensorFlow-ported Inception weights.
        resolution (`int`, defaults to 112): What EfficientNet-Lite0 sees.

    Returns:
        `nn.Module`: maps images to a dictionary with `features`, and describes itself in `description`.

    Raises:
        ValueError: if there is no such extractor, or what it needs is missing.
    """
    if name == EFFICIENTNET:
        try:
            return EfficientNetExtractor(resolution)
        except ImportError as error:
            raise ValueError(str(error)) from error
    if name == INCEPTION:
        if weights is None:
            raise ValueError(
                "The Inception extractor needs --extractor_weights, the file of TensorFlow-ported weights."
            )
        return InceptionExtractor(weights)
    try:
        return TransformersExtractor(name)
    except (ImportError, OSError, AttributeError, TypeError, ValueError, KeyError) as error:
        raise ValueError(
            f"{name!r} is no extractor: neither {EFFICIENTNET}, {INCEPTION} nor a vision model: {error}"
        ) from error


def extract(images: torch.Tensor, extractor: nn.Module, batch_size: int = 64) -> Features:
    """
    Features of 8-bit images.

    Args:
        images (`torch.Tensor` of shape `(N, 3, H, W)`): uint8.
        extractor (`nn.Module`): From [`load_extractor`].
        batch_size (`int`, defaults to 64): Images at once.

    Returns:
        `Features`
    """
    device = next(extractor.parameters()).device
    parts = [extractor(normalize_pixels(batch).to(device)) for batch in images.split(batch_size)]
    found = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
    if bad := [name for name, tensor in found.items() if not torch.isfinite(tensor).all()]:
        raise ValueError(f"The extractor gives `{bad[0]}` that are not finite.")
    return Features(found["features"], found.get("spatial"), found.get("logits"), dict(extractor.description))  # type: ignore[arg-type]
