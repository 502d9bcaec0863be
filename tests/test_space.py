"""The Space: a real server on loopback, asked by many at once; its snippet; classes mixed."""

import asyncio
import json
import re
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version

import httpx
import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_design, tiny_transformer, tiny_vae
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image
from testing_utils.scripts import run_forked
from testing_utils.space_server import APP, serve

from dit_hf import DiTClassCondPipeline, __version__, make_scheduler, mix_classes
from dit_hf.seeds import drawn_classes, seeded_generator
from dit_hf.space.generation import ImageGenerator
from dit_hf.space.page import Page, captions
from dit_hf.space.settings import OWN_SAMPLER, Settings


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    names = {0: "tench, Tinca tinca", 1: "goldfish, Carassius auratus", 2: "shark"}
    transformer = tiny_transformer(num_classes=3, learn_sigma=False, num_layers=24)  # slow enough to be cancelled
    scheduler = make_scheduler("flow_euler", shift=3.0)
    DiTClassCondPipeline(transformer, scheduler, tiny_vae(), names).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def address(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("temporary")
    with serve(model, folder, app=None) as address:
        yield address
    assert list(folder.iterdir()) == []  # all that the server wrote is gone


@pytest.fixture
def small(model, tmp_path):
    """A copy of the app, with a home of its own and one place to wait; it leaves both folders as they were."""
    folder = tmp_path / "small"
    folder.mkdir()
    for name in ("home", "temporary"):
        (folder / name).mkdir()
    copy = shutil.copytree(APP.parent, folder / "space", ignore=shutil.ignore_patterns("__pycache__"))
    before = sorted(folder.rglob("*"))
    variables = {"HOME": str(folder / "home"), "DIT_HF_MODEL": str(model), "GRADIO_SERVER_NAME": "127.0.0.1"}
    with serve(None, folder / "temporary", "--queue_size", "1", app=copy / APP.name, **variables) as address:
        yield address
    assert sorted(folder.rglob("*")) == before


def connect(address, folder):
    return Client(address, verbose=False, download_files=str(folder))


def direct(address, route, session="mine", data=()):
    """Asked past the queue, as the page asks for what may not wait; gradio_client has all wait."""
    return httpx.post(f"{address}/gradio_api/{route}", json={"data": list(data), "session_hash": session})


def pixels(gallery):
    return np.stack([np.asarray(Image.open(picture["image"])) for picture in gallery])


def test_the_same_settings_give_the_same_images_here_and_by_the_snippet(address, model, tmp_path, monkeypatch):
    monkeypatch.chdir(model.parent)  # the snippet tells the folder's name only
    client = connect(address, tmp_path)
    options = {"class_labels": ["goldfish, Carassius auratus", "shark"], "images": 2, "steps": 3}
    options |= {"guidance_end": 0.5, "sampler": "flow_heun", "mix_with": "tench, Tinca tinca", "mix_share": 0.5}
    gallery, status, seed, snippet = answer = client.predict(**options, seed=5, api_name="/generate")
    assert str(model.parent) not in repr(answer)
    assert status == "Images: 4, steps: 3, seed: 5."
    assert [picture["caption"] for picture in gallery] == ["goldfish", "goldfish", "shark", "shark"]
    again = client.predict(**options, seed=5, api_name="/generate")[0]
    other = client.predict(**options, seed=6, api_name="/generate")[0]
    assert np.array_equal(pixels(gallery), pixels(again))
    assert not np.array_equal(pixels(gallery), pixels(other))
    found = {}
    exec(snippet, found)
    assert np.array_equal(pixels(gallery), np.stack([np.asarray(image) for image in found["images"]]))
    settings = json.loads(Image.open(gallery[0]["image"]).text["dit_hf"])
    assert settings | options == settings
    assert settings["seed"] == seed == 5
    assert (settings["model"], settings["version"]) == ("tiny", __version__)
    random = client.predict(**options, seed=5, random_seed=True, api_name="/generate")
    assert random[2] != 5


def test_a_picture_is_drawn_again_from_its_own_settings(address, model, tmp_path):
    options = {"class_labels": ["goldfish, Carassius auratus", "shark"], "images": 2, "steps": 3, "seed": 5}
    gallery = connect(address, tmp_path).predict(**options, api_name="/generate")[0]
    pipe = DiTClassCondPipeline.from_pretrained(model)
    for index, picture in enumerate(gallery):
        picture = Image.open(picture["image"])
        known = json.loads(picture.text["dit_hf"])
        assert known["index"] == index
        again = pipe(
            known["class_labels"][known["index"] // known["images"]],
            num_inference_steps=known["steps"],
            guidance_scale=known["guidance_scale"],
            guidance_interval=(known["guidance_start"], known["guidance_end"]),
            generator=[seeded_generator(known["seed"], known["index"])],
        ).images[0]
        assert np.abs(np.asarray(again, int) - np.asarray(picture, int)).max() <= 1  # another batch rounds otherwise


def test_every_sampler_goes_by_the_shift_of_the_model(address, model, tmp_path, monkeypatch):
    monkeypatch.chdir(model.parent)
    client, generated = connect(address, tmp_path), {}
    for sampler in ("default", "flow_euler", "flow_heun", "flow_dpm++", "flow_unipc"):
        options = {"class_labels": "shark", "images": 1, "steps": 4, "seed": 3, "sampler": sampler}
        gallery, _, _, snippet = client.predict(**options, api_name="/generate")
        found = {}
        exec(snippet, found)
        config = found["pipe"].scheduler.config
        assert config.get("shift", config.get("flow_shift")) == 3
        generated[sampler] = pixels(gallery)
        assert np.array_equal(generated[sampler], np.stack([np.asarray(image) for image in found["images"]]))
    assert np.array_equal(generated["default"], generated["flow_euler"])


def test_twenty_at_once_each_get_their_own(address, model, tmp_path):
    names = ["tench, Tinca tinca", "goldfish, Carassius auratus", "shark"]

    def ask(index):
        name = names[index % 3]
        folder = tmp_path / str(index)
        folder.mkdir()
        found = connect(address, folder).predict(
            class_labels=name, images=1, seed=index, steps=2, api_name="/generate"
        )
        assert found[2] == index
        assert found[0][0]["caption"] == name.split(",")[0]
        return pixels(found[0])

    with ThreadPoolExecutor(20) as pool:
        together = list(pool.map(ask, range(20)))
    pipe = DiTClassCondPipeline.from_pretrained(model)
    options = {"num_inference_steps": 2, "guidance_scale": 4}
    for index, gallery in enumerate(together):
        alone = pipe(names[index % 3], generator=[seeded_generator(index, 0)], **options).images
        assert np.array_equal(gallery, np.stack([np.asarray(image) for image in alone]))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"steps": 10**9}, "Steps must be a whole number from 1 to 250"),
        ({"steps": 2.5}, "Steps must be a whole number"),
        ({"steps": None}, "Steps must be a whole number"),
        ({"seed": -1}, "Seed must be a whole number from 0"),
        ({"seed": "x"}, "Seed must be a whole number"),
        ({"seed": 2.5}, "Seed must be a whole number"),
        ({"images": True}, "Images of each class must be a whole number"),
        ({"images": 20, "class_labels": ["shark", "tench, Tinca tinca"]}, "at most 32"),
        ({"class_labels": "/etc/passwd"}, "Class: there is no class '/etc/passwd'"),
        ({"class_labels": ["shark"] * 33}, "32"),
        ({"class_labels": []}, "at least one class"),
        ({"class_labels": 5}, "Class must be a name or a list of names"),
        ({"class_labels": [["shark"]]}, "Class: there is no class"),
        ({"mix_with": 3}, "Mix with: there is no class '3'"),
        ({"mix_share": "x"}, "Weight of the mixed class must be a number from 0 to 1"),
        ({"guidance_scale": None}, "Guidance scale must be a number from 0 to 20"),
        ({"random_seed": 1}, "Random must be true or false"),
        ({"sampler": "ddim"}, "no sampler 'ddim'"),
        ({"sampler": None}, "no sampler 'None'"),
        ({"guidance_start": 0.5, "guidance_end": 0.5}, "start before it ends"),
    ],
)
def test_requests_out_of_bounds_are_refused(address, tmp_path, bad, message):
    with pytest.raises(AppError, match=message):
        connect(address, tmp_path).predict(**{"class_labels": "shark", "steps": 2} | bad, api_name="/generate")


