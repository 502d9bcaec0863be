"""Images between two classes: the label's embedding is interpolated towards another's."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def mix_classes(transformer, label: int, weight: float) -> Iterator[None]:
    """
    Inside of it, every class that the model is given is mixed with another; guidance's null class is not.

    Args:
        transformer (`DiTTransformer2DModel`): The model.
        label (`int`): Class to mix in.
        weight (`float`): From 0, the given class alone, to 1, the other alone.

    Raises:
        ValueError: if there is no such class, the weight is out of range, or the model is compiled with its label
        table.

    Example:

        >>> from dit_hf import DiTClassCondPipeline, mix_classes
        >>> pipe = DiTClassCondPipeline.from_bundled("emoji64")
        >>> with mix_classes(pipe.transformer, pipe.labels["food"], 0.4):
        ...     image = pipe("smileys", num_inference_steps=4).images[0]
    """
    num_classes = transformer.config.num_classes
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < num_classes:
        raise ValueError(f"`label` is {label!r}; the model's classes are 0 to {num_classes - 1}.")
    if not 0 <= weight <= 1:
        raise ValueError(f"`weight` is {weight!r}; it must be from 0 to 1.")
    compiled = transformer._compiled_call_impl
    if compiled is not None and not getattr(compiled, "embeds_classes_eagerly", False):
        raise ValueError(
            "The transformer is compiled and its classes can't be mixed; call `dit_hf.restore(pipe)` first."
        )

    def mix(table, inputs, embedding):
        given = (inputs[0] != num_classes).unsqueeze(-1)
        other = table.forward(inputs[0].new_full((1,), label))  # not its weight, which adapters and offloading change
        return embedding.lerp(other.to(embedding.dtype), weight).where(given, embedding)

    handle = transformer.class_embed.register_forward_hook(mix)
    try:
        yield
    finally:
        handle.remove()
