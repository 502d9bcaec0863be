"""The Space: a real server on loopback, asked by many at once; its snippet; classes mixed."""

import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import tiny_transformer, tiny_vae
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image
from testing_utils.scripts import run_forked
from testing_utils.space_server import APP, serve

from dit_hf import DiTClassCondPipeline, make_scheduler, mix_classes
from dit_hf.seeds import seeded_generator


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    names = {0: "tench, Tinca tinca", 1: "goldfish, Carassius auratus", 2: "shark"}
    transformer = tiny_transformer(num_classes=3, learn_sigma=False, num_layers=24)  # slow enough to be cancelled
    DiTClassCondPipeline(transformer, make_scheduler("flow_euler"), tiny_vae(), names).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def address(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("temporary")
    with serve(model, folder) as address:
        yield address
    assert list(folder.iterdir()) == []  # all that the server wrote is gone


def connect(address, folder):
    return Client(address, verbose=False, download_files=str(folder))


def pixels(pictures):
    return np.stack([np.asarray(Image.open(picture["image"])) for picture in pictures])


def test_the_same_settings_give_the_same_pictures_here_and_by_the_snippet(address, tmp_path):
    client = connect(address, tmp_path)
    options = {"class_labels": ["goldfish, Carassius auratus", "shark"], "images": 2, "steps": 3}
    options |= {"guidance_end": 0.5, "sampler": "flow_heun", "mix_with": "tench, Tinca tinca", "mix_share": 0.5}
    pictures, status, seed, snippet = client.predict(**options, seed=5, api_name="/generate")
    assert status == "Pictures: 4, steps: 3, seed: 5."
    assert [picture["caption"] for picture in pictures] == ["goldfish", "goldfish", "shark", "shark"]
    again = client.predict(**options, seed=5, api_name="/generate")[0]
    other = client.predict(**options, seed=6, api_name="/generate")[0]
    assert np.array_equal(pixels(pictures), pixels(again))
    assert not np.array_equal(pixels(pictures), pixels(other))
    found = {}
    exec(snippet, found)
    assert np.array_equal(pixels(pictures), np.stack([np.asarray(image) for image in found["images"]]))
    settings = json.loads(Image.open(pictures[0]["image"]).text["dit_hf"])
    assert settings | options == settings
    assert settings["seed"] == seed == 5
    random = client.predict(**options, seed=5, random_seed=True, api_name="/generate")
    assert random[2] != 5


def test_twenty_at_once_each_get_their_own(address, tmp_path):
    def ask(index):
        name = ["tench, Tinca tinca", "goldfish, Carassius auratus", "shark"][index % 3]
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
    assert len({picture.tobytes() for picture in together}) == 20
    again = tmp_path / "again"
    again.mkdir()
    client = connect(address, again)
    alone = client.predict(class_labels="goldfish, Carassius auratus", images=1, seed=7, steps=2, api_name="/generate")
    assert np.array_equal(together[7], pixels(alone[0]))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"steps": 10**9}, "250"),
        ({"steps": 2.5}, "whole number from 1 to 250"),
        ({"seed": -1}, "minimum"),
        ({"images": 20, "class_labels": ["shark", "tench, Tinca tinca"]}, "at most 32"),
        ({"class_labels": "/etc/passwd"}, "no class '/etc/passwd'"),
        ({"class_labels": ["shark"] * 33}, "32"),
        ({"images": 32, "steps": 100}, "at most 2000"),
        ({"class_labels": []}, "at least one class"),
        ({"sampler": "ddim"}, "not in the list"),
        ({"guidance_start": 0.5, "guidance_end": 0.5}, "start before it ends"),
    ],
)
def test_requests_out_of_bounds_are_refused(address, tmp_path, bad, message):
    with pytest.raises(AppError, match=message):
        connect(address, tmp_path).predict(**{"class_labels": "shark", "steps": 2} | bad, api_name="/generate")


