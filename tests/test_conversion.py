"""Original checkpoints in: every dimension is read off the weights, and what does not fit is named."""

import argparse
import functools
import http.server
import json
import os
import pickle
import re
import subprocess
import sys
import threading

import pytest
import torch
from conftest import FIXTURES, ROOT, load_golden, tiny_inputs
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from testing_utils.hub_server import HubServer, Repo
from testing_utils.scripts import run_forked

from dit_hf import DiTClassCondPipeline, DiTTransformer2DModel
from dit_hf.commands.convert import main
from dit_hf.transformer_dit import sincos_positions


SCRIPT = ROOT / "conversion" / "convert_original_to_hf.py"
EXPECTED = {
    "dit_p2": {"sample_size": 8, "patch_size": 2, "in_channels": 4, "learn_sigma": True},
    "dit_p4_fixed_sigma": {"sample_size": 8, "patch_size": 4, "in_channels": 4, "learn_sigma": False},
    "dit_p8_in3": {"sample_size": 16, "patch_size": 8, "in_channels": 3, "learn_sigma": True},
}
COMMON = {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 12, "num_classes": 10, "mlp_ratio": 4.0}


def tiny_vae(**options):
    torch.manual_seed(0)
    return AutoencoderKL(
        **options,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def convert(*arguments):
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return run_forked(command)


def original_weights(name="dit_p2"):
    return torch.load(FIXTURES / f"{name}.pt", weights_only=True)


@pytest.mark.parametrize("name", EXPECTED)
def test_dimensions_are_read_off_the_weights(name):
    model = DiTTransformer2DModel.from_single_file(FIXTURES / f"{name}.pt", num_attention_heads=4)
    expected = COMMON | EXPECTED[name]
    assert {key: model.config[key] for key in expected} == expected
    assert not model.training


def test_known_widths_need_no_heads(tmp_path):
    """A file of width 384 has 6 heads, as DiT-S has."""
    weights = original_weights("dit_p4_fixed_sigma")
    torch.save({key: widened(key, value) for key, value in weights.items()}, tmp_path / "wide.pt")
    assert DiTTransformer2DModel.from_single_file(tmp_path / "wide.pt").config.num_attention_heads == 6


def widened(key, value):
    """A weight of the fixture with every multiple of its width 48 eight times as large."""
    kept = {"t_embedder.mlp.0.weight": 1, "x_embedder.proj.weight": 1}.get(key, 2)
    shape = [side * 8 if side % 48 == 0 and axis < kept else side for axis, side in enumerate(value.shape)]
    return sincos_positions(2, 2, 384) if key == "pos_embed" else torch.zeros(shape)


def test_safetensors_and_training_weights(tmp_path):
    save_file(original_weights(), tmp_path / "dit.safetensors")
    inputs = tiny_inputs()
    with torch.no_grad():
        outputs = [
            DiTTransformer2DModel.from_single_file(file, num_attention_heads=4, weights=weights)(**inputs).sample
            for file, weights in (
                (FIXTURES / "dit_p2.pt", "ema"),
                (tmp_path / "dit.safetensors", "ema"),
                (FIXTURES / "dit_p2_train.pt", "ema"),
                (FIXTURES / "dit_p2_train.pt", "model"),
            )
        ]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[2], outputs[3])


def test_half_precision():
    model = DiTTransformer2DModel.from_single_file(
        FIXTURES / "dit_p2.pt", num_attention_heads=4, torch_dtype=torch.bfloat16
    )
    assert model.proj_out.weight.dtype == torch.bfloat16
    assert model.time_embed.linear_1.weight.dtype == torch.float32
    with torch.no_grad():
        output = model(**tiny_inputs() | {"hidden_states": tiny_inputs()["hidden_states"].bfloat16()}).sample
    assert output.dtype == torch.bfloat16


