"""Stage 1 of RAE from its own files: the images that its code decodes, and back to the same files."""

import json
import re

import pytest
import torch
from conftest import FIXTURES, load_golden
from diffusers import AutoencoderRAE
from safetensors.torch import load_file, save_file
from test_autoencoder_conversion import refused, run_main
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from dit_hf import DiTClassCondPipeline
from dit_hf.checkpoints.autoencoders import AutoencoderHints, original_autoencoder, parse_autoencoder
from dit_hf.checkpoints.autoencoders.encoder import FILES
from dit_hf.checkpoints.autoencoders.rae import RAE_DECODER
from dit_hf.checkpoints.parsing import parse_checkpoint
from dit_hf.commands import convert, export, verify
from dit_hf.conversion import build_pipeline
from dit_hf.data.autoencoders import encode_posterior, load_autoencoder
from dit_hf.pipeline_dit_class_cond import rae_positions


STATS = FIXTURES / "rae_stat.pt"
DIT_DH = {"checkpoint_path": FIXTURES / "rae_dh.pt", "shift": 6.9282, "vae": FIXTURES / "rae_decoder.pt"}


def save_encoder(folder, **options):
    """A random DINOv2, saved by transformers."""
    torch.manual_seed(0)
    options = {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 1, "image_size": 518} | options
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(patch_size=14, **options)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """The flags of an original decoder with all that its file has not."""
    encoder = save_encoder(tmp_path_factory.mktemp("encoder"))
    return {
        "checkpoint_path": FIXTURES / "rae_decoder.pt",
        "latents_stats": STATS,
        "encoder": encoder,
        "decoder_num_attention_heads": 3,
    }


def test_a_pipeline_from_the_original_files_decodes_as_the_original(flags, tmp_path, monkeypatch):
    run_main(convert, monkeypatch, **flags | DIT_DH, output_dir=tmp_path / "pipe")
    pipe = DiTClassCondPipeline.from_pretrained(tmp_path / "pipe")
    golden = load_golden("rae_autoencoder")
    for run in ("ode_11", "ode_ag_11", "ode_cfg_interval_11"):
        images = pipe.decode_latents(load_golden("rae_dh.io")[f"{run}_sample"], "pt")
        expected = golden[f"original_dh_{run}_pixels"].clamp(0, 1)
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)
    assert pipe(1, num_inference_steps=2, output_type="pt").images.std() > 0.1


def test_a_file_becomes_an_autoencoder_and_goes_back(flags, tmp_path, monkeypatch, capsys):
    out, back, stats = tmp_path / "vae", tmp_path / "decoder.pt", tmp_path / "stat.pt"
    run_main(convert, monkeypatch, **flags, output_dir=out)
    printed = capsys.readouterr().out
    assert "rae: a decoder of 2 blocks of width 48, 64 latent channels, 0.04 M parameters" in printed
    assert "40 of 40 weights come back to the bit" in printed
    weights, recorded = AutoencoderRAE.from_pretrained(out).state_dict(), load_golden("rae_autoencoder")
    for key in weights.keys() & recorded.keys() - {"_latents_mean", "_latents_std"}:
        assert torch.equal(weights[key], recorded[key]), key
    for name in ("_latents_mean", "_latents_std"):
        torch.testing.assert_close(weights[name], recorded[name], rtol=2e-7, atol=0)
    model = Dinov2WithRegistersModel.from_pretrained(flags["encoder"])
    model.layernorm.weight = model.layernorm.bias = None
    encoder = {key: weight for key, weight in weights.items() if key.startswith("encoder.")}
    assert encoder.keys() == {f"encoder.{key}" for key in model.state_dict()}
    assert all(torch.equal(encoder[f"encoder.{key}"], weight) for key, weight in model.state_dict().items())

    heads = {"decoder_num_attention_heads": 3}
    run_main(verify, monkeypatch, checkpoint_path=flags["checkpoint_path"], model_path=out, **heads)
    run_main(export, monkeypatch, model_path=out, family="rae", checkpoint_path=back, latents_stats=stats)
    for written, original in ((back, flags["checkpoint_path"]), (stats, STATS)):
        content, expected = (torch.load(file, weights_only=True) for file in (written, original))
        assert content.keys() == expected.keys()
        for key in expected.keys() - {"decoder_pos_embed"}:
            assert torch.equal(content[key], expected[key]), key
    positions = torch.load(flags["checkpoint_path"], weights_only=True)["decoder_pos_embed"]
    written = torch.load(back, weights_only=True)["decoder_pos_embed"]
    torch.testing.assert_close(written, positions, rtol=0, atol=1e-6)


