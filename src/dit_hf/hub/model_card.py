"""Model cards: what a published model is, how to use it, how it was made, measured, and where it fails."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData


TEMPLATE = Path(__file__).with_name("model_card_template.md")
# Between these lines the text is ours and is written anew; all else on a card is its owner's.
START, END = "<!-- dit_hf: written by the package from here -->", "<!-- dit_hf: to here -->"
TAGS = ["diffusers", "dit_hf", "class-conditional-image-generation", "diffusion-transformer"]
# The Hub has no pipeline tag for classes.
PIPELINE_TAG = "unconditional-image-generation"
# A grid of samples that lies in the folder under this name is shown.
SAMPLES = "samples.png"
NAMES_SHOWN = 40


@dataclass(frozen=True)
class CardFacts:
    """
    What a model can't tell of itself.

    Args:
        license (`str`, *optional*): The Hub's identifier, such as `"apache-2.0"` or `"cc-by-nc-4.0"`.
        base_model (`str`, *optional*): Repository it was fine-tuned or converted from.
        datasets (`list[str]`): Repositories it was trained on.
        recipe (`dict`): Training settings, shown as a table.
        results (`list[EvalResult]`): Metrics.
        limits (`str`, *optional*): What fails, in Markdown.
    """

    license: str | None = None
    base_model: str | None = None
    datasets: list[str] = field(default_factory=list)
    recipe: dict = field(default_factory=dict)
    results: list[EvalResult] = field(default_factory=list)
    limits: str | None = None


def build_card(
    model, title: str, facts: CardFacts | None = None, known: ModelCard | None = None, samples: bool = False
) -> ModelCard:
    """
    A card for a pipeline or a transformer, new or on top of one that exists.

    Args:
        model (`DiTClassCondPipeline` or `DiTTransformer2DModel`): What is published.
        title (`str`): Heading, and what the example loads: a repository or a folder.
        facts (`CardFacts`, *optional*): What the model can't tell of itself.
        known (`ModelCard`, *optional*):
            A card to update: its text is kept but for what this package wrote, its metadata but for what `facts` say
            anew; tags, data sets and results are joined.
        samples (`bool`, defaults to `False`): Whether a grid of samples, `samples.png`, lies beside it.

    Returns:
        `ModelCard`
    """
    facts = facts or CardFacts()
    before = ModelCardData(**known.data.to_dict()) if known is not None else ModelCardData()
    data = before.to_dict() if known is not None else {}
    data.pop("model-index", None)
    results = _join_results(before.eval_results or [], facts.results)
    data |= {"library_name": "diffusers", "pipeline_tag": data.get("pipeline_tag") or PIPELINE_TAG}
    data["tags"] = list(dict.fromkeys([*_as_list(data.get("tags")), *TAGS]))
    if datasets := list(dict.fromkeys([*_as_list(data.get("datasets")), *facts.datasets])):
        data["datasets"] = datasets
    data |= {name: value for name in ("license", "base_model") if (value := getattr(facts, name))}
    if results:
        data |= {"eval_results": results, "model_name": before.model_name or title}
    kept = known.text if known is not None else ""
    generated = f"{START}\n# {title}\n\n{_describe(model, title, facts, results, kept, samples)}\n{END}"
    if known is None:
        return ModelCard.from_template(ModelCardData(**data), template_path=str(TEMPLATE), generated=generated)
    card = ModelCard(known.content)
    card.data = ModelCardData(**data)
    text = card.text
    if START in text and END in text:
        card.text = text[: text.index(START)] + generated + text[text.index(END) + len(END) :]
    return card


def join_cards(first: ModelCard | None, second: ModelCard | None) -> ModelCard | None:
    """
    Two cards of one model, such as the one on the Hub and the one in the folder: nothing its owner wrote is lost.

    Args:
        first (`ModelCard`, *optional*): Its metadata and text go before.
        second (`ModelCard`, *optional*): Fills the gaps in the metadata; its owner's text is added if it is not there.

    Returns:
        `ModelCard`: or None, if there is neither.
    """
    if first is None or second is None:
        return first or second
    card = ModelCard(first.content)
    data = second.data.to_dict() | first.data.to_dict()
    for name in ("tags", "datasets"):
        if joined := list(dict.fromkeys([*_as_list(first.data.get(name)), *_as_list(second.data.get(name))])):
            data[name] = joined
    card.data = ModelCardData(**data)
    owners = _owners_text(second.text)
    if owners and owners not in card.text:
        card.text = f"{card.text.rstrip()}\n\n{owners}\n"
    return card


def write_card(model, folder: str | Path, title: str | None = None, facts: CardFacts | None = None) -> Path:
    """
    Writes or updates the `README.md` of a folder that was saved; a card of the folder it was loaded from is built on.

    Args:
        model (`DiTClassCondPipeline` or `DiTTransformer2DModel`): What was saved.
        folder (`str` or `Path`): Where.
        title (`str`, *optional*): The folder's name if not given.
        facts (`CardFacts`, *optional*): What the model can't tell of itself.

    Returns:
        `Path`: the file.
    """
    folder = Path(folder)
    source = Path(str(model.config.get("_name_or_path") or ""))
    cards = [place / "README.md" for place in (folder, source) if str(place) != "."]
    known = next((ModelCard.load(card) for card in cards if card.is_file()), None)
    card = build_card(model, title or folder.resolve().name, facts, known, (folder / SAMPLES).is_file())
    card.save(folder / "README.md")
    return folder / "README.md"


def _owners_text(text):
    """A card's text without what this package wrote."""
    if START in text and END in text:
        text = text[: text.index(START)] + text[text.index(END) + len(END) :]
    return text.strip()


