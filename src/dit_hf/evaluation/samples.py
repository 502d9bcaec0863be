"""Sampling for evaluation: image i depends on (seed, i) alone.

Shapes: `N` images, `H W` pixels.
"""

import torch

from ..seeds import seeded_generator


def sample_images(pipe, labels: torch.Tensor, seed: int, batch_size: int = 48, **options) -> torch.Tensor:
    """
    One image a label; image i depends on (seed, i) alone.

    Args:
        pipe (`DiTClassCondPipeline`): The pipeline.
        labels (`torch.Tensor` of shape `(N,)`, int64): Class ids.
        seed (`int`): Of the noise.
        batch_size (`int`, defaults to 48): Images drawn at once.
        options: For the pipeline: `guidance_scale`, `num_inference_steps` …

    Returns:
        `torch.Tensor` of shape `(N, 3, H, W)`, uint8, on the CPU.
    """
    batches = []
    for start in range(0, len(labels), batch_size):
        chosen = labels[start : start + batch_size].tolist()
        generators = [seeded_generator(seed, start + index) for index in range(len(chosen))]
        images = pipe(chosen, generator=generators, output_type="pt", **options).images
        batches.append((images * 255).round().to("cpu", torch.uint8))
    return torch.cat(batches)