def test_latents_are_normalised_once(flags, tmp_path, monkeypatch):
    """`(tokens − mean) / sqrt(variance + 1e-5)`, of the encoder without the weights of its last norm."""
    run_main(convert, monkeypatch, **flags, output_dir=tmp_path / "vae")
    pixels = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    latents, _ = encode_posterior(load_autoencoder(tmp_path / "vae"), 2 * pixels - 1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    model, stats = Dinov2WithRegistersModel.from_pretrained(flags["encoder"]).eval(), torch.load(STATS)
    model.layernorm.weight = model.layernorm.bias = None
    with torch.no_grad():
        tokens = model((pixels - mean) / std).last_hidden_state[:, 5:]
    expected = tokens.transpose(1, 2).unflatten(2, (4, 4))
    expected = (expected - stats["mean"]) / (stats["var"] + 1e-5).sqrt()
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, flags, tmp_path, monkeypatch):
    run_main(convert, monkeypatch, **flags, output_dir=tmp_path / "vae", dtype=dtype)
    weights = load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    assert weights["decoder.decoder_pred.weight"].dtype == getattr(torch, dtype)
    assert weights["encoder.embeddings.cls_token"].dtype == getattr(torch, dtype)
    assert weights["_latents_std"].dtype == torch.float32


SIZES = {"ViT-B": (768, 12, 12, 3072), "ViT-L": (1024, 24, 16, 4096), "ViT-XL": (1152, 28, 16, 4096)}


@pytest.mark.parametrize("name", SIZES)
def test_published_decoders_are_read_off_their_shapes(name):
    width, layers, heads, hidden = SIZES[name]
    config = {
        "encoder_hidden_size": 768,
        "decoder_hidden_size": width,
        "decoder_num_hidden_layers": layers,
        "decoder_num_attention_heads": heads,
        "decoder_intermediate_size": hidden,
        "patch_size": 16,
    }
    with torch.device("meta"):
        weights = original_autoencoder(AutoencoderRAE(**config))
    assert RAE_DECODER.infer(weights, AutoencoderHints(), name) == config


# What is refused: one line, exit code 2, nothing written


