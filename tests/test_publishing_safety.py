"""What leaves this machine: no file of elsewhere, no secret, and no name that becomes markup or code."""

import ast
import http.server
import json
import logging
import socket
import threading

import pytest
import yaml
from conftest import FIXTURES, tiny_transformer
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import EvalResult, ModelCard, constants, hf_api
from testing_utils.hub_server import TOKEN, HubServer, Repo

from dit_hf import DiTClassCondPipeline, DiTTransformer2DModel
from dit_hf.checkpoints.links import check_download, download_from_server
from dit_hf.hub import CardFacts, build_card, connection, publish_folder, write_card
from dit_hf.hub.connection import without_secrets
from dit_hf.hub.model_card import END, START, read_card, source_file
from dit_hf.hub.publish import _reason, select_files
from dit_hf.schedulers import make_scheduler
from dit_hf.training.result import check_hub


SECRET = "hf_localSecretThatMustNeverBeShown"


def tiny_pipeline(**options):
    return DiTClassCondPipeline(tiny_transformer(), make_scheduler("ddpm"), **options)


@pytest.fixture
def folder(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pipe")
    (tmp_path / "private.txt").write_text(SECRET)
    return tmp_path / "pipe"


LINKS = ("README.md", "transformer/projectors.safetensors", "vae")
WORKS = [(work, name) for work in ("publish", "save", "save model") for name in LINKS] + [("card", LINKS[0])]


@pytest.mark.parametrize(("work", "name"), WORKS)
def test_links_out_of_a_folder_are_refused(name, work, folder, tmp_path):
    link, target = folder / name, tmp_path / "private.txt"
    link.unlink(missing_ok=True)
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(target if name != "vae" else tmp_path)
    works = {
        "publish": lambda: publish_folder(folder, "user/name", tiny_pipeline()),
        "save": lambda: tiny_pipeline().save_pretrained(folder),
        "save model": lambda: tiny_transformer().save_pretrained(folder),
        "card": lambda: write_card(tiny_pipeline(), folder),
    }
    with pytest.raises(ValueError, match=rf"{link} is a link to {target.parent}"):
        works[work]()
    assert target.read_text() == SECRET


def test_a_linked_folder_of_a_component_is_not_left_out(folder):
    """Of it no file would be published."""
    (folder / "transformer").rename(folder / "elsewhere")
    (folder / "transformer").symlink_to("elsewhere")
    with pytest.raises(ValueError, match=r"transformer is a link to .*elsewhere; replace it with a copy"):
        publish_folder(folder, "user/name", tiny_pipeline())


def test_links_that_are_neither_written_nor_published_stay(folder, tmp_path):
    for name in ("latents", "samples.old", ".venv/bin/python", "transformer/deep/er.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(tmp_path)
    pipe = tiny_pipeline()
    pipe.save_pretrained(folder)
    pipe.transformer.save_pretrained(folder / "transformer")
    assert {*select_files(folder)} == {
        *("README.md", "model_index.json", "pipeline_dit_class_cond.py", "scheduler/scheduler_config.json"),
        *("transformer/README.md", "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"),
        "transformer/transformer_dit.py",
    }


@pytest.mark.parametrize("name", LINKS[:2])
def test_a_file_linked_from_elsewhere_is_not_carried_over(name, folder, tmp_path):
    """What was loaded is saved whole all the same."""
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "private.txt")
    DiTClassCondPipeline.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    assert SECRET not in (tmp_path / "copy" / "README.md").read_text()
    assert not (tmp_path / "copy" / "transformer" / "projectors.safetensors").exists()


def test_the_hubs_cache_keeps_its_links(tmp_path):
    snapshot = tmp_path / "models--user--name" / "snapshots" / "abc"
    tiny_pipeline().save_pretrained(snapshot)
    blobs = tmp_path / "models--user--name" / "blobs"
    blobs.mkdir()
    (snapshot / "README.md").rename(blobs / "123")
    (snapshot / "README.md").symlink_to("../../blobs/123")
    pipe = DiTClassCondPipeline.from_pretrained(snapshot)
    assert source_file(pipe, "README.md") == snapshot / "README.md"


FOREIGN = (
    *(
        ".env",
        ".git/config",
        ".lock",
        ".cache/x.json",
        "transformer/.dit_hf-partial-a-1-2-config.json",
        "log.jsonl",
        "notes.md",
    ),
    *("checkpoint-100/model.safetensors", "transformer/__pycache__/a.pyc", "credentials.json", "steal.py", "id_rsa"),
    *(
        "transformer/optimizer.bin",
        "vae/secret.json",
        "private/photo.png",
        "samples/.hidden.png",
        "ema-100.safetensors",
    ),
    *("training_state.pkl", "nested/transformer/config.json"),
)


def test_only_what_belongs_to_a_pipeline_is_published(folder, caplog):
    tiny_transformer().save_pretrained(folder / "transformer", max_shard_size="50KB", variant="fp16")
    wanted = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    for name in (*FOREIGN, "samples.png", "samples/step-1.png", "LICENSE", "transformer/projectors.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(SECRET)
    wanted |= {"samples.png", "samples/step-1.png", "LICENSE", "transformer/projectors.safetensors"}
    logger = diffusers_logging.get_logger("dit_hf.hub.publish")
    logger.addHandler(caplog.handler)
    files = select_files(folder)
    logger.removeHandler(caplog.handler)
    assert files.keys() == wanted
    assert "Not uploaded" in caplog.text and "and 9 more" in caplog.text


def test_a_folder_without_a_model_is_not_published(tmp_path):
    with pytest.raises(ValueError, match="is not the folder of a pipeline or model"):
        publish_folder(tmp_path, "user/name", tiny_pipeline())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pass@host/a.pt?token=x#y", "https://host/a.pt"),
        ("get https://host:80/a.pt?sig=1 now", "get https://host:80/a.pt now"),
        ("https://token@host", "https://host"),
        (f"Illegal header value b'Bearer {SECRET}\\n'", "Illegal header value b'Bearer …"),
        (SECRET, "hf_…"),
        ("user/name, steps 10?", "user/name, steps 10?"),
        ("me/hf_emoji, hf_hub_download", "me/hf_emoji, hf_hub_download"),
    ],
)
def test_secrets_are_taken_out(text, shown):
    assert without_secrets(text) == shown
    assert SECRET not in _reason(OSError(text))