def test_cancel_ends_a_drawing(address, tmp_path):
    client = connect(address, tmp_path)
    job = client.submit(class_labels="shark", images=8, steps=250, sampler="flow_heun", api_name="/generate")
    while not any("Step" in (output[1] or "") for output in job.outputs()):
        assert not job.done()
        time.sleep(0.05)
    assert client.predict(api_name="/cancel") == "Cancelled."
    assert job.result(timeout=60)[1] == "Cancelled."
    assert client.predict(class_labels="shark", images=1, steps=1, api_name="/generate")[1].startswith("Pictures: 1,")


def test_any_model_is_served(tmp_path, monkeypatch):
    """A diffusion model with its own schedule, equal names, no learned variance, no null class; one visitor stops."""
    monkeypatch.syspath_prepend(APP.parent)
    from studio import Settings, Studio

    scheduler = make_scheduler("ddim", beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    transformer = tiny_transformer(num_classes=2, learn_sigma=False, class_dropout_prob=0)
    DiTClassCondPipeline(transformer, scheduler, tiny_vae(), {0: "crane", 1: "crane"}).save_pretrained(tmp_path / "m")
    studio = Studio(str(tmp_path / "m"))
    assert studio.classes == ["crane (0)", "crane (1)"]
    assert studio.max_scale == 1
    for name in studio.samplers:
        drawn = list(
            studio.draw(Settings(["crane (1)"], steps=3, guidance_scale=1.0, sampler=name), threading.Event())
        )
        assert drawn[-1].finished
        config = studio.pipe.scheduler.config
        assert (config["beta_schedule"], config["prediction_type"]) == ("squaredcos_cap_v2", "v_prediction")
    with pytest.raises(ValueError, match="from 0 to 1"):
        studio.check(Settings(["crane (1)"]))
    settings = Settings(["crane (0)"], images=8, steps=200, guidance_scale=1.0)
    calls = []
    studio.pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    stop, other = threading.Event(), threading.Event()
    mine, theirs = studio.draw(settings, stop), studio.draw(settings, other)
    assert not next(mine).finished
    waiting = threading.Thread(target=lambda: drawings.extend(theirs))
    drawings = []
    waiting.start()
    stop.set()
    assert list(mine) == []
    waiting.join(60)
    assert drawings[-1].finished
    assert len(drawings[-1].pictures) == 8
    assert 200 < len(calls) < 300  # all of one, and the other's up to where it was stopped
    with studio._lock:
        late = threading.Event()
        cancelled = threading.Thread(target=lambda: drawings.extend(studio.draw(settings, late)))
        cancelled.start()
        late.set()  # while it waits for its turn
    before = len(calls)
    cancelled.join(60)
    time.sleep(0.5)
    studio.wait()
    assert len(calls) == before


def test_help_starts_no_server():
    result = run_forked([sys.executable, APP, "--help"], check=True)
    assert "--model" in result.stdout
    assert "http" not in result.stdout.split("options")[1]


def test_classes_are_mixed():
    pipe = DiTClassCondPipeline(tiny_transformer(num_classes=3, learn_sigma=False), make_scheduler("flow_euler"))
    pipe.set_progress_bar_config(disable=True)

    def draw(label):
        options = {"num_inference_steps": 2, "output_type": "latent", "generator": [seeded_generator(0)]}
        return pipe(label, guidance_scale=3.0, **options).images

    with mix_classes(pipe.transformer, 2, 0.0):
        torch.testing.assert_close(draw(1), draw(1))
        unmixed = draw(1)
    torch.testing.assert_close(unmixed, draw(1))
    other = draw(2)
    with mix_classes(pipe.transformer, 2, 1.0):
        torch.testing.assert_close(draw(1), other)  # guidance's null class is not mixed
    with pytest.raises(RuntimeError), mix_classes(pipe.transformer, 2, 0.5):
        half = draw(1)
        raise RuntimeError
    assert not torch.allclose(half, draw(1))
    assert not torch.allclose(half, draw(2))
    for label, share, message in ((3, 0.5, "0 to 2"), (1, 1.5, "from 0 to 1")):
        with pytest.raises(ValueError, match=message), mix_classes(pipe.transformer, label, share):
            pass
