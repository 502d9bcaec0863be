"""Features of sets of images, kept by the content of the images and the extractor."""

from pathlib import Path

from tqdm import tqdm

from .extractors import Extractor, Features, extract
from .sources import ImageSource


def image_features(source: ImageSource, extractor: Extractor, cache_dir: str | Path, batch_size: int = 64) -> Features:
    """
    Features of a set of images, read from the cache if the same images have been through the same extractor.

    Args:
        source (`ImageSource`): The images.
        extractor (`Extractor`): From [`load_extractor`].
        cache_dir (`str` or `Path`): Created if it does not exist.
        batch_size (`int`, defaults to 64): Images at once.

    Returns:
        `Features`: without labels.

    Raises:
        ValueError: if the images can't be used, or the file in the cache is damaged.
    """
    digest = source.digest()
    path = Path(cache_dir) / f"{digest[:24]}-{extractor.description['weights']}.safetensors"
    if path.exists():
        features = Features.load(path)
        own = features.digest == digest and len(features.features) == source.count
        if own and features.is_of(extractor.description):
            features.image_size = source.image_size
            return features
    parts = []
    with tqdm(total=source.count, desc=f"features of {source.source}", unit="image", mininterval=5) as progress:
        for batch in source.batches(batch_size):
            parts.append(extract(batch, extractor))
            progress.update(len(batch))
    features = Features.join(parts)
    features.digest = digest
    features.save(path)
    return features
