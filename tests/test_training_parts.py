"""Parts of training by themselves: averages of the weights, alignment of representations, uploads during training."""

import os
import socket
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, tiny_design, tiny_inputs, tiny_transformer
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from testing_utils.hub_server import HubServer
from testing_utils.training_runs import refused, run, train_command
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    ViTImageProcessor,
)

from dit_hf import DiTClassCondPipeline, make_scheduler
from dit_hf.commands import train as train_command_module
from dit_hf.evaluation.cards import card_results
from dit_hf.evaluation.extractors import extract, load_extractor
from dit_hf.hub import CardFacts, write_card
from dit_hf.hub.model_card import PIPELINE_TAG
from dit_hf.training.alignment import AlignmentHead, load_encoder
from dit_hf.training.ema import PowerAverages, average_after_training, profile_exponent
from dit_hf.training.objectives import EpsilonObjective
from dit_hf.training.result import training_facts


def profile_average(values, sigma_rel):
    """Mean of the values weighted by t to the power of gamma, in numbers rather than as a recursion."""
    times = torch.arange(1, len(values) + 1, dtype=torch.float64)
    weights = times ** profile_exponent(sigma_rel)
    return (weights * torch.tensor(values, dtype=torch.float64)).sum() / weights.sum()


def test_profiles_have_the_width_they_are_named_after():
    for sigma_rel in (0.05, 0.1, 0.2, 0.28):
        gamma = profile_exponent(sigma_rel)
        times = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
        weights = times**gamma / (times**gamma).sum()
        mean = (weights * times).sum()
        assert ((weights * (times - mean) ** 2).sum().sqrt() - sigma_rel).abs() < 1e-6
    with pytest.raises(ValueError, match=r"sigma_rel is 0.3; it must be above 1e-6 and below 0.2887"):
        profile_exponent(0.3)


def test_any_average_is_found_when_training_is_over(tmp_path):
    values = [float(torch.sin(torch.tensor(step / 40.0))) + step / 200 for step in range(400)]
    weight = torch.nn.Parameter(torch.zeros(1))
    averages = PowerAverages([weight])
    for step, value in enumerate(values, start=1):
        with torch.no_grad():
            weight.fill_(value)
        averages.step([weight])
        if step % 25 == 0:
            averages.save_snapshot(tmp_path, ["w"])
    for sigma_rel in (0.05, 0.1):
        torch.testing.assert_close(
            averages.averages[sigma_rel][0].double().squeeze(), profile_average(values, sigma_rel), rtol=0, atol=5e-3
        )
    for sigma_rel in (0.06, 0.08, 0.15, 0.2):
        found = average_after_training(tmp_path, sigma_rel)["w"].double().squeeze()
        torch.testing.assert_close(found, profile_average(values, sigma_rel), rtol=0, atol=0.02)
    early = average_after_training(tmp_path, 0.1, step=200)["w"].double().squeeze()
    torch.testing.assert_close(early, profile_average(values[:200], 0.1), rtol=0, atol=5e-3)
    for folder, step in ((tmp_path / "nothing", None), (tmp_path, 401)):
        with pytest.raises(ValueError, match="--ema_profiles"):
            average_after_training(folder, 0.1, step)
    (tmp_path / "ema-0-0.05.safetensors").write_text("no snapshot by its name, so left alone")
    newest = tmp_path / "ema-400-0.10.safetensors"
    whole = newest.read_bytes()
    for content, message in ((whole[:-1], "can't be read as snapshot of averages"), (b"", "can't be read")):
        newest.write_bytes(content)
        with pytest.raises(ValueError, match=f"ema-400-0.10.safetensors {message}"):
            average_after_training(tmp_path, 0.1)
    bad, other = {"w": torch.full((1,), torch.nan).half()}, {"v": torch.ones(1)}
    integers = {"w": torch.ones(1, dtype=torch.int8)}
    for tensors, message in ((bad, "w is not finite"), (other, "another"), (integers, "torch.int8, not float16")):
        save_file(tensors, newest)
        with pytest.raises(ValueError, match=f"ema-400-0.10.safetensors is .*{message}"):
            average_after_training(tmp_path, 0.1)
    newest.unlink()
    with pytest.raises(ValueError, match="lacks ema-400-0.10.safetensors"):
        average_after_training(tmp_path, 0.1)
    for width in ("0.05", "0.10"):
        (tmp_path / f"ema-300-{width}.safetensors").unlink()
    average_after_training(tmp_path, 0.1, 375)
    with pytest.raises(ValueError, match="lacks ema-300-0.05.safetensors; restore it, or pass a --step before 300"):
        average_after_training(tmp_path, 0.1, 375, range(25, 401, 25))
    (tmp_path / "ema-0-0.05.safetensors").unlink()
    PowerAverages.drop_snapshots(tmp_path, 200)
    assert max(int(path.name.split("-")[1]) for path in tmp_path.iterdir()) == 200