def test_script_writes_a_pipeline(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "vae")
    (tmp_path / "names.json").write_text(json.dumps([f"class {index}" for index in range(10)]))
    result = convert(
        *("--checkpoint_path", FIXTURES / "dit_p2_train.pt", "--output_dir", tmp_path / "out"),
        *("--num_attention_heads", 4, "--vae", tmp_path / "vae", "--id2label", tmp_path / "names.json"),
    )
    assert result.returncode == 0, result.stderr
    assert "10 classes" in result.stdout
    folders = {path.relative_to(tmp_path / "out").parts[0] for path in (tmp_path / "out").rglob("*")}
    code_and_card = {"pipeline_dit_class_cond.py", "README.md"}
    assert folders == {"model_index.json", "transformer", "scheduler", "vae"} | code_and_card
    pipe = DiTClassCondPipeline.from_pretrained(tmp_path / "out")
    assert pipe.labels["class 7"] == 7
    golden = load_golden("dit_p2_train.ema.io")
    with torch.no_grad():
        output = pipe.transformer(golden["x"], golden["t"], golden["y"]).sample
    torch.testing.assert_close(output, golden["out"], rtol=0, atol=1e-5)
    assert pipe("class 3", num_inference_steps=2, output_type="pt").images.shape == (1, 3, 16, 16)
    again = convert("--checkpoint_path", FIXTURES / "dit_p2.pt", "--output_dir", tmp_path / "out")
    assert again.returncode == 2
    assert "not empty" in again.stderr


def test_fixed_variance_gets_a_scheduler_without_learned_variance(tmp_path):
    file = FIXTURES / "dit_p4_fixed_sigma.pt"
    result = convert("--checkpoint_path", file, "--output_dir", tmp_path / "out", "--num_attention_heads", 4)
    assert result.returncode == 0, result.stderr
    pipe = DiTClassCondPipeline.from_pretrained(tmp_path / "out")
    assert pipe(3, num_inference_steps=2, output_type="latent").images.isfinite().all()


class Stranger:
    """Nothing that a checkpoint may hold."""


def write_damaged(kind, path):
    weights = original_weights()
    if kind == "missing key":
        del weights["blocks.1.attn.proj.bias"]
    elif kind == "extra key":
        weights["blocks.1.attn.q_norm.weight"] = torch.ones(12)
    elif kind == "no DiT":
        weights = {"conv.weight": torch.ones(3)}
    elif kind == "stray value":
        weights["note"] = "hello"
    elif kind == "wrong shape":
        weights["blocks.1.attn.proj.bias"] = torch.ones(47)
    elif kind == "wrong rank":
        weights["x_embedder.proj.weight"] = torch.ones(48, 16)
    elif kind == "other positions":
        weights["pos_embed"] = torch.randn(1, 16, 48)
    elif kind == "tensor for weights":
        weights = {"ema": torch.ones(3)}
    elif kind == "pickle":
        weights = {"ema": weights, "args": argparse.Namespace(model="DiT"), "extra": Stranger()}
    torch.save(weights, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:200_000])
    if kind == "text":
        path.write_text("not a checkpoint")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing key", "blocks.1.attn.proj.bias"),
        ("extra key", "blocks.1.attn.q_norm.weight"),
        ("no DiT", "x_embedder.proj.weight"),
        ("stray value", "note"),
        ("wrong shape", "blocks.1.attn.proj.bias"),
        ("wrong rank", "x_embedder.proj.weight"),
        ("other positions", "pos_embed"),
        ("tensor for weights", "Tensor"),
        ("pickle", "Stranger"),
        ("truncated", "Can't read"),
        ("text", "Can't read"),
    ],
)
def test_bad_files_are_refused(tmp_path, kind, message):
    write_damaged(kind, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=rf"bad\.pt.*{re.escape(message)}|{message}.*bad\.pt"):
        DiTTransformer2DModel.from_single_file(tmp_path / "bad.pt", num_attention_heads=4)


@pytest.mark.parametrize("kind", ["missing key", "truncated"])
def test_script_exits_with_2_and_leaves_nothing(tmp_path, kind):
    write_damaged(kind, tmp_path / "bad.pt")
    result = convert(
        *("--checkpoint_path", tmp_path / "bad.pt", "--output_dir", tmp_path / "out", "--num_attention_heads", 4)
    )
    assert result.returncode == 2, result.stderr
    assert "bad.pt" in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pt"]


def test_pickles_are_not_executed(tmp_path):
    marker = tmp_path / "executed"

    class Attack:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    (tmp_path / "attack.pt").write_bytes(pickle.dumps({"ema": Attack()}))
    torch.save({"ema": Attack()}, tmp_path / "attack2.pt")
    for name in ("attack.pt", "attack2.pt"):
        with pytest.raises(ValueError, match=name):
            DiTTransformer2DModel.from_single_file(tmp_path / name)
    assert not marker.exists()


