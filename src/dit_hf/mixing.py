"""Images between two classes: the label's embedding is interpolated towards another's."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from .pipeline_dit_class_cond import is_finite


# The mixtures that are on in this thread or task; a model's hooks are seen by all.
_ACTIVE: ContextVar[tuple[object, ...]] = ContextVar("active mixtures", default=())


@contextmanager
def mix_classes(transformer, label: int, weight: float) -> Iterator[None]:
    """
    A context manager in which another class is mixed into every class that the model is given, except guidance's null
    class. Other threads that use the model at the same time are not affected.

    Args:
        transformer (`DiTTransformer2DModel`): The model.
        label (`int`): Class to mix in.
        weight (`float`): From 0 (the class of the call) to 1 (the class to mix in).

    Raises:
        ValueError: if there is no such class, the weight is out of range, or the model is compiled with its label
        table.

    Example:

        >>> from dit_hf import DiTClassCondPipeline, mix_classes
        >>> pipe = DiTClassCondPipeline.from_bundled("emoji64")
        >>> with mix_classes(pipe.transformer, pipe.labels["lion"], 0.5):
        ...     image = pipe("cat", num_inference_steps=4).images[0]
    """
    if not hasattr(transformer, "class_embed"):
        raise ValueError(f"`transformer` is a {type(transformer).__name__}; pass the model, `pipe.transformer`.")
    num_classes = transformer.config.num_classes
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < num_classes:
        raise ValueError(
            f"`label` is {label!r}; it must be an id from 0 to {num_classes - 1}, such as `pipe.labels[name]`."
        )
    if not is_finite(weight) or not 0 <= weight <= 1:
        raise ValueError(f"`weight` is {weight!r}; it must be from 0 to 1.")
    compiled = transformer._compiled_call_impl
    wrapped = hasattr(transformer, "_orig_mod")  # what `torch.compile(model)` returns
    if wrapped or (compiled is not None and not getattr(compiled, "embeds_classes_eagerly", False)):
        raise ValueError(
            "The transformer is compiled and its classes can't be mixed; call `dit_hf.restore(pipe)` first, or use "
            "the model as it was before `torch.compile`."
        )

    mixture = object()

    def mix(table, inputs, embedding):
        if mixture not in _ACTIVE.get():
            return None
        given = (inputs[0] != num_classes).unsqueeze(-1)
        other = table.forward(inputs[0].new_full((1,), label))  # not its weight, which adapters and offloading change
        return embedding.lerp(other.to(embedding.dtype), weight).where(given, embedding)

    _ACTIVE.set((*_ACTIVE.get(), mixture))
    handle = transformer.class_embed.register_forward_hook(mix)
    try:
        yield
    finally:
        handle.remove()
        _ACTIVE.set(tuple(other for other in _ACTIVE.get() if other is not mixture))