def test_a_run_with_profiles_gives_other_averages(workspace, tmp_path, monkeypatch, capsys):
    flags = {"ema_profiles": "", "max_train_steps": 4, "checkpointing_steps": 1, "report_to": "tensorboard"}
    run(train_command(workspace, tmp_path / "run", **flags, lr_warmup_steps=0))
    assert list((tmp_path / "run" / "logs").rglob("events.out*"))
    script = ROOT / "examples" / "train_class_cond" / "choose_ema.py"
    run([sys.executable, script, "--run", tmp_path / "run", "--sigma_rel", "0.1", "--output_dir", tmp_path / "ema"])
    again = [sys.executable, script, "--run", tmp_path / "run", "--sigma_rel", "0.1", "--output_dir"]
    for folder, flags, message in (
        (tmp_path / "ema", (), "is not empty; choose a new folder"),
        (tmp_path / "run" / "pipeline", (), "is not empty"),
        (tmp_path / "run" / "train_log.jsonl", (), "is a file"),
        (tmp_path / "new", ("--sigma_rel", "nan"), "--sigma_rel: 'nan' is not a finite number"),
    ):
        assert message in refused([*again, folder, *flags], monkeypatch, capsys)
    assert not (tmp_path / "new").exists()
    card = (tmp_path / "ema" / "README.md").read_text()
    assert "averaged after training, sigma_rel 0.1" in card
    assert "learning_rate" not in card  # of other weights
    chosen = DiTClassCondPipeline.from_pretrained(tmp_path / "ema").transformer.state_dict()
    snapshot = load_file(tmp_path / "run" / "ema" / "ema-4-0.10.safetensors")
    for name, weight in chosen.items():
        torch.testing.assert_close(weight, snapshot[name].float(), rtol=0, atol=1e-4)

    for path in (tmp_path / "run" / "ema").iterdir():
        save_file({name: tensor for name, tensor in load_file(path).items() if name != "proj_out.bias"}, path)
    assert "snapshots have no proj_out.bias" in refused([*again, tmp_path / "new"], monkeypatch, capsys)
    for path in (tmp_path / "run" / "ema").glob("ema-4-*"):
        path.unlink()
    assert "lacks ema-4-0.05" in refused([*again, tmp_path / "new"], monkeypatch, capsys)


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """A tiny DINOv2 with random weights, as transformers saves it."""
    folder = tmp_path_factory.mktemp("dino")
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def test_encoders_say_where_in_the_image_a_feature_is(dino, tmp_path):
    image = torch.full((1, 3, 64, 64), -1.0)
    changed = image.clone()
    changed[..., 48:, :16] = 1.0  # bottom left
    for name, shape in (("efficientnet-lite0", (1, 1280, 4, 4)), (str(dino), (1, 24, 4, 4))):
        encoder = load_encoder(name)
        features, others = encoder(image), encoder(changed)
        assert features.shape == shape
        difference = (others - features).square().sum(dim=1)[0]
        row, column = divmod(difference.argmax().item(), 4)
        assert row >= 2 and column <= 1, name
    with pytest.raises(ValueError, match="is neither 'efficientnet-lite0' nor a vision model"):
        load_encoder(str(tmp_path))


def test_a_vision_model_of_transformers_measures_images(dino):
    extractor = load_extractor(str(dino))
    images = torch.randint(0, 256, (5, 3, 40, 40), dtype=torch.uint8)
    found = extract(images, extractor, batch_size=2)
    assert found.features.shape == (5, 24)
    assert (found.spatial, found.logits) == (None, None)
    assert found.extractor["resize"].startswith("28×28, bicubic")
    model, processor = Dinov2Model.from_pretrained(dino).eval(), ViTImageProcessor.from_pretrained(dino)
    resized = torch.nn.functional.interpolate(images / 127.5 - 1, size=(28, 28), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (processor.image_mean, processor.image_std))
    with torch.no_grad():
        expected = model((resized.clamp(-1, 1) / 2 + 0.5 - mean) / std).last_hidden_state[:, 0]
    torch.testing.assert_close(found.features, expected, rtol=1e-4, atol=1e-4)


def test_a_vision_model_with_buffers_of_its_own_measures_images(tmp_path):
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=28, patch_size=7)).save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    found = extract(torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8), load_extractor(str(tmp_path)))
    assert found.features.shape == (3, 24)
    assert "mean [0.4815, 0.4578, 0.4082]" in found.extractor["resize"]