CHANGES = {
    "missing": ({"decoder_norm.bias": None}, "the key 'decoder_norm.bias' is missing"),
    "no block": ({"decoder_layers.0.intermediate.dense.weight": None}, "'decoder_layers.0.intermediate.dense.weight'"),
    "gap": ({"decoder_layers.7.output.dense.bias": torch.ones(48)}, "'decoder_layers.7.output.dense.bias' is unknown"),
    "shape": ({"decoder_norm.bias": torch.ones(3)}, r"'decoder_norm.bias' has shape \(3,\), where \(48,\)"),
    "axes": ({"decoder_embed.weight": torch.ones(48)}, "where 2 axes with values are needed"),
    "width": (
        {"decoder_embed.weight": torch.ones(46, 64)},
        "width is 46; the table of positions takes multiples of 4",
    ),
    "pixels": (
        {"decoder_pred.weight": torch.ones(13, 48)},
        "gives 13 values per token, which are not a square of RGB",
    ),
    "tokens": ({"decoder_pos_embed": torch.ones(1, 16, 48)}, "is of 15 tokens, which is not a square number"),
    "table": ({"decoder_pos_embed": torch.ones(1, 17, 48)}, "is not the table that rae computes"),
    "channels": ({"decoder_embed.weight": torch.ones(48, 60)}, "60 channels; AutoencoderRAE takes multiples of 64"),
    "NaN": ({"decoder_norm.bias": torch.full((48,), torch.nan)}, "48 of 48 values of 'decoder_norm.bias' are NaN"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_files_that_do_not_fit_are_one_line(kind, flags, tmp_path, monkeypatch, capsys):
    changes, message = CHANGES[kind]
    weights = torch.load(flags["checkpoint_path"], weights_only=True) | changes
    torch.save({key: weight for key, weight in weights.items() if weight is not None}, tmp_path / "decoder.pt")
    given = flags | {"checkpoint_path": tmp_path / "decoder.pt", "output_dir": tmp_path / "out"}
    line = refused(convert, monkeypatch, capsys, tmp_path, **given)
    assert re.search(message, line), line


STATISTICS = {
    "std": ({"mean": torch.zeros(64, 4, 4), "std": torch.ones(64, 4, 4)}, "'mean' and 'var' are needed"),
    "flat": ({"mean": torch.zeros(64), "var": torch.ones(64)}, r"where \(C, h, w\) is needed"),
    "apart": ({"mean": torch.zeros(64, 4, 4), "var": torch.ones(64, 1, 1)}, "where one is needed"),
    "grid": ({"mean": torch.zeros(64, 2, 2), "var": torch.ones(64, 2, 2)}, "are of 2×2 positions, .* has 4×4"),
    "channels": ({"mean": torch.zeros(3, 4, 4), "var": torch.ones(3, 4, 4)}, "are of 3 channels"),
    "negative": ({"mean": torch.zeros(64, 4, 4), "var": -torch.ones(64, 4, 4)}, "'var' must give a finite standard"),
}


@pytest.mark.parametrize("kind", STATISTICS)
def test_bad_statistics_are_one_line(kind, flags, tmp_path, monkeypatch, capsys):
    content, message = STATISTICS[kind]
    torch.save(content, tmp_path / "stat.pt")
    given = flags | {"latents_stats": tmp_path / "stat.pt", "output_dir": tmp_path / "out"}
    line = refused(convert, monkeypatch, capsys, tmp_path, **given)
    assert re.search(message, line), line


ENCODERS = {
    "wide": ({"hidden_size": 128, "num_attention_heads": 2}, "has width 128, and the decoder is for one of 64"),
    "heads": ({"num_attention_heads": 2}, "has num_attention_heads=2, and AutoencoderRAE builds 1 only"),
    "gated": ({"use_swiglu_ffn": True}, "has use_swiglu_ffn=True, and AutoencoderRAE builds False only"),
    "size": ({"image_size": 224}, r"'embeddings.position_embeddings' has shape"),
}
DAMAGES = {
    "weights": (lambda folder: (folder / FILES[1]).write_bytes(b"\0" * 100), "model.safetensors"),
    "no weights": (lambda folder: (folder / FILES[1]).unlink(), "has no model.safetensors"),
    "missing": (
        lambda folder: spoil(folder, "embeddings.cls_token", None),
        "the key 'embeddings.cls_token' is missing",
    ),
    "NaN": (lambda folder: spoil(folder, "embeddings.cls_token", torch.nan), "'embeddings.cls_token' are NaN"),
    **{
        f"{key} {value}": (lambda folder, key=key, value=value: edit(folder, key, value), message)
        for key, value, message in (
            ("model_type", "vit", "is of type 'vit'; a DINOv2 with registers is needed"),
            ("num_hidden_layers", 30000, "num_hidden_layers"),
            ("num_attention_heads", 0, "num_attention_heads of"),
            ("patch_size", [14, 14], "patch_size of"),
            ("hidden_size", "64", "hidden_size of"),
            ("hidden_size", 72, "takes multiples of 64"),
            ("hidden_act", "nothing", "has hidden_act='nothing'"),
        )
    },
}


def spoil(folder, key, value):
    weights = load_file(folder / FILES[1])
    weights[key] = None if value is None else torch.full_like(weights[key], value)
    save_file({name: weight for name, weight in weights.items() if weight is not None}, folder / FILES[1])


def edit(folder, key, value):
    config = json.loads((folder / FILES[0]).read_text())
    (folder / FILES[0]).write_text(json.dumps(config | {key: value}))


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_encoders_are_one_line(kind, flags, tmp_path, monkeypatch, capsys):
    damage, message = DAMAGES[kind]
    damage(save_encoder(tmp_path / "encoder"))
    given = flags | {"encoder": tmp_path / "encoder", "output_dir": tmp_path / "out"}
    line = refused(convert, monkeypatch, capsys, tmp_path, **given)
    assert message in line and "--encoder" in line, line


def test_no_code_of_an_encoder_runs(flags, tmp_path, monkeypatch, capsys):
    encoder = save_encoder(tmp_path / "encoder")
    (encoder / "evil.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    edit(encoder, "auto_map", {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"})
    edit(encoder, "attn_implementation", "user/kernel")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    run_main(convert, monkeypatch, **flags | {"encoder": encoder}, output_dir=tmp_path / "out")
    edit(encoder, "model_type", "evil")
    before = {**flags, "encoder": encoder, "output_dir": tmp_path / "other"}
    assert "is of type 'evil'" in refused(convert, monkeypatch, capsys, tmp_path, **before)
    assert not (tmp_path / "marker").exists()


def test_a_decoder_of_another_size_is_refused(flags, tmp_path, monkeypatch, capsys):
    decoder = torch.load(FIXTURES / "rae_decoder.pt", weights_only=True) | {"decoder_pos_embed": rae_positions(48, 4)}
    torch.save({"model": {}, "ema": {f"decoder.{key}": weight for key, weight in decoder.items()}}, tmp_path / "2.pt")
    torch.save({"mean": torch.zeros(64, 1, 1), "var": torch.ones(64, 1, 1)}, tmp_path / "stat.pt")
    given = flags | {"latents_stats": tmp_path / "stat.pt"}
    run_main(convert, monkeypatch, **given | {"checkpoint_path": tmp_path / "2.pt"}, output_dir=tmp_path / "vae")
    for vae in (tmp_path / "2.pt", tmp_path / "vae"):
        others = given if vae.suffix else {}
        line = refused(
            convert, monkeypatch, capsys, tmp_path, **others | DIT_DH | {"vae": vae}, output_dir=tmp_path / "out"
        )
        assert "has latents of 2×2, and the checkpoint's model takes those of 4×4" in line
    transformer = parse_checkpoint(DIT_DH["checkpoint_path"])
    with pytest.raises(ValueError, match="The VAE has latents of 2×2 and the transformer of 4×4"):
        build_pipeline(transformer, "x", vae=load_autoencoder(tmp_path / "vae"), shift=1.0)


def test_what_the_original_can_not_have_is_not_exported(flags, tmp_path, monkeypatch, capsys):
    run_main(convert, monkeypatch, **flags, output_dir=tmp_path / "vae")
    given = {"model_path": tmp_path / "vae", "family": "rae", "checkpoint_path": tmp_path / "new.pt"}
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    for key, value, message in (
        ("reshape_to_2d", False, "it has reshape_to_2d=False"),
        ("scaling_factor", 2.0, "it has scaling_factor=2.0"),
        ("latents_std", [[[2.0] * 4] * 4] * 64, "have different latents_std"),
    ):
        (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {key: value}))
        line = refused(export, monkeypatch, capsys, tmp_path, **given, latents_stats=tmp_path / "stat.pt")
        assert message in line


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_that_do_not_fit_are_one_line(kind, flags, tmp_path, monkeypatch, capsys):
    options, message = ENCODERS[kind]
    given = flags | {"encoder": save_encoder(tmp_path / "encoder", **options), "output_dir": tmp_path / "out"}
    line = refused(convert, monkeypatch, capsys, tmp_path, **given)
    assert re.search(message, line), line