HOSTILE = (
    "a\n---\nlicense: mit",
    "x\n```\nimport os",
    "a|b",
    "<script>alert(1)</script>",
    "{{ config }}{% x %}",
    f"{END}{START}",
    "\x1b[2J\u202e",
    "\ud800",
    "'\"\\",
    "[x](javascript:1)",
    "`code`",
    "n" * 10_000,
    "\r\n## Limits\r\n",
    "\u2028## Training",
)


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_quoted_in_cards(name):
    names = {index: name if index == 0 else f"class {index}" for index in range(10)}
    pipe = tiny_pipeline(id2label=names)
    result = EvalResult("image", "images", name, "fid", 1.5)
    facts = CardFacts(name, name, [name], {name: name, "dataset_name": name}, [result])
    text = str(build_card(pipe, name, facts, None, []))
    text.encode()
    for _ in range(2):  # and when it is updated
        front, _, body = text.removeprefix("---\n").partition("\n---\n")
        assert yaml.safe_load(front)["library_name"] == "diffusers"
        assert "license" in yaml.safe_load(front) and yaml.safe_load(front)["license"] != "mit"
        lines = body.splitlines()
        assert [line for line in lines if line.startswith("## ")] == [
            *("## Use", "## Classes", "## Model", "## Training", "## Results", "## Limits")
        ]
        assert (lines.count(START), lines.count(END), lines.count("```"), lines.count("```python")) == (1, 1, 1, 1)
        assert body.count(START) == body.count(END) == 1 and "<script" not in body and "{{" not in body
        assert not any(line.startswith("---") for line in lines) and max(map(len, lines)) < 12_000
        assert "\x1b" not in body and "\u202e" not in body
        code = body.split("```python\n")[1].split("\n```")[0]
        calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
        assert len(calls) == 2 and len(ast.parse(code).body) == 3  # an import, the pipeline, an image
        assert calls[0].args[0].value == name or calls[1].args[0].value == name
        text = str(build_card(pipe, name, None, ModelCard(text), []))


