"""Model cards: what a published model is, how to use it, how it was trained and evaluated, and its limits."""

import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from diffusers.utils import logging
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download, try_to_load_from_cache

# `HTTPError` is the network library's, whichever of them this huggingface_hub uses.
from huggingface_hub.errors import EntryNotFoundError, HTTPError
from huggingface_hub.repocard_data import model_index_to_eval_results

from ..complexity import count_macs, describe_blocks
from ..files import check_file, check_links, first_line, printable, writing
from ..pipeline_dit_class_cond import shown
from ..transformer_dit import MIN_DIFFUSERS
from .connection import without_secrets, without_tokens


logger = logging.get_logger(__name__)

# Between these lines the text is ours and is written anew; all else on a card is its owner's.
START = "<!-- dit_hf: written by the package from here; write outside, edits inside are lost -->"
END = "<!-- dit_hf: to here -->"
TAGS = ["diffusers", "dit_hf", "class-conditional-image-generation", "diffusion-transformer"]
# The Hub has no pipeline tag for classes.
PIPELINE_TAG = "unconditional-image-generation"
# The card shows images of these names in the folder.
SAMPLES, LOSS = "samples.png", "loss.png"
PICTURES = {SAMPLES: "Samples, one row per class", LOSS: "Training loss"}
NAMES_SHOWN = 40
# Characters of a name or setting that are shown.
LONGEST = 200
MAX_CARD_BYTES = 2**24
HEADINGS = ("Use", "Classes", "Model", "Training", "Results", "Limits")


@dataclass(frozen=True)
class CardFacts:
    """
    Facts for a model card that can't be derived from the model.

    Args:
        license (`str`, *optional*): The Hub's identifier, such as `"apache-2.0"` or `"cc-by-nc-4.0"`.
        base_model (`str`, *optional*): Repository it was fine-tuned or converted from.
        datasets (`list[str]`): Repositories it was trained on.
        recipe (`dict`): Training settings, shown as a table.
        results (`list[EvalResult]`): Metrics.
        limits (`str`, *optional*): What fails, in Markdown.

    Raises:
        ValueError: naming the fact that has another type.

    Example:

        >>> from dit_hf.hub import CardFacts
        >>> facts = CardFacts(license="apache-2.0", datasets=["user/icons"], limits="Letters are not legible.")
    """

    license: str | None = None
    base_model: str | None = None
    datasets: list[str] = field(default_factory=list)
    recipe: dict = field(default_factory=dict)
    results: list[EvalResult] = field(default_factory=list)
    limits: str | None = None

    def __post_init__(self):
        for name, kind in {"license": str, "base_model": str | Path, "limits": str}.items():
            if not isinstance(value := getattr(self, name), kind | None):
                raise ValueError(f"`{name}` is a {type(value).__name__}; it must be text.")
        if not isinstance(self.recipe, Mapping):
            raise ValueError(f"`recipe` is a {type(self.recipe).__name__}; it must be a dictionary.")
        for name, kind in {"datasets": str | Path, "results": EvalResult}.items():
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or not all(isinstance(entry, kind) for entry in value):
                what = "EvalResult of huggingface_hub" if kind is EvalResult else "text"
                raise ValueError(f"`{name}` is {shown(value)}; it must be a list of {what}.")


def build_card(
    model, title: str, facts: CardFacts | None = None, known: ModelCard | None = None, files: Collection[str] = ()
) -> ModelCard:
    """
    A card for a pipeline or a transformer, new or on top of one that exists.

    Args:
        model (`DiTClassCondPipeline` or `DiTTransformer2DModel`): What is published.
        title (`str`): Heading, and what the example loads: a repository or a folder.
        facts (`CardFacts`, *optional*): Facts for the card that can't be derived from the model.
        known (`ModelCard`, *optional*):
            A card to update: its owner's text is kept, its metadata and what this package wrote but for what `facts`
            say anew; tags, data sets and results are joined.
        files (`Collection[str]`): What lies beside it; `samples.png` and `loss.png` are shown.

    Returns:
        `ModelCard`

    Raises:
        ValueError: if `facts` is something else.
    """
    facts = CardFacts() if facts is None else facts
    if not isinstance(facts, CardFacts):
        raise ValueError(f"`card` is a {type(facts).__name__}; it must be a dit_hf.hub.CardFacts.")
    data, results = _metadata(known)
    results = _join_results(results, facts.results)
    data |= {"library_name": "diffusers", "pipeline_tag": data.get("pipeline_tag") or PIPELINE_TAG}
    data["tags"] = _join(data.get("tags"), TAGS)
    if datasets := _join(data.get("datasets"), [_public(name) for name in facts.datasets]):
        data["datasets"] = datasets
    data |= {name: _public(value) for name in ("license", "base_model") if (value := getattr(facts, name))}
    if results:
        data |= {"eval_results": results, "model_name": data.get("model_name") or printable(title)}
    before, region, after = _split(known.text) if known is not None else ("", "", "")
    described = f"# {_inline(title)}\n\n{_describe(model, title, facts, results, region, files)}"
    generated = f"{START}\n{_publishable(described)}\n{END}"
    text = "\n\n".join(part for part in (before, generated, after) if part)
    return ModelCard(f"---\n{_publishable(ModelCardData(**data).to_yaml())}\n---\n\n{text}\n")