FLAGS = {
    "multiplier": ({"latent_multiplier": 0.5}, "--latent_multiplier is LightningDiT's"),
    "no folder": ({"encoder": FIXTURES / "vavae.pt"}, "vavae.pt must be the folder or the Hub id of an encoder"),
    "no encoder": ({"encoder": None}, "has a decoder and no encoder; pass encoder .*--encoder.*facebook/dinov2"),
    "no such encoder": ({"encoder": "nowhere/nothing"}, "--encoder|nowhere/nothing"),
    "heads": ({"decoder_num_attention_heads": None}, "the heads of a decoder of width 48 are unknown"),
    "other heads": ({"decoder_num_attention_heads": 5}, "its width 48 is not divisible by 5 attention heads"),
    "no statistics": ({"latents_stats": None}, "has no statistics of its latents; pass --latents_stats FILE"),
    "family": ({"family": "vavae"}, "is not an original AutoencoderKL"),
    "other family": ({"family": "dit"}, "is an autoencoder, not a transformer; `--family rae` converts it"),
    "model's flag": ({"num_attention_heads": 3}, "--num_attention_heads is for transformers"),
    "VAE's encoder": (
        {"checkpoint_path": FIXTURES / "vavae.pt", "latents_stats": FIXTURES / "vavae-latents-stats.pt"}
        | {"norm_num_groups": 3, "decoder_num_attention_heads": None},
        "has its encoder in its file; omit encoder",
    ),
    "VAE's heads": (
        {"checkpoint_path": FIXTURES / "vavae.pt", "encoder": None, "norm_num_groups": 3},
        "vavae.pt is not a decoder of RAE; omit decoder_num_attention_heads",
    ),
    "no VAE": (DIT_DH | {"vae": None, "latents_stats": None}, "--encoder is for an original autoencoder"),
}


@pytest.mark.parametrize("kind", FLAGS)
def test_flags_that_do_not_fit_are_one_line(kind, flags, tmp_path, monkeypatch, capsys):
    changes, message = FLAGS[kind]
    line = refused(convert, monkeypatch, capsys, tmp_path, **flags | changes, output_dir=tmp_path / "out")
    assert re.search(message, line), line


def test_other_weights_and_classes_are_noticed(flags, tmp_path, monkeypatch, capsys):
    run_main(convert, monkeypatch, **flags, output_dir=tmp_path / "vae")
    new = tmp_path / "new.pt"
    line = refused(
        export, monkeypatch, capsys, tmp_path, model_path=tmp_path / "vae", family="vavae", checkpoint_path=new
    )
    assert "is an AutoencoderRAE; pass --family rae" in line
    decoder = torch.load(flags["checkpoint_path"], weights_only=True)
    decoder["decoder_layers.1.attention.attention.key.bias"][3] += 1e-3  # no output shows it
    torch.save(decoder, tmp_path / "other.pt")
    hints = AutoencoderHints(decoder_num_attention_heads=3)
    assert parse_autoencoder(tmp_path / "other.pt", hints).latent_channels == 64
    line = refused(
        verify,
        monkeypatch,
        capsys,
        tmp_path,
        checkpoint_path=tmp_path / "other.pt",
        model_path=tmp_path / "vae",
        decoder_num_attention_heads=3,
    )
    assert "1 differ by more than rounding" in line