def test_cancel_ends_a_drawing(address, tmp_path):
    client = connect(address, tmp_path)
    job = client.submit(class_labels="shark", images=8, steps=250, sampler="flow_heun", api_name="/generate")
    while not any("Call" in (output[1] or "") for output in job.outputs()):  # Heun's steps take two
        assert not job.done()
        time.sleep(0.05)
    assert client.predict(api_name="/cancel") == "Cancelled."
    assert job.result(timeout=60)[1] == "Cancelled."
    assert client.predict(class_labels="shark", images=1, steps=1, api_name="/generate")[1].startswith("Images: 1,")
    assert client.predict(api_name="/cancel") == "Nothing is being generated."


def test_a_full_queue_says_so(small, tmp_path):
    first, second, third = (connect(small, tmp_path) for _ in range(3))
    assert first.config["run_history"] is False
    long = {"class_labels": "shark", "images": 8, "steps": 250, "api_name": "/generate"}
    drawing = first.submit(**long)
    while not any("Step" in (output[1] or "") for output in drawing.outputs()):
        assert not drawing.done()
        time.sleep(0.05)
    quick = {"class_labels": "shark", "images": 1, "steps": 1, "api_name": "/generate"}
    waiting = second.submit(**quick)
    while not any("Waiting: 1 before" in (output[1] or "") for output in waiting.outputs()):
        assert not waiting.done()
        time.sleep(0.05)
    with pytest.raises(AppError, match="The queue is full"):
        third.predict(**quick)
    assert direct(small, "run/cancel", session=first.session_hash).json()["data"] == ["Cancelled."]
    assert waiting.result(timeout=60)[1].startswith("Images: 1,")
    # The server has to end with one under way and another waiting, as well.
    drawing, waiting = (client.submit(**long) for client in (first, second))
    while not any("Step" in (output[1] or "") for output in [*drawing.outputs(), *waiting.outputs()]):
        time.sleep(0.05)


