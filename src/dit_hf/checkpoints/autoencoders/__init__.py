"""Autoencoders of original code bases: one class per code base, used to read and to write."""

from .family import NORM_NUM_GROUPS, AutoencoderFamily, AutoencoderHints
from .loading import AUTOENCODERS, Autoencoder, build_autoencoder, original_autoencoder, parse_autoencoder


__all__ = [
    "AUTOENCODERS",
    "NORM_NUM_GROUPS",
    "Autoencoder",
    "AutoencoderFamily",
    "AutoencoderHints",
    "build_autoencoder",
    "original_autoencoder",
    "parse_autoencoder",
]