def _as_list(value):
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _section(text, heading):
    """A section that this package wrote on an earlier card, without its heading; empty if there is none."""
    match = re.search(rf"^## {heading}\n\n(.*?)(?=^## |{re.escape(END)})", text, re.DOTALL | re.MULTILINE)
    return match.group(1).strip() if match else ""


def _join_results(old, new):
    """A new figure takes the place of the old one of the same metric on the same data."""
    return list({result.unique_identifier + (result.metric_type,): result for result in (*old, *new)}.values())


def _describe(model, title, facts, results, kept, samples):
    """The text that the package writes."""
    transformer = getattr(model, "transformer", model)
    is_pipeline = transformer is not model
    config = transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    parts = [f"![Samples, one row a class]({SAMPLES})"] if samples else []
    parts.append(
        f"A class-conditional Diffusion Transformer ([DiT](https://arxiv.org/abs/2212.09748)) for "
        f"[diffusers](https://github.com/huggingface/diffusers): {config.num_layers} blocks of width {width}, patch "
        f"{config.patch_size}, {config.num_classes} classes, {transformer.num_parameters() / 1e6:.1f} M parameters."
    )
    parts.append(
        "## Use\n\n```python\n" + (_pipeline_code(model, title) if is_pipeline else _model_code(title)) + "\n```"
    )
    parts.append(
        "`trust_remote_code=True` runs the code in this repository; with `pip install dit_hf` it is not needed: "
        f"`dit_hf.{type(model).__name__}.from_pretrained` loads the same."
    )
    if is_pipeline and model.id2label:
        names = [name for _, name in sorted(model.id2label.items())]
        more = f" … ({len(names)} in all; see `pipe.labels`)" if len(names) > NAMES_SHOWN else ""
        parts.append(f"## Classes\n\n{', '.join(names[:NAMES_SHOWN])}{more}")
    shown = {name: value for name, value in config.items() if not name.startswith("_")}
    if is_pipeline:
        shown |= {
            "scheduler": type(model.scheduler).__name__,
            "vae": type(model.vae).__name__ if model.vae else "none",
        }
    parts.append("## Model\n\n" + _table(shown))
    if training := _table(facts.recipe) if facts.recipe else _section(kept, "Training"):
        parts.append(f"## Training\n\n{training}")
    if results:
        rows = {
            f"{result.metric_name or result.metric_type}, {result.dataset_name}": result.metric_value
            for result in results
        }
        parts.append("## Results\n\n" + _table(rows))
    limits = (
        facts.limits
        or _section(kept, "Limits")
        or ("Not stated. The model draws only its classes, and repeats the biases of its training data.")
    )
    parts.append(f"## Limits\n\n{limits}")
    return "\n\n".join(parts)


def _pipeline_code(pipe, title):
    label = json.dumps(next(iter(pipe.id2label.values())).split(",")[0].strip()) if pipe.id2label else "0"
    image = ".images[0]" if pipe.vae is not None or pipe.transformer.config.in_channels == 3 else ".images"
    output = "" if image == ".images[0]" else ', output_type="latent"'
    return (
        "from diffusers import DiffusionPipeline\n\n"
        f"pipe = DiffusionPipeline.from_pretrained({json.dumps(title)}, trust_remote_code=True)\n"
        f"image = pipe({label}{output}){image}"
    )


def _model_code(title):
    return (
        "from diffusers import AutoModel\n\n"
        f"transformer = AutoModel.from_pretrained({json.dumps(title)}, trust_remote_code=True)"
    )


def _table(rows):
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _cell(value):
    return str(value).replace("|", "\\|").replace("\n", " ")