@pytest.mark.parametrize("name", ["adaln_zero", "in_context", "jit", "ddt"])
def test_alignment_teaches_a_block_the_features(name):
    transformer = tiny_design(name).train()
    torch.manual_seed(0)
    head = AlignmentHead(transformer, 1, 6)
    features = torch.randn(3, 6, 4, 4)
    optimizer = torch.optim.Adam([*transformer.parameters(), *head.parameters()], lr=1e-3)
    found = []
    for _ in range(60):
        transformer(**tiny_inputs(), return_dict=False)
        loss = head({"features": features})
        assert loss.shape == (3,)
        found.append(loss.mean().item())
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    assert found[0] == pytest.approx(1, abs=0.3)
    assert found[-1] < 0.5 * found[0]
    touched = {
        name.split(".")[1] for name, p in transformer.named_parameters() if "blocks" in name and p.grad is not None
    }
    assert touched == {"0"}  # later blocks learn nothing from it
    with pytest.raises(ValueError, match="depth is 3; the transformer has blocks 1 to 2"):
        AlignmentHead(transformer, 3, 6)


def test_samples_are_published_while_training_goes_on(workspace, tmp_path):
    with HubServer() as hub:
        environment = hub.environment(tmp_path / "home")
        flags = {"max_train_steps": 2, "validation_steps": 1, "hub_model_id": "user/watched", "push_to_hub": ""}
        run(train_command(workspace, tmp_path / "run", **flags), env=os.environ | environment)
        files = hub.files("user/watched")
        assert {"samples/step-000001.png", "samples.png", "loss.png", "model_index.json"} <= files.keys()
        assert "(loss.png)" in files["README.md"].decode()


def test_a_hub_that_never_answers_holds_nothing_up(tmp_path):
    """The process ends although a request hangs for ever."""
    code = (
        "from dit_hf.hub import BackgroundUploads\n"
        "uploads = BackgroundUploads('user/silent')\n"
        f"uploads.send({str(tmp_path / 'a.png')!r}, 'a.png')\n"
        "uploads.close(timeout=1)\n"
    )
    (tmp_path / "a.png").write_bytes(b"picture")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        environment = {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_TOKEN": "hf_none"}
        run([sys.executable, "-c", code], env=os.environ | environment, timeout=60)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_uploads_are_closed_whatever_ends_the_training(tmp_path, monkeypatch, error):
    closed = []

    class Uploads:
        def __init__(self, repo_id):
            self.close = lambda: closed.append(repo_id)

    def train(validation, must_fall):
        assert not closed
        if error is not None:
            raise error
        return 1

    monkeypatch.setattr(train_command_module, "BackgroundUploads", Uploads)
    monkeypatch.setattr(train_command_module, "Validation", lambda *parts, **options: None)
    names = "output_dir seed validation_classes validation_images_per_class"
    args = SimpleNamespace(**dict.fromkeys(names.split()))
    args.push_to_hub, args.hub_model_id = True, "user/watched"
    args.pretrained_model_name_or_path, args.learning_rate = "base", 1e-3
    trainer = SimpleNamespace(transformer=None, train=train, stopped_by=15)
    accelerator = SimpleNamespace(is_main_process=True, print=print)
    training = SimpleNamespace(args=args, accelerator=accelerator, held_out=None, sampling={})
    training.trainer, training.pipeline = lambda: trainer, lambda transformer: None
    with pytest.raises(error) if error else nullcontext():
        assert train_command_module.Training.run(training) == 15
    assert closed == ["user/watched"]


def test_the_recommended_call_outlives_fine_tuning(tmp_path):
    call = {"num_inference_steps": 7, "guidance_scale": 2.0, "guidance_interval": [0.0, 0.5]}
    parts = (tiny_transformer(num_classes=2), make_scheduler("ddim"), None, {0: "a", 1: "b"})
    DiTClassCondPipeline(*parts, call).save_pretrained(tmp_path)
    for source, dropout, expected in ((tmp_path, 0.1, call), (tmp_path, 0.0, {"num_inference_steps": 7})):
        args = SimpleNamespace(pretrained_model_name_or_path=source, class_dropout_prob=dropout)
        training = SimpleNamespace(
            args=args, objective=EpsilonObjective(), scheduler=parts[1], vae=None, names=["a", "b"]
        )
        model = tiny_transformer(num_classes=2, class_dropout_prob=dropout)
        assert train_command_module.Training.pipeline(training, model).config.recommended_call == expected


def test_training_and_the_metrics_command_write_one_row(tmp_path):
    pipe = DiTClassCondPipeline(tiny_transformer(num_classes=2), make_scheduler("ddim"), None, {0: "a", 1: "b"})
    write_card(pipe, tmp_path, facts=training_facts({}, 0, metrics={"fd_efficientnet_lite0": 600.0}))
    measured = {"fd_efficientnet_lite0": {"value": 500.0}}
    recipe = {"extractor": {"name": "efficientnet-lite0"}, "samples": "samples.npz"}
    results = card_results(measured, recipe, "held-out images", PIPELINE_TAG)
    write_card(pipe, tmp_path, facts=CardFacts(results=results))
    (result,) = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert (result.metric_type, result.metric_value) == ("fd_efficientnet_lite0", 500.0)


def test_the_help_names_the_command_of_averages(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", "--help"])
    with pytest.raises(SystemExit):
        train_command_module.parse_args()
    assert "dit_hf.commands.choose_ema" in capsys.readouterr().out