def test_the_queue_is_the_only_way_to_a_drawing(address):
    for route in ("run/generate", "api/generate"):
        answer = direct(address, route, data=[None] * 11)
        assert answer.status_code == 404
        assert "join the queue" in answer.text
    assert direct(address, "run/cancel").json()["data"] == ["Nothing is being generated."]


def test_a_set_that_would_take_too_long_is_refused(model):
    generator = ImageGenerator(str(model))
    plain = Settings(["shark"], images=4, steps=20, guidance_scale=1.0)
    started = time.perf_counter()
    assert list(generator.generate(plain, threading.Event()))[-1].finished
    taken = time.perf_counter() - started
    assert taken / 10 < generator.estimate(plain) < taken * 10

    def ten_steps(**changes):
        changed = replace(plain, **changes)
        return generator.estimate(replace(changed, steps=30)) - generator.estimate(changed)

    once = ten_steps()
    for times, changes in (
        (2, {"images": 8}),
        (2, {"guidance_scale": 2.0}),
        (2, {"guidance_scale": 0.5}),
        (1.5, {"guidance_scale": 2.0, "guidance_start": 0.5}),
        (4, {"guidance_scale": 2.0, "sampler": "flow_heun"}),
    ):
        assert ten_steps(**changes) == pytest.approx(times * once)
    generator.max_minutes = 2 * generator.estimate(plain) / 60
    generator.check(plain)
    with pytest.raises(ValueError, match=r"would take about \d+ minutes; choose fewer images or steps"):
        generator.check(replace(plain, images=12))


def test_the_page_opens_with_images_unless_they_take_too_long(model):
    generator = ImageGenerator(str(model))
    assert sorted(generator.opening.class_labels) == sorted(generator.classes)
    assert len(generator.opening_images) == 3
    assert ImageGenerator(str(model), max_minutes=1e-4).opening_images == []