def test_settings_on_cards_have_no_secrets_and_no_folders():
    recipe = {"train_data_dir": "/home/me/data", "source": f"https://me:{SECRET}@host/a?token={SECRET}", "steps": 3}
    facts = CardFacts(base_model="/home/me/model", datasets=[f"https://host/x?{SECRET}"], recipe=recipe)
    text = str(build_card(tiny_pipeline(), "user/tiny", facts))
    assert SECRET not in text and "/home/me" not in text
    assert "| train_data_dir | data |" in text and "| source | https://host/a |" in text and "| steps | 3 |" in text


def test_tokens_in_names_and_settings_do_not_reach_a_card():
    pipe = tiny_pipeline(id2label={0: f"a {SECRET}"})
    limits = f"Set HF_TOKEN={SECRET}, see [this](https://host/page#part). \ud800"
    facts = CardFacts(recipe={"nested": {"token": [SECRET]}, SECRET: 1}, limits=limits, license=SECRET)
    text = str(build_card(pipe, f"user/{SECRET}", facts, ModelCard("---\nlicense: mit\n---\nMine.")))
    assert SECRET not in text and "Mine." in text and "https://host/page#part" in text
    assert text.encode() and SECRET not in str(build_card(pipe, "x", None, ModelCard(text)))


FACTS = {
    "license": (5, [], b"x"),
    "base_model": (5, ["a"]),
    "datasets": ("a", None, [5], {"a": 1}),
    "recipe": (None, [], "x"),
    "results": (None, 5, [5], "x", {"a": 1}),
    "limits": (5, ["x"]),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in FACTS.items() for value in values])
def test_facts_of_another_type_are_named(name, value):
    with pytest.raises(ValueError, match=f"`{name}` is"):
        CardFacts(**{name: value})