def test_other_mistakes_are_named(tmp_path):
    file = FIXTURES / "dit_p2.pt"
    with pytest.raises(ValueError, match="width 48 .*num_attention_heads"):
        DiTTransformer2DModel.from_single_file(file)
    with pytest.raises(ValueError, match="48 is not divisible by 5"):
        DiTTransformer2DModel.from_single_file(file, num_attention_heads=5)
    with pytest.raises(ValueError, match="There is no file"):
        DiTTransformer2DModel.from_single_file(tmp_path / "absent.pt")
    with pytest.raises(ValueError, match="'average'"):
        DiTTransformer2DModel.from_single_file(file, num_attention_heads=4, weights="average")
    with pytest.raises(ValueError, match="'unet'"):
        DiTTransformer2DModel.from_single_file(file, num_attention_heads=4, family="unet")
    for path in (None, b"x", [], 3, "\ud800"):
        with pytest.raises(ValueError, match="`pretrained_model_link_or_path` is"):
            DiTTransformer2DModel.from_single_file(path)
    odd = {"num_attention_heads": ("4", True, 4.0, ["4"]), "weights": ([], None), "family": ([],)}
    odd |= {"has_null_class": ("x", 3), "dtype": (torch.float8_e4m3fn, "int8", 3)}
    for name, value in ((name, value) for name, values in odd.items() for value in values):
        with pytest.raises(ValueError, match=f"`{name}` is"):
            DiTTransformer2DModel.from_single_file(file, **({"num_attention_heads": 4} | {name: value}))
    (tmp_path / "names.json").write_text('["one", "two"]')
    result = convert(
        *("--checkpoint_path", file, "--output_dir", tmp_path / "out", "--num_attention_heads", 4),
        *("--id2label", tmp_path / "names.json"),
    )
    assert result.returncode == 2
    assert "names 2 classes" in result.stderr


# Links


LOAD = """
import sys, time
from dit_hf import DiTTransformer2DModel
started = time.monotonic()
for link in sys.argv[1:]:
    try:
        model = DiTTransformer2DModel.from_single_file(link, num_attention_heads=4, family="dit", dtype="bfloat16")
        print(model.dtype, model.config.num_classes)
    except (OSError, ValueError) as error:
        print(f"{type(error).__name__}: {error}")
print(time.monotonic() - started)
"""


def load_links(links, environment):
    """What each link gives in a fresh process, and the seconds that loading took."""
    command = [sys.executable, "-c", LOAD, *links]
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | environment
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    *lines, seconds = result.stdout.splitlines()
    return lines, float(seconds)