def test_the_first_images_are_of_drawn_classes_and_written_once_for_all_visitors(tmp_path):
    names = {index: f"thing {index}" for index in range(20)}
    parts = (tiny_transformer(num_classes=20, learn_sigma=False), make_scheduler("flow_euler"), tiny_vae())
    DiTClassCondPipeline(*parts, names, {"num_inference_steps": 1}).save_pretrained(tmp_path / "model")
    generator = ImageGenerator(str(tmp_path / "model"))
    page = Page(generator, tmp_path, queue_size=4)
    written = set(tmp_path.glob("*.png"))
    images, status, settings = asyncio.run(page.open())
    assert settings.class_labels == [names[index] for index in drawn_classes(20, 12)]
    assert [caption for _, caption in images] == captions(settings) and "12 classes" in status
    assert asyncio.run(page.open())[0] == images and len(set(tmp_path.glob("*.png")) - written) == 12


def test_the_space_asks_for_the_gradio_that_is_tested():
    asked = re.search(r"sdk_version: (\S+)", (APP.parent / "README.md").read_text())[1]
    assert asked == version("gradio")
    assert f"gradio=={asked}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_a_model_of_guided_jumps_is_served_with_one_step(tmp_path):
    """Its fastest preset takes jumps, which are not guided once more; every sampler works."""
    options = {"interval_embedding": True, "guidance_in_weights": "jumps", "learn_sigma": False}
    transformer = tiny_transformer(num_classes=2, **options)
    call = {"num_inference_steps": 7, "num_jumps": 3, "guidance_scale": 4.0}
    parts = (tiny_vae(), {0: "crane", 1: "shark"}, call)
    DiTClassCondPipeline(transformer, make_scheduler("flow_euler"), *parts).save_pretrained(tmp_path / "m")
    DiTClassCondPipeline(transformer, make_scheduler("flow_lcm"), *parts).save_pretrained(tmp_path / "own")
    own = ImageGenerator(str(tmp_path / "own"))  # its own sampler jumps
    assert own.scale(Settings(["crane"], guidance_scale=3.0)) == 1.0 and own.speeds == ["1 step"]
    assert own.opening.steps == 3 and own.opening.guidance_scale == 4.0  # for samplers of the velocity
    assert [own.sampler_settings(name)[0] for name in ("flow_heun", "flow_lcm", OWN_SAMPLER)] == [7, 3, 3]
    assert list(own.generate(Settings(["crane"], steps=1), threading.Event()))[-1].finished
    generator = ImageGenerator(str(tmp_path / "m"))
    assert generator.speeds == ["balanced", "fastest", "1 step"]
    assert generator.speed_settings("1 step") == [1, "flow_lcm", 0.0, 1.0]
    assert generator.speed_settings("fastest") == [3, "flow_lcm", 0.0, 1.0]
    assert generator.speed_settings("balanced") == [8, "flow_unipc", 0.0, 0.5]
    settings = replace(generator.opening, sampler="flow_lcm", steps=1)
    assert settings.guidance_scale == 4.0 and "guidance_scale=1.0" in generator.snippet(settings)
    assert generator.estimate(settings) < generator.estimate(replace(settings, sampler=OWN_SAMPLER))
    for sampler in generator.samplers:
        assert list(generator.generate(replace(settings, sampler=sampler), threading.Event()))[-1].finished


@pytest.mark.parametrize("name", ["jit", "ddt"])
def test_other_architectures_are_served(name, tmp_path):
    if name == "jit":
        transformer, vae = tiny_design("jit", in_channels=3, num_classes=2, noise_scale=2.0), None
    else:
        transformer, vae = tiny_design("ddt", num_classes=2), tiny_vae()
    pipe = DiTClassCondPipeline(transformer, make_scheduler("flow_euler"), vae, {0: "crane", 1: "shark"})
    pipe.save_pretrained(tmp_path / "m")
    generator = ImageGenerator(str(tmp_path / "m"))
    settings = Settings(["crane"], steps=2, mix_with="shark", mix_share=1.0)
    for sampler in generator.samplers:
        assert list(generator.generate(replace(settings, sampler=sampler), threading.Event()))[-1].finished
    card = (tmp_path / "m" / "README.md").read_text()
    assert {"jit": "[JiT](https://arxiv.org/abs/2511.13720)", "ddt": "2 + 2 blocks of width 48"}[name] in card