@pytest.mark.parametrize(
    "content",
    [
        "---\nlicense: " + "[" * 50_000 + "\n---\n",
        "---\n1: 2\n---\n",
        "---\n- a\n---\n",
        *(
            f"---\n{name}: {value}\n---\n"
            for name in ("tags", "datasets")
            for value in ("[{a: b}]", "[[a]]", "5", "&a [*a]")
        ),
        "---\neval_results: []\n---\n",
        "---\nmodel-index: [{name: x, results: [{task: {type: [t]}, dataset: {type: d, name: n}, "
        "metrics: [{type: m, value: 1}]}]}]\n---\n",
        b"\xff\xfe---\n",
        "a" * 2**25,
    ],
)
def test_strange_cards_are_named(content, tmp_path):
    file = tmp_path / "README.md"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"README\.md"):
        read_card(file)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Any server, that sends half of `cut.pt` and all of the rest."""
    content = (FIXTURES / "dit_p2.pt").read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.end_headers()

        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if "cut" in self.path else content)

        def log_message(self, *_):
            pass

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_cut_download_is_refused_and_not_cached(server, tmp_path, caplog):
    logging.getLogger("huggingface_hub.file_download").addHandler(caplog.handler)
    try:
        with pytest.raises(OSError, match=f"Can't download http://{server}/cut.pt: ") as raised:
            download_from_server(f"http://me:{SECRET}@{server}/cut.pt?token={SECRET}")
    finally:
        logging.getLogger("huggingface_hub.file_download").removeHandler(caplog.handler)
    assert SECRET not in str(raised.value) + caplog.text
    assert [path for path in (tmp_path / "home").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    "path", ["..%2F..%2F..%2Fescaped.pt", "%2Ftmp%2Fescaped.pt", "..", "x" * 250 + "escaped.pt", "a%00escaped.pt"]
)
def test_a_link_is_no_path(path, server, tmp_path):
    file = download_from_server(f"http://{server}/{path}")
    assert file.parents[2] == tmp_path / "home" and file.name.endswith(("escaped.pt", "checkpoint"))
    assert DiTTransformer2DModel.from_single_file(file, 4).config.num_layers == 2


def test_a_damaged_file_of_the_cache_is_named(tmp_path):
    blob = tmp_path / ("0" * 64)
    blob.write_bytes(b"damaged")
    (tmp_path / "dit.pt").symlink_to(blob)
    with pytest.raises(ValueError, match=r"dit\.pt is damaged: its checksum is not the Hub's"):
        check_download(tmp_path / "dit.pt")


@pytest.fixture
def hub(monkeypatch):
    """A Hub that this process talks to."""
    with HubServer() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hf_api.api, "endpoint", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


PAGE = (b"<html>Sign in to the network</html>", 200, {"Content-Type": "text/html"})
NOT_THE_HUBS = "http://127.0.0.1:.* does not answer as the Hub does"


@pytest.mark.parametrize(
    ("step", "answer", "reason"),
    [
        (("POST", "repos/create"), PAGE, NOT_THE_HUBS),
        (("POST", "repos/create"), ({}, 200), NOT_THE_HUBS),
        (("POST", "repos/create"), "drop", "the connection to .* failed"),
        (("POST", "preupload"), ([], 200), NOT_THE_HUBS),
        (("POST", "objects/batch"), (None, 200), NOT_THE_HUBS),
        (("POST", "/commit/"), (b'{"commitUrl":', 200), NOT_THE_HUBS),
        (("POST", "/commit/"), 413, "Client error '413"),
        (("PUT", "/lfs/"), 403, r"the Hub refused the token \(403\)"),
        (("PUT", "/lfs/"), 413, "Error while uploading .*: Client error '413"),
    ],
)
def test_an_answer_that_is_none_is_named(step, answer, reason, hub, folder):
    hub.fail(*step, answer, times=9)
    with pytest.raises(OSError, match=f"Publishing to user/name failed: {reason}.*Nothing is lost") as error:
        publish_folder(folder, "user/name", tiny_pipeline(), subfolder="part")
    assert "\n" not in str(error.value) and ".." not in str(error.value)


@pytest.mark.parametrize("step", ["repos/create", "preupload", "objects/batch", "/commit/"])
def test_no_token_follows_a_redirect_to_another_server(step, hub, folder):
    with HubServer() as other:
        hub.fail("POST", step, (b"", 307, {"Location": f"{other.endpoint}/elsewhere"}))
        with pytest.raises(OSError, match="Publishing to user/name failed"):
            publish_folder(folder, "user/name", tiny_pipeline(), subfolder="part")
        assert other.tokens == {None} and f"Bearer {TOKEN}" in hub.tokens


def test_a_download_that_is_cut_is_named(hub, folder, tmp_path):
    hub.repos["models", "user/name"] = repo = Repo()
    names = [path for path in folder.rglob("*") if path.is_file()]
    repo.commit("main", {path.relative_to(folder).as_posix(): path.read_bytes() for path in names})
    for name in ("model_index.json", "transformer/config.json"):
        for method in ("HEAD", "GET"):
            hub.fail(method, name, "drop", times=9)
    for model_class, options in ((DiTClassCondPipeline, {}), (DiTTransformer2DModel, {"subfolder": "transformer"})):
        with pytest.raises(OSError, match="the connection to http://127.0.0.1:.* failed"):
            model_class.from_pretrained("user/name", cache_dir=tmp_path / model_class.__name__, **options)
    hub.fail("GET", "^/api/models", ([], 200))
    with pytest.raises(OSError, match=f"the cache has no such repository, and {NOT_THE_HUBS}"):
        DiTClassCondPipeline.from_pretrained("user/name", cache_dir=tmp_path / "empty")


def test_a_silent_hub_is_noticed(hub, folder, monkeypatch):
    """The client of the Hub has no timeout of its own."""
    monkeypatch.setattr(connection, "TIMEOUT", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        for ask in (lambda: check_hub("user/name"), lambda: publish_folder(folder, "user/name", tiny_pipeline())):
            with pytest.raises(OSError, match=f"the connection to {address} failed"):
                ask()


def test_an_index_of_many_components_is_refused(folder):
    index = json.loads((folder / "model_index.json").read_text()) | {f"x{n}": [None, None] for n in range(2000)}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="at most 1000 are read"):
        DiTClassCondPipeline.from_pretrained(folder)