@pytest.fixture
def file_server():
    """Any server: the fixtures' folder on loopback, with the paths that were asked for."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append((self.command, self.path))

    asked = []
    handler = functools.partial(Handler, directory=FIXTURES)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_links_are_downloaded_once(tmp_path, file_server):
    address, asked = file_server
    with HubServer() as hub:
        repo = hub.repos["models", "user/dit"] = Repo()
        repo.commit("main", {"weights/dit.pt": (FIXTURES / "dit_p2.pt").read_bytes()})
        links = [f"{hub.endpoint}/user/dit/{kind}/main/weights/dit.pt" for kind in ("blob", "resolve")]
        links += [f"{address}/dit_p2.pt", f"{address}/absent.pt", f"{hub.endpoint}/user/dit/blob/main/absent.pt"]
        links += [f"{hub.endpoint}/user/dit", f"{hub.endpoint}/user/absent/blob/main/dit.pt"]
        lines, _ = load_links(links, hub.environment(tmp_path))
        assert lines[:3] == ["torch.bfloat16 10"] * 3
        assert lines[3].startswith(f"OSError: Can't download {address}/absent.pt: ") and "404" in lines[3]
        assert lines[4].startswith("OSError: Can't download absent.pt of user/dit: ")
        assert lines[5].startswith("ValueError: ") and "is not a link to a model file" in lines[5]
        assert lines[6].startswith("OSError: Can't download dit.pt of user/absent: ")
        assert len(lines) == 7  # one line each
        assert asked.count(("GET", "/dit_p2.pt")) == 1
        offline, _ = load_links(links[:3], hub.environment(tmp_path) | {"HF_HUB_OFFLINE": "1"})
        assert offline == lines[:3]
        assert asked.count(("GET", "/dit_p2.pt")) == 1


@pytest.mark.parametrize(
    "link", ["http://x:y/dit.pt", "http://\0/dit.pt", "http://x/a\nb.pt", "https://x:99999/dit.pt"]
)
def test_what_is_no_address_is_named(link):
    with pytest.raises(ValueError, match="is not the address of a file"):
        DiTTransformer2DModel.from_single_file(link)


def test_no_network_is_reported_at_once(tmp_path):
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    links = ["http://127.0.0.1:9/user/dit/blob/main/dit.pt", "http://127.0.0.1:10/dit.pt"]
    lines, seconds = load_links(links, environment)
    assert seconds < 10  # huggingface_hub alone would try for half a minute
    assert "no connection to http://127.0.0.1:9" in lines[0] and "not in the cache" in lines[0]
    assert "Check the address and the network" in lines[1]


# `dit-hf convert`


def test_a_vae_of_other_channels_is_refused_before_anything_is_read(tmp_path):
    tiny_vae(latent_channels=16).save_pretrained(tmp_path / "vae")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_text("not read")
    flags = ["--checkpoint_path", FIXTURES / "dit_p2.pt", "--output_dir", tmp_path / "out"]
    flags += ["--num_attention_heads", 4]
    for more, message in (
        (["--vae", tmp_path / "vae"], "has latents of 16 channels, and the checkpoint's model takes 4"),
        (["--vae", tmp_path / "vae", "--dry_run"], "has latents of 16 channels"),
        (["--vae", tmp_path], "has no config.json"),
        (["--vae", tmp_path / "nowhere"], "must be the folder or the Hub id of an autoencoder"),
        (["--vae", "user/vae"], "Can't download config.json of user/vae: "),
    ):
        result = convert(*flags, *more)
        assert result.returncode == 2
        assert message in result.stderr.splitlines()[-1]
        assert "Traceback" not in result.stderr
        assert not (tmp_path / "out").exists()


def test_an_empty_folder_is_replaced_and_the_autoencoder_checked(tmp_path, monkeypatch):
    flags = ["--checkpoint_path", FIXTURES / "dit_p2.pt", "--num_attention_heads", 4, "--skip_verification"]
    flags += ["--vae", tmp_path / "vae", "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, flags)])
    (tmp_path / "out").mkdir()
    replace = os.replace

    def replace_as_on_windows(source, target):
        if os.path.isdir(target):
            raise PermissionError(f"Access is denied: {target}")
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_as_on_windows)
    tiny_vae(in_channels=1).save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="encodes images of 1 channels; images are read as RGB"):
        main()
    tiny_vae().save_pretrained(tmp_path / "vae")
    main()
    pipe = DiTClassCondPipeline.from_pretrained(tmp_path / "out")
    assert pipe.vae.dtype == torch.float32


def test_a_second_run_publishes_what_the_first_could_not(tmp_path):
    """The folder is converted again to the side and compared; one that differs is not published."""
    names = [f"Klasse {index} ü" for index in range(10)]
    (tmp_path / "names.json").write_text(json.dumps(names, ensure_ascii=False), encoding="utf-8")
    tiny_vae().save_pretrained(tmp_path / "vae")
    command = [sys.executable, SCRIPT, "--checkpoint_path", FIXTURES / "dit_p2.pt", "--output_dir", tmp_path / "out"]
    command += ["--num_attention_heads", "4", "--family", "dit", "--vae", tmp_path / "vae"]
    command += ["--id2label", tmp_path / "names.json", "--push_to_hub", "--hub_model_id", "user/tiny"]

    with HubServer() as hub:
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        environment |= hub.environment(tmp_path / "home")

        def run():
            return subprocess.run(command, capture_output=True, text=True, env=environment)

        hub.fail("POST", "/commit/", 400)
        failed = run()
        assert failed.returncode == 2
        assert "Publishing to user/tiny failed" in failed.stderr
        with (tmp_path / "out" / "README.md").open("a", encoding="utf-8") as card:
            card.write("\nMy words.\n")
        again = run()
        assert again.returncode == 0, again.stderr
        assert "Published:" in again.stdout
        assert "pipeline_dit_class_cond.py" in hub.files("user/tiny")
        assert "My words." in hub.files("user/tiny")["README.md"].decode()
    other = run_forked([*command, "--dtype", "bfloat16"])  # refused before it asks the Hub
    assert other.returncode == 2
    assert "is not empty, and its transformer/" in other.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "names.json", "out", "vae"]
