"""Whether a converted autoencoder computes what its checkpoint computes, by an independent forward pass."""

import torch

from ...seeds import seeded_generator
from ..parity import Parity, compare_weights, largest, output_distance
from .loading import Autoencoder, original_autoencoder


def measure_autoencoder_parity(autoencoder: Autoencoder, vae, seed: int = 0) -> Parity:
    """
    Compares an autoencoder with an independent forward pass of the original weights, on seeded inputs.

    Args:
        autoencoder (`Autoencoder`): From [`dit_hf.checkpoints.autoencoders.parse_autoencoder`].
        vae (`AutoencoderKL` or `AutoencoderRAE`): The converted autoencoder.
        seed (`int`, defaults to 0): Of the inputs.

    Returns:
        `Parity`

    Raises:
        ValueError: if the two do not belong together.
    """
    family, config = autoencoder.family, autoencoder.config
    if type(vae).__name__ != family.model.__name__:
        raise ValueError(f"The checkpoint is an {family.model.__name__} and the folder holds {type(vae).__name__}.")
    for name, value in config.items():
        given = tuple(vae.config[name]) if isinstance(value, tuple) else vae.config[name]
        if given != value:
            raise ValueError(
                f"The checkpoint has {name}={value!r} and the autoencoder {given!r}: they are not the same."
            )
    back = original_autoencoder(vae)
    if mismatch := [key for key, weight in autoencoder.original.items() if weight.shape != back[key].shape]:
        raise ValueError(
            f"{mismatch[0]!r} has shape {tuple(autoencoder.original[mismatch[0]].shape)} in the checkpoint and "
            f"{tuple(back[mismatch[0]].shape)} in the autoencoder: they are not the same."
        )
    tables = family.computed_tables(back)
    with torch.no_grad():
        outputs, reference = family.outputs(config, vae, seeded_generator(seed, 0))
        distances = [
            largest(
                output_distance(output.float(), expected)
                for output, expected in zip(outputs, reference(weights), strict=True)
            )
            for weights in (autoencoder.original | tables, back)
        ]
    renamed = autoencoder.original.keys() - tables.keys()
    compared = compare_weights(autoencoder.original, back, renamed)
    return Parity(forward=distances[0], forward_back=distances[1], **compared, dtype=vae.dtype)