def join_cards(hub: ModelCard | None, folder: ModelCard | None) -> ModelCard | None:
    """
    The card on the Hub and the one in the folder that goes there.

    Args:
        hub (`ModelCard`, *optional*): Its owner's text stays, and what the other does not say.
        folder (`ModelCard`, *optional*):
            Newer: its metadata and what this package wrote go before; its owner's text is added if it is not there.

    Returns:
        `ModelCard`: or None, if there is neither.
    """
    if hub is None or folder is None:
        return hub or folder
    (old, old_results), (new, new_results) = _metadata(hub), _metadata(folder)
    data = old | new
    for name in ("tags", "datasets"):
        if joined := _join(old.get(name), new.get(name)):
            data[name] = joined
    if results := _join_results(old_results, new_results):
        data |= {"eval_results": results, "model_name": data.get("model_name") or "model"}
    before, old_region, after = _split(hub.text)
    folder_before, new_region, folder_after = _split(folder.text)
    added = [part for part in (folder_before, folder_after) if part and part not in hub.text]
    region = [START, new_region, old_region, END] if new_region + old_region else []
    text = "\n\n".join(part for part in (before, *region, after, *added) if part)
    return ModelCard(f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n{text}\n")


def write_card(
    model,
    folder: str | Path,
    title: str | None = None,
    facts: CardFacts | None = None,
    place: str | Path | None = None,
) -> Path:
    """
    Writes or updates the `README.md` of a saved folder; a card of the folder or repository it was loaded from is kept.

    Args:
        model (`DiTClassCondPipeline` or `DiTTransformer2DModel`): The saved pipeline or model.
        folder (`str` or `Path`): The saved folder.
        title (`str`, *optional*): The name of `place` if not given; its parent's where it is called `pipeline`.
        facts (`CardFacts`, *optional*): Facts for the card that can't be derived from the model.
        place (`str` or `Path`, *optional*): Where the folder will be, and the card that is updated; `folder` if not
            given.

    Returns:
        `Path`: the file.

    Raises:
        ValueError: if there is a card that can't be read, or it is a link to a file outside of the folder.

    Example:

        >>> import tempfile
        >>> from dit_hf import DiTClassCondPipeline
        >>> from dit_hf.hub import CardFacts, read_card, write_card
        >>> pipe = DiTClassCondPipeline.from_bundled("emoji64")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     card = read_card(write_card(pipe, folder, facts=CardFacts(license="apache-2.0")))
        >>> card.data.license
        'apache-2.0'
    """
    folder = Path(folder)
    place = Path(os.path.realpath(place or folder))
    check_links(place, "README.md")
    source = place / "README.md" if (place / "README.md").is_file() else source_file(model, "README.md")
    known = read_card(source) if source is not None else None
    title = title or (place.parent.name if place.name == "pipeline" else place.name)
    files = {path.name for each in (folder, place) if each.is_dir() for path in each.iterdir()}
    with writing(folder / "README.md") as partial:
        partial.write_text(str(build_card(model, title, facts, known, files)), encoding="utf-8")
    return folder / "README.md"


def read_card(file: str | Path) -> ModelCard:
    """
    Reads a card.

    Args:
        file (`str` or `Path`): A local `README.md`.

    Returns:
        `ModelCard`

    Raises:
        ValueError: if its metadata can't be read; the message names the file.
    """
    check_file(file, MAX_CARD_BYTES)
    try:
        card = ModelCard.load(file)
        join_cards(card, card)  # as it will be, whatever its metadata is
        return card
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(
            f"The model card {file} can't be read ({first_line(error)}); fix its metadata or remove it."
        ) from None


def source_file(model, name: str) -> Path | None:
    """
    A file of the folder or repository that a model was loaded from.

    Args:
        model (`DiTClassCondPipeline` or `DiTTransformer2DModel`): That was loaded.
        name (`str`): Path in the folder or repository.

    Returns:
        `Path`: or None, if there is no such file or no way to it, or it is a link out of the folder.
    """
    place = str(model.config.get("_name_or_path") or "")
    if place and (Path(place) / name).is_file():
        try:
            check_links(place, name)
        except ValueError as error:  # what was loaded can still be saved elsewhere, without that file
            logger.warning(f"Not used: {error}")
            return None
        return Path(place) / name
    if source_repo(model) is None:
        return None
    try:
        return Path(hf_hub_download(place, name))
    except (EntryNotFoundError, HTTPError, OSError, ValueError):
        return None


def source_repo(model) -> str | None:
    """
    The repository a model was loaded from.

    Args:
        model (`DiTClassCondPipeline` or `DiTTransformer2DModel`): That was loaded.

    Returns:
        `str`: or None, if it was loaded from a folder or not at all.
    """
    place = str(model.config.get("_name_or_path") or "")
    if place.count("/") != 1 or place.startswith(("/", ".")) or Path(place).exists():
        return None
    # What was loaded from the Hub is in the cache; another name is a folder that has gone.
    loaded = ("model_index.json", "config.json", "transformer/config.json")
    return place if any(isinstance(try_to_load_from_cache(place, name), str) for name in loaded) else None


def carry_over(model, folder: str | Path, name: str) -> None:
    """
    Copies a file that loading leaves behind from where a model was loaded from to where it is saved.

    Args:
        model (`DiTClassCondPipeline` or `DiTTransformer2DModel`): That is saved.
        folder (`str` or `Path`): The saved folder.
        name (`str`): Path in both.
    """
    source, target = source_file(model, name), Path(folder) / name
    if source is not None and not target.exists():
        shutil.copyfile(source, target)


def _metadata(card):
    """A card's metadata as a dictionary, and its results."""
    if card is None:
        return {}, []
    data = card.data.to_dict()
    index = data.pop("model-index", None)
    if not index:
        return data, []
    name, results = model_index_to_eval_results(index)
    return data | {"model_name": name}, results


def _split(text):
    """The owner's text before and after, and the package's between them; stray markers are the owner's."""
    start = text.find(START)
    end = text.rfind(END)
    if start < 0 or end < start:
        return text.strip(), "", ""
    region = text[start + len(START) : end].replace(START, "").replace(END, "")
    return text[:start].strip(), region.strip(), text[end + len(END) :].strip()


def _section(region, heading):
    """A section that this package wrote on an earlier card, without its heading; empty if there is none."""
    others = "|".join(HEADINGS)
    match = re.search(rf"^## {heading}\n\n(.*?)(?=^## (?:{others})$|^# |\Z)", region, re.DOTALL | re.MULTILINE)
    return match.group(1).strip() if match else ""


def _join(old, new):
    """Two lists, or single entries, as one without repetition."""
    entries = [[] if value is None else [value] if isinstance(value, str) else value for value in (old, new)]
    return list(dict.fromkeys([*entries[0], *entries[1]]))


def _join_results(old, new):
    """A new value replaces the old one of the same metric on the same data."""
    joined = {}
    for result in (*old, *new):
        result.dataset_config = result.dataset_config or result.dataset_name  # or all data of a type were the same
        details = (result.metric_type, result.metric_name, str(result.metric_config))
        joined[result.unique_identifier + details] = result
    return list(joined.values())


def _describe(model, title, facts, results, region, files):
    """The text that the package writes."""
    transformer = getattr(model, "transformer", model)
    is_pipeline = transformer is not model
    config = transformer.config
    parts = [f"![{PICTURES[SAMPLES]}]({SAMPLES})"] if SAMPLES in files else []
    parts.append(
        f"A class-conditional {_architecture(config)} for [diffusers](https://github.com/huggingface/diffusers): "
        f"{describe_blocks(config)}, patch {config.patch_size}, {config.num_classes} classes, "
        f"{transformer.num_parameters() / 1e6:.1f} M parameters, {count_macs(config) / 1e9:.3g} G multiply-adds a "
        "forward pass."
    )
    parts.append(
        "## Use\n\n```python\n" + (_pipeline_code(model, title) if is_pipeline else _model_code(title)) + "\n```"
    )
    parts.append(
        f"Needs diffusers {MIN_DIFFUSERS} or newer. `trust_remote_code=True` runs the code in this repository; where "
        f"the `dit_hf` package is installed it is not needed: `dit_hf.{type(model).__name__}.from_pretrained` loads "
        "the same."
    )
    if is_pipeline:
        settings = ", ".join(f"`{_code(f'{name}={value!r}')}`" for name, value in model.resolve_call().items())
        parts.append(f"Arguments of the call that are not given: {settings}.")
    if is_pipeline and model.id2label:
        names = [_inline(name) for _, name in sorted(model.id2label.items())]
        more = f" … ({len(names)} in all; see `pipe.labels`)" if len(names) > NAMES_SHOWN else ""
        parts.append(f"## Classes\n\n{', '.join(names[:NAMES_SHOWN])}{more}")
    shown = {name: value for name, value in config.items() if not name.startswith("_")}
    if is_pipeline:
        shown |= {
            "scheduler": type(model.scheduler).__name__,
            "vae": type(model.vae).__name__ if model.vae else "none",
        }
        optional = {"guide": model.guide, "guider": model.guider}
        shown |= {name: type(part).__name__ for name, part in optional.items() if part is not None}
    parts.append("## Model\n\n" + _table(shown))
    if training := _table(facts.recipe) if facts.recipe else _section(region, "Training"):
        if LOSS in files and f"({LOSS})" not in training:
            training += f"\n\n![{PICTURES[LOSS]}]({LOSS})"
        parts.append(f"## Training\n\n{training}")
    if results:
        rows = {
            f"{result.metric_name or result.metric_type}, {result.dataset_name}": result.metric_value
            for result in results
        }
        protocols = {(result.metric_args or {}).get("protocol"): result.dataset_name for result in results}
        lines = [f"Protocol, {_inline(name)}: {_clauses(line)}." for line, name in protocols.items() if line]
        parts.append("\n\n".join(("## Results", _table(rows), *lines)))
    limits = (
        facts.limits
        or _section(region, "Limits")
        or ("Not stated. The model knows only its classes, and repeats the biases of its training data.")
    )
    parts.append(f"## Limits\n\n{limits}")
    return "\n\n".join(parts)


def _architecture(config):
    """What a model is, with the paper."""
    if "bottleneck_dim" in config:
        return "pixel-space Transformer that predicts clean images ([JiT](https://arxiv.org/abs/2511.13720))"
    if "num_encoder_layers" not in config:
        return "Diffusion Transformer ([DiT](https://arxiv.org/abs/2212.09748))"
    paper = "[DDT](https://arxiv.org/abs/2504.05741)"
    if config["time_embedding"] == "fourier":
        paper = "RAE's [DiT-DH](https://arxiv.org/abs/2510.11690)"
    return f"Diffusion Transformer of an encoder and a decoder ({paper})"


def _pipeline_code(pipe, title):
    name = next(iter(pipe.id2label.values())).split(",")[0].strip() if pipe.id2label else ""
    label = _literal(name) if 0 < len(name) <= LONGEST else "0"
    image = ".images[0]" if pipe.vae is not None or pipe.transformer.config.in_channels == 3 else ".images"
    output = "" if image == ".images[0]" else ', output_type="latent"'
    return (
        "from diffusers import DiffusionPipeline\n\n"
        f"pipe = DiffusionPipeline.from_pretrained({_literal(title)}, trust_remote_code=True)\n"
        f"image = pipe({label}{output}){image}"
    )


def _model_code(title):
    return (
        "from diffusers import AutoModel\n\n"
        f"transformer = AutoModel.from_pretrained({_literal(title)}, trust_remote_code=True)"
    )


def _table(rows):
    lines = [f"| {_inline(name)} | {_inline(_public(value))} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _inline(value):
    """Any text as text of one line of Markdown: neither markup, HTML, a template nor the end of a table's cell."""
    text = printable(str(value))
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
    text = re.sub(r"[\\`*\[\]|]", r"\\\g<0>", text.replace("&", "&amp;").replace("<", "&lt;"))
    return text.replace("{{", "{\\{").replace("{%", "{\\%")


def _clauses(text):
    """A long line of clauses, each as text of Markdown."""
    return "; ".join(map(_inline, str(text).split("; ")))


def _code(text):
    """Any text between backticks."""
    return printable(text).replace("`", "'")


def _literal(text):
    """A Python string of one line, in double quotes where that needs no more than they."""
    quoted = repr(text)
    quoted = f'"{quoted[1:-1]}"' if quoted[0] == "'" and '"' not in text else quoted
    return quoted.replace("<", "\\x3c").replace("{", "\\x7b")  # no HTML, template or marker of ours


def _publishable(text):
    """What the package writes on a card, wherever its words are from: without tokens, and valid UTF-8."""
    return without_tokens(text).encode(errors="backslashreplace").decode()


def _public(value):
    """A setting without secrets and without folders of this machine."""
    if not isinstance(value, str | Path):
        return value
    text = str(value)
    return Path(text).name if Path(text).is_absolute() or text.startswith("~") else without_secrets(text)
