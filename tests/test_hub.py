"""Repositories on a Hub: the real client, fresh processes, a real server on loopback."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_transformer
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from test_conversion import tiny_vae
from testing_utils.hub_server import TOKEN, HubServer

from dit_hf import DiTClassCondPipeline, make_scheduler
from dit_hf.hub import CardFacts, build_card, join_cards, write_card
from dit_hf.hub.model_card import source_repo


RESULT = EvalResult(
    task_type="unconditional-image-generation",
    dataset_type="emoji",
    dataset_name="Emoji",
    metric_type="fd",
    metric_value=12.5,
    metric_name="FD",
)
FACTS = CardFacts(
    license="apache-2.0", datasets=["user/emoji"], recipe={"steps": 10}, results=[RESULT], limits="Small."
)
# Hides the package from a process, as on a machine where it is not installed.
WITHOUT_PACKAGE = """
import importlib.abc, sys
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "dit_hf":
            raise ModuleNotFoundError("No module named 'dit_hf'", name="dit_hf")
sys.meta_path.insert(0, Hide())
"""
DRAW = """
import sys, torch, hashlib
image = pipe("class 3", num_inference_steps=2, generator=torch.manual_seed(0), output_type="pt").images
print("IMAGE", hashlib.sha256(image.numpy().tobytes()).hexdigest(), type(pipe).__module__, "dit_hf" in sys.modules)
"""


def tiny_pipeline():
    names = {key: f"class {key}" for key in range(10)}
    return DiTClassCondPipeline(tiny_transformer(), make_scheduler("ddim"), tiny_vae(), id2label=names)


def python(code, environment, **extra):
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = {**os.environ, **environment, **extra}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def generate(load, places, environment, installed=True, **extra):
    """
    (hash of the image, module of the pipeline's class, whether the package was imported) of each place, in a fresh
    process.
    """
    code = "".join(load.format(repr(str(place))) + DRAW for place in places)
    result = python(("" if installed else WITHOUT_PACKAGE) + code, environment, **extra)
    assert result.returncode == 0, result.stderr[-3000:]
    return [line.split()[1:] for line in result.stdout.splitlines() if line.startswith("IMAGE")]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A server with one repository, `user/tiny`, published by a fresh process, and an environment to reach it."""
    home = tmp_path_factory.mktemp("hub")
    tiny_pipeline().save_pretrained(home / "folder", card=FACTS)
    with HubServer() as hub:
        environment = hub.environment(home / "hf_home")
        publish = f"""
        from dit_hf import DiTClassCondPipeline
        pipe = DiTClassCondPipeline.from_pretrained({str(home / "folder")!r})
        pipe.push_to_hub("user/tiny")
        pipe.push_to_hub("user/tiny", variant="fp16")
        pipe.push_to_hub("user/mine", private=True)
        pipe.push_to_hub("user/mine", variant="fp16", create_pr=True)
        """
        result = python(publish, environment)
        assert result.returncode == 0, result.stderr[-3000:]
        yield hub, environment, home


def test_the_five_ways_give_one_image(published):
    hub, environment, home = published
    one_line = (
        "from diffusers import DiffusionPipeline; "
        "pipe = DiffusionPipeline.from_pretrained({0}, trust_remote_code=True)"
    )
    ours = "from dit_hf import DiTClassCondPipeline; pipe = DiTClassCondPipeline.from_pretrained({0})"
    auto = one_line + (
        "; from diffusers import AutoModel; pipe.register_modules("
        "transformer=AutoModel.from_pretrained({0}, subfolder='transformer', trust_remote_code=True))"
    )
    places = ("user/tiny", home / "folder")
    ways = {
        "without the package": (one_line, False),
        "installed class": (ours, True),
        "with the package, remote code": (one_line, True),
        "auto model": (auto, False),
    }
    images = {name: generate(load, places, environment, installed) for name, (load, installed) in ways.items()}
    assert all(len(generated) == len(places) for generated in images.values())
    assert len({image for generated in images.values() for image, *_ in generated}) == 1, images
    for name, generated in images.items():
        for _, module, imported in generated:
            assert (imported == "True") == (name == "installed class"), name
            assert module.startswith("dit_hf" if name == "installed class" else "diffusers_modules"), name
    # From the cache, without a server to ask.
    before = len(hub.requests)
    (offline,) = generate(ours, places[:1], environment, HF_HUB_OFFLINE="1")
    assert offline[0] == images["installed class"][0][0]
    assert len(hub.requests) == before


def test_private_is_private_and_a_proposal_changes_nothing(published):
    hub, _, _ = published
    assert hub.repos["models", "user/mine"].private and not hub.repos["models", "user/tiny"].private
    weights = "transformer/diffusion_pytorch_model.fp16.safetensors"
    assert weights not in hub.files("user/mine")
    assert weights in hub.files("user/mine", "refs/pr/1")
    assert weights in hub.files("user/tiny")


def test_what_is_published(published):
    hub, _, home = published
    files = hub.files("user/tiny")
    assert {
        "README.md",
        "model_index.json",
        "pipeline_dit_class_cond.py",
        "transformer/transformer_dit.py",
    } <= files.keys()
    index = json.loads(files["model_index.json"])
    assert index["auto_map"] == {"AutoModel": "transformer_dit.DiTTransformer2DModel"}
    assert json.loads(files["transformer/config.json"])["auto_map"] == index["auto_map"]
    everything = b"".join(content for path, content in files.items() if not path.endswith(".safetensors"))
    assert str(home).encode() not in everything  # no path of the machine it was published from
    assert TOKEN.encode() not in everything
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "apache-2.0"  # from the card of the folder it was loaded from
    assert card.data.eval_results[0].metric_value == 12.5
    assert 'from_pretrained("user/tiny"' in card.text


def test_arguments_are_forwarded(published):
    _, environment, _ = published
    code = """
    import torch
    from diffusers import PipelineQuantizationConfig, QuantoConfig
    from dit_hf import DiTClassCondPipeline, DiTTransformer2DModel
    from huggingface_hub import HfApi
    half = DiTClassCondPipeline.from_pretrained("user/tiny", variant="fp16", dtype=torch.float16)
    assert half.transformer.proj_out.weight.dtype == torch.float16
    HfApi().create_branch("user/tiny", branch="other")
    pipe = DiTClassCondPipeline.from_pretrained("user/tiny", revision="other")
    try:
        DiTClassCondPipeline.from_pretrained("user/tiny", revision="absent")
    except OSError:
        pass
    else:
        raise AssertionError("a revision that does not exist was found")
    model = DiTTransformer2DModel.from_pretrained("user/tiny", subfolder="transformer")
    assert torch.equal(model.proj_out.weight, pipe.transformer.proj_out.weight)
    mapped = DiTTransformer2DModel.from_pretrained("user/tiny", subfolder="transformer", device_map="cpu")
    assert mapped.hf_device_map
    quantized = PipelineQuantizationConfig(quant_mapping={"transformer": QuantoConfig(weights_dtype="int8")})
    try:
        DiTClassCondPipeline.from_pretrained("user/tiny", quantization_config=quantized)
    except ImportError as error:
        assert "quanto" in str(error), error  # it got there; the backend is not among the test's packages
    else:
        raise AssertionError("the quantization was not forwarded")
    print("DONE")
    """
    result = python(code, environment)
    assert "DONE" in result.stdout, result.stderr[-3000:]


def test_saving_what_was_loaded_loses_nothing(published, tmp_path):
    _, environment, home = published
    load = "from diffusers import DiffusionPipeline as P; pipe = P.from_pretrained({0}, trust_remote_code=True)"
    ours = "from dit_hf import DiTClassCondPipeline; pipe = DiTClassCondPipeline.from_pretrained({0})"
    folders = [home / "folder", tmp_path / "remote", tmp_path / "ours"]
    saves = [f"; pipe.save_pretrained({str(folder)!r})" for folder in folders[1:]]
    (first,) = generate(load + saves[0], folders[:1], environment, installed=False)
    (second,) = generate(ours + saves[1], folders[:1], environment)
    (third,) = generate(load, folders[2:], environment, installed=False)
    assert first[0] == second[0] == third[0]

    def content(place):
        files = {path.relative_to(place): path.read_bytes() for path in place.rglob("*") if path.is_file()}
        return {path: data for path, data in files.items() if path.name != "README.md"}, set(files)

    files, names = content(home / "folder")
    assert content(tmp_path / "ours") == (files, names)
    assert content(tmp_path / "remote") == (files, names - {Path("README.md")})  # only the package writes cards
    assert "| steps | 10 |" in (tmp_path / "ours" / "README.md").read_text()
    assert "Small." in (tmp_path / "ours" / "README.md").read_text()


def test_a_copy_inherits_the_card_of_its_source(published):
    hub, environment, _ = published
    code = """
    from dit_hf import DiTClassCondPipeline
    DiTClassCondPipeline.from_pretrained("user/tiny").push_to_hub("user/copy")
    """
    result = python(code, environment)
    assert result.returncode == 0, result.stderr[-3000:]
    card = ModelCard(hub.files("user/copy")["README.md"].decode())
    assert (card.data.license, card.data.base_model) == ("apache-2.0", "user/tiny")
    assert "| steps | 10 |" in card.text


def test_what_loading_leaves_behind_is_carried_over(published, tmp_path):
    """diffusers downloads neither cards nor a conversion's projector heads."""
    hub, environment, _ = published
    code = f"""
    from huggingface_hub import upload_file
    from dit_hf import DiTClassCondPipeline, DiTTransformer2DModel
    DiTClassCondPipeline.from_pretrained("user/tiny").push_to_hub("user/aside")
    upload_file(path_or_fileobj=b"heads", path_in_repo="transformer/projectors.safetensors", repo_id="user/aside")
    DiTClassCondPipeline.from_pretrained("user/aside").save_pretrained({str(tmp_path / "saved")!r})
    DiTClassCondPipeline.from_pretrained("user/aside").push_to_hub("user/aside2")
    DiTTransformer2DModel.from_pretrained({str(tmp_path / "saved" / "transformer")!r}).push_to_hub("user/alone")
    DiTTransformer2DModel.from_pretrained("user/tiny", subfolder="transformer").push_to_hub("user/aside",
    subfolder="other")
    """
    result = python(code, environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "saved" / "transformer" / "projectors.safetensors").read_bytes() == b"heads"
    assert "license: apache-2.0" in (tmp_path / "saved" / "README.md").read_text()
    assert hub.files("user/aside2")["transformer/projectors.safetensors"] == b"heads"
    assert "_name_or_path" not in json.loads(hub.files("user/alone")["config.json"])
    assert "other/config.json" in hub.files("user/aside")
    assert "other/README.md" not in hub.files("user/aside")


def test_a_model_alone(published, tmp_path):
    hub, environment, _ = published
    code = """
    import sys
    sys.path.insert(0, {tests!r})
    from conftest import tiny_transformer
    from diffusers import AutoModel
    import torch
    model = tiny_transformer()
    model.push_to_hub("user/model")
    model.save_pretrained({folder!r}, push_to_hub=True, repo_id="user/model2")
    for name in ("user/model", "user/model2", {folder!r}):
        again = AutoModel.from_pretrained(name, trust_remote_code=True)
        assert torch.equal(again.proj_out.weight, model.proj_out.weight)
    print("DONE")
    """
    result = python(code.format(tests=str(ROOT / "tests"), folder=str(tmp_path / "model")), environment)
    assert "DONE" in result.stdout, result.stderr[-3000:]
    assert "AutoModel.from_pretrained" in hub.files("user/model")["README.md"].decode()


# Cards


def test_cards_round_trip_and_validate(published, monkeypatch):
    hub, _, _ = published
    card = build_card(tiny_pipeline(), "user/tiny", FACTS)
    data = ModelCard(str(card)).data
    assert data.library_name == "diffusers"
    assert data.pipeline_tag == "unconditional-image-generation"
    assert "class-conditional-image-generation" in data.tags
    name, results = model_index_to_eval_results(eval_results_to_model_index(data.model_name, data.eval_results))
    assert results == [RESULT]
    monkeypatch.setattr("huggingface_hub.repocard.constants.ENDPOINT", hub.endpoint)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    before = len(hub.requests)
    card.validate(repo_type="model")
    assert hub.requests[before:] == [("POST", "/api/validate-yaml")]


def test_a_card_on_the_hub_is_updated_not_overwritten():
    own = ModelCard("---\nlicense: mit\ntags:\n- mine\nlanguage: en\n---\n\n# My model\n\nMy words.\n")
    card = build_card(tiny_pipeline(), "user/tiny", CardFacts(datasets=["user/data"]), known=own)
    assert "My words." in card.text
    assert (card.data.license, card.data.language) == ("mit", "en")
    assert card.data.tags[0] == "mine"
    assert "dit_hf" in card.data.tags
    ours = build_card(tiny_pipeline(), "user/tiny", FACTS)
    edited = ModelCard(str(ours) + "\n\n## Mine\n\nKept.\n")
    newer = EvalResult(**{**RESULT.__dict__, "metric_value": 11.0, "verified": None})
    again = build_card(tiny_pipeline(), "user/other", CardFacts(license="mit", results=[newer]), known=edited)
    assert "Kept." in again.text
    assert again.data.license == "mit"
    assert [result.metric_value for result in again.data.eval_results] == [11.0]
    assert "| steps | 10 |" in again.text  # facts that are not given anew stay
    assert "Small." in again.text
    assert again.text.count("## Use") == 1
    assert '"user/other"' in again.text


def test_cards_of_hub_and_folder_are_joined():
    hub = ModelCard("---\nlicense: mit\ntags:\n- a\n---\n\nOn the Hub.\n")
    ours = str(build_card(tiny_pipeline(), "folder", FACTS))
    folder = ModelCard(ours.replace("<!--", "Before.\n\n<!--", 1) + "\nIn the folder.\n")
    card = build_card(tiny_pipeline(), "user/tiny", known=join_cards(hub, folder))
    assert card.data.license == "apache-2.0"  # the folder's is what is published now
    assert card.data.datasets == ["user/emoji"]
    assert card.data.tags[:2] == ["a", "diffusers"]
    assert card.data.eval_results[0].metric_value == 12.5
    assert "On the Hub." in card.text
    assert card.text.count("In the folder.") == 1
    for _ in range(3):
        card = build_card(tiny_pipeline(), "user/tiny", known=join_cards(card, folder))
    counts = [card.text.count(words) for words in ("On the Hub.", "Before.", "In the folder.", "## Use", "Small.")]
    assert counts == [1] * 5
    # What the package wrote on the Hub stays where the folder's says nothing of it.
    bare = build_card(tiny_pipeline(), "folder")
    joined = build_card(tiny_pipeline(), "user/tiny", known=join_cards(ModelCard(ours), bare))
    assert "| steps | 10 |" in joined.text
    assert joined.data.license == "apache-2.0"
    assert join_cards(None, None) is None


def test_owners_sections_and_several_figures_of_one_metric():
    guided = EvalResult(**{**RESULT.__dict__, "metric_name": "FD, guided", "metric_value": 3.0})
    limits = "Small.\n\n## A heading of its own\n\nMore."
    facts = CardFacts(results=[RESULT, guided], limits=limits)
    own = "\n## Training\n\nMy own words.\n"
    card = build_card(tiny_pipeline(), "a", facts)
    for _ in range(2):
        card = build_card(tiny_pipeline(), "a", known=ModelCard(str(card)))
    assert sorted(result.metric_value for result in card.data.eval_results) == [3.0, 12.5]
    assert limits in card.text
    card = build_card(tiny_pipeline(), "a", known=ModelCard(str(card) + own))
    assert card.text.count("My own words.") == 1


def test_a_card_that_cant_be_read_is_named(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: [unclosed\n---\n")
    with pytest.raises(ValueError, match=r"README\.md can't be read"):
        write_card(tiny_pipeline(), tmp_path)


def test_what_is_the_users_stays(tmp_path):
    """Only the pipeline's own files are written when a folder is saved into."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "README.md").write_text("mine")
    (tmp_path / "docs" / "config.json").write_text("// mine")
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "README.md").write_text("mine too")
    tiny_pipeline().save_pretrained(tmp_path)
    assert (tmp_path / "docs" / "README.md").read_text() == "mine"
    assert (tmp_path / "docs" / "config.json").read_text() == "// mine"
    assert "mine too" in (tmp_path / "transformer" / "README.md").read_text()


def test_a_card_of_its_owners_words_gets_ours_behind_them():
    own = ModelCard("---\nlicense: mit\n---\n\nMy words.\n")
    card = build_card(tiny_pipeline(), "user/tiny", FACTS, own)
    assert card.text.index("My words.") < card.text.index("| steps | 10 |")
    assert 'from_pretrained("user/tiny"' in card.text
    with pytest.raises(ValueError, match="CardFacts"):
        build_card(tiny_pipeline(), "user/tiny", {"license": "mit"})


def test_a_folder_that_has_gone_is_no_repository():
    pipe = tiny_pipeline()
    pipe.register_to_config(_name_or_path="outputs/gone")
    assert source_repo(pipe) is None


def test_samples_are_shown(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    assert "samples.png" not in (tmp_path / "README.md").read_text()
    (tmp_path / "samples.png").write_bytes(b"")
    write_card(pipe, tmp_path)
    write_card(pipe, tmp_path)
    assert (tmp_path / "README.md").read_text().count("(samples.png)") == 1


# Faults

PUSH = """
from dit_hf import DiTClassCondPipeline
pipe = DiTClassCondPipeline.from_pretrained({folder!r})
pipe.save_pretrained({folder!r}, push_to_hub=True, repo_id={repo!r})
"""


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("repo", "fault"),
    [
        ("user/fault-500", ("POST", r"/commit/", 500)),
        ("user/fault-drop", ("PUT", r"/lfs/", "drop")),
        ("user/fault-create", ("POST", r"/repos/create", 500)),
        ("user/fault-card", ("HEAD", r"/README\.md", 500)),  # or an owner's card would be replaced
    ],
)
def test_a_failed_upload_costs_only_another_try(published, tmp_path, repo, fault):
    hub, environment, _ = published
    pipe = tiny_pipeline()
    torch.manual_seed(len(repo))  # weights that the server has not got yet
    torch.nn.init.normal_(pipe.transformer.proj_out.weight)
    pipe.save_pretrained(tmp_path)
    before = snapshot(tmp_path)
    hub.fail(*fault, times=50)
    failed = python(PUSH.format(folder=str(tmp_path), repo=repo), environment)
    hub.faults.clear()
    assert failed.returncode != 0
    last = failed.stderr.strip().splitlines()[-1]
    assert "Publishing to" in last
    assert "repeat the same command or call" in last
    assert TOKEN not in failed.stderr + failed.stdout
    after = snapshot(tmp_path)
    assert after == before

    start = len(hub.requests)
    again = python(PUSH.format(folder=str(tmp_path), repo=repo), environment)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "transformer/diffusion_pytorch_model.safetensors" in hub.files(repo)
    sent = [path for method, path in hub.requests[start:] if method == "PUT"]
    if fault[2] == 500 and fault[0] == "POST" and "commit" in fault[1]:
        assert sent == []  # the weights had arrived the first time


def test_a_refused_token(published, tmp_path):
    hub, environment, _ = published
    tiny_pipeline().save_pretrained(tmp_path)
    wrong = "hf_wrongTokenWrongTokenWrongToken"
    result = python(PUSH.format(folder=str(tmp_path), repo="user/refused"), environment, HF_TOKEN=wrong)
    assert result.returncode != 0
    assert "refused the token (401)" in result.stderr
    assert wrong not in result.stderr + result.stdout
    assert ("models", "user/refused") not in hub.repos


def test_no_network_is_said_to_be_no_network_at_once(tmp_path):
    endpoint = "http://no-such-host.invalid"
    code = """
    import time
    from dit_hf import DiTClassCondPipeline, DiTTransformer2DModel
    started = time.perf_counter()
    for load in (DiTClassCondPipeline.from_pretrained, DiTTransformer2DModel.from_pretrained):
        for name in ("user/name", "some/folder/here"):
            try:
                load(name)
            except OSError as error:
                print(error)
    print(time.perf_counter() - started)
    """
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_OFFLINE", None)
    result = python(code, environment)
    *messages, seconds = result.stdout.splitlines()
    unreachable = (
        f"There is no folder 'user/name', the cache has no such repository, and there is no connection to {endpoint}"
    )
    assert messages[0].startswith(unreachable) and messages[2].startswith(unreachable), result.stderr
    assert messages[1] == messages[3] == "There is no folder 'some/folder/here', and a Hub id looks like 'user/name'."
    assert float(seconds) < 5