def test_any_model_is_served(tmp_path):
    """A diffusion model with its own schedule, equal names, no learned variance, no null class; one visitor stops."""
    scheduler = make_scheduler("ddim", beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    transformer = tiny_transformer(num_classes=2, learn_sigma=False, class_dropout_prob=0)
    DiTClassCondPipeline(transformer, scheduler, tiny_vae(), {0: "crane", 1: "crane"}).save_pretrained(tmp_path / "m")
    generator = ImageGenerator(str(tmp_path / "m"))
    assert generator.classes == ["crane (0)", "crane (1)"]
    assert generator.max_scale == 1
    for name in generator.samplers:
        generated = list(
            generator.generate(Settings(["crane (1)"], steps=3, guidance_scale=1.0, sampler=name), threading.Event())
        )
        assert generated[-1].finished
        config = generator.pipe.scheduler.config
        assert (config["beta_schedule"], config["prediction_type"]) == ("squaredcos_cap_v2", "v_prediction")
    with pytest.raises(ValueError, match="number from 0 to 1"):
        generator.check(Settings(["crane (1)"]))
    settings = Settings(["crane (0)"], images=8, steps=200, guidance_scale=1.0)
    calls = []
    generator.pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    stop, other = threading.Event(), threading.Event()
    mine, theirs = generator.generate(settings, stop), generator.generate(settings, other)
    assert not next(mine).finished
    waiting = threading.Thread(target=lambda: drawings.extend(theirs))
    drawings = []
    waiting.start()
    stop.set()
    assert list(mine) == []
    waiting.join(60)
    assert drawings[-1].finished
    assert len(drawings[-1].images) == 8
    assert 200 < len(calls) < 300  # all of one, and the other's up to where it was stopped
    with generator._lock:
        late = threading.Event()
        cancelled = threading.Thread(target=lambda: drawings.extend(generator.generate(settings, late)))
        cancelled.start()
        late.set()  # while it waits for its turn
    before = len(calls)
    cancelled.join(60)
    time.sleep(0.5)
    generator.close()
    assert len(calls) == before


def test_help_starts_no_server():
    result = run_forked([sys.executable, APP, "--help"], check=True)
    assert "--pretrained_model_name_or_path" in result.stdout
    assert "http" not in result.stdout.split("options")[1]


def test_classes_are_mixed():
    pipe = DiTClassCondPipeline(tiny_transformer(num_classes=3, learn_sigma=False), make_scheduler("flow_euler"))
    pipe.set_progress_bar_config(disable=True)

    def generate(label):
        options = {"num_inference_steps": 2, "output_type": "latent", "generator": [seeded_generator(0)]}
        return pipe(label, guidance_scale=3.0, **options).images

    plain, other = generate(1), generate(2)
    with mix_classes(pipe.transformer, 2, 0.0):
        torch.testing.assert_close(generate(1), plain)
    torch.testing.assert_close(generate(1), plain)
    with mix_classes(pipe.transformer, 2, 1.0):
        torch.testing.assert_close(generate(1), other)  # guidance's null class is not mixed
    with pytest.raises(RuntimeError), mix_classes(pipe.transformer, 2, 0.5):
        half = generate(1)
        raise RuntimeError
    assert not torch.allclose(half, generate(1))
    assert not torch.allclose(half, generate(2))
    tokens = tiny_transformer(num_classes=3, conditioning="in_context")
    tokens.compile()  # its label table, which the adaptive norms' sampler calls by itself, with it
    with pytest.raises(ValueError, match="compiled"), mix_classes(tokens, 1, 0.5):
        pass
    for label, share, message in ((3, 0.5, "0 to 2"), (1, 1.5, "from 0 to 1")):
        with pytest.raises(ValueError, match=message), mix_classes(pipe.transformer, label, share):
            pass
