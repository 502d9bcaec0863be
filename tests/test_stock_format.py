"""The format of diffusers' own DiT: read and corrected, converted, and written."""

import copy
import json
import shutil

import diffusers
import pytest
import torch
from conftest import ROOT, tiny_inputs
from safetensors.torch import load_file, save_file
from test_conversion import tiny_vae
from test_families import forward, load, run_script

from dit_hf import DiTClassCondPipeline, DiTTransformer2DModel, make_scheduler
from dit_hf.checkpoints import FAMILIES
from dit_hf.checkpoints.parsing import parse_checkpoint
from dit_hf.checkpoints.saving import save_original


def stock_model(**overrides):
    torch.manual_seed(0)
    config = {
        "num_layers": 3,
        "num_attention_heads": 4,
        "attention_head_dim": 12,
        "sample_size": 8,
        "num_embeds_ada_norm": 10,
    }
    stock = diffusers.DiTTransformer2DModel(**(config | {"out_channels": 8, "norm_num_groups": 4} | overrides)).eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter))
        first = stock.transformer_blocks[0].norm1.emb.state_dict()
        for block in stock.transformer_blocks:
            block.norm1.emb.load_state_dict(first)
    return stock


def assert_is_stock(model, stock):
    """
    The stock network with the frequency shift and epsilons that its weights were trained with computes what ours does.

    In double precision nothing but rounding could hide: ours fuses multiply-adds, so the last bits of float32 differ.
    """
    for block in stock.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm1.norm.eps = block.norm3.eps = 1e-6
    stock.norm_out.eps = 1e-6
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        inputs = tiny_inputs()
        inputs["hidden_states"] = inputs["hidden_states"].to(dtype)
        networks = [copy.deepcopy(network).to(dtype) for network in (model, stock)]
        with torch.no_grad():
            actual, expected = (
                network(inputs["hidden_states"], inputs["timestep"], class_labels=inputs["class_labels"]).sample
                for network in networks
            )
        assert actual.dtype == dtype
        assert (actual - expected).norm() / expected.norm() < tolerance


def stock_pipeline(folder):
    pipe = diffusers.DiTPipeline(stock_model(), tiny_vae(), make_scheduler("ddim"))
    pipe.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {str(key): f"class {key}" for key in range(10)}  # stock loses them on saving
    (folder / "model_index.json").write_text(json.dumps(index))
    return pipe


def test_stock_folders_are_read_and_corrected(tmp_path, caplog):
    stock_pipeline(tmp_path)
    model = DiTTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer")
    assert "frequency shift 0" in caplog.text
    assert_is_stock(model, stock_model())
    pipe = DiTClassCondPipeline.from_pretrained(tmp_path)
    assert type(pipe.transformer) is DiTTransformer2DModel
    assert pipe.labels["class 3"] == 3
    assert torch.equal(forward(pipe.transformer), forward(model))
    pipe.save_pretrained(tmp_path / "ours")
    caplog.clear()
    again = DiTClassCondPipeline.from_pretrained(tmp_path / "ours")
    assert "frequency shift" not in caplog.text
    assert torch.equal(forward(again.transformer), forward(model))


def test_stock_folder_through_custom_pipeline(tmp_path):
    """The entry in `pipelines/` gives the image of the corrected stock model."""
    stock_pipeline(tmp_path)
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path, custom_pipeline=str(ROOT / "pipelines" / "dit_class_cond"), trust_remote_code=True
    )
    expected = DiTClassCondPipeline.from_pretrained(tmp_path)
    images = [
        p("class 3", num_inference_steps=2, generator=torch.manual_seed(0), output_type="np").images
        for p in (pipe, expected)
    ]
    assert pipe.labels["class 3"] == 3
    assert (images[0] == images[1]).all()


def as_published_in_2022(folder):
    """The layout of facebook/DiT-XL-2-256: an older class name, a pickle, the table of positions among the weights."""
    stock_pipeline(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "Transformer2DModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    config = json.loads((folder / "transformer" / "config.json").read_text())
    config = config | {"_class_name": "Transformer2DModel", "_diffusers_version": "0.12.0", "norm_eps": 1e-5}
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["pos_embed.pos_embed"] = stock_model().pos_embed.pos_embed.clone()
    torch.save(weights, file.with_suffix(".bin"))
    file.unlink()


@pytest.mark.parametrize("custom_pipeline", [False, True])
def test_older_stock_folders_are_read(custom_pipeline, tmp_path):
    as_published_in_2022(tmp_path)
    if custom_pipeline:
        entry = str(ROOT / "pipelines" / "dit_class_cond")
        options = {"custom_pipeline": entry, "trust_remote_code": True}
        pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path, **options)
    else:
        pipe = DiTClassCondPipeline.from_pretrained(tmp_path)
        converted = run_script("convert_original_to_hf", checkpoint_path=tmp_path, output_dir=tmp_path / "out")
        assert converted.returncode == 0, converted.stderr
        result = parse_checkpoint(tmp_path)
        assert (result.family.name, result.config["sample_size"]) == ("diffusers", 8)
    assert_is_stock(pipe.transformer, stock_model())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_fn": "gelu"}, "activation_fn='gelu'"),
        (5, r"config\.json must hold an object; it holds a int"),
    ],
)
def test_stock_configurations_that_we_do_not_compute_are_refused(change, message, tmp_path):
    stock_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change if isinstance(change, dict) else change))
    with pytest.raises(ValueError, match=message):
        parse_checkpoint(tmp_path, 4)


def test_incomplete_stock_folders_are_refused(tmp_path):
    stock_model().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["proj_out_2.bias"]
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"proj_out_2\.bias"):
        DiTTransformer2DModel.from_pretrained(tmp_path)


def test_sharded_and_half_stock_folders(tmp_path):
    stock_model().save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*-of-*"))) > 1
    assert_is_stock(DiTTransformer2DModel.from_pretrained(tmp_path / "sharded"), stock_model())
    half = DiTTransformer2DModel.from_pretrained(tmp_path / "sharded", dtype=torch.bfloat16)
    assert half.proj_out.weight.dtype == torch.bfloat16


def test_embedders_that_were_trained_apart_are_refused_unless_told(tmp_path):
    stock = stock_model()
    with torch.no_grad():
        stock.transformer_blocks[2].norm1.emb.class_embedder.embedding_table.weight[3] += 1
    stock.save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match="trained apart.*block 0"):
        DiTTransformer2DModel.from_pretrained(tmp_path / "stock")
    flags = {"checkpoint_path": tmp_path / "stock", "output_dir": tmp_path / "out"}
    result = run_script("convert_original_to_hf", **flags)
    assert result.returncode == 2
    assert "trained apart" in result.stderr
    result = run_script("convert_original_to_hf", **flags, embedders_of_block=2)
    assert result.returncode == 0, result.stderr
    weights = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    expected = stock.transformer_blocks[2].norm1.emb.class_embedder.embedding_table.weight
    assert torch.equal(weights["class_embed.weight"], expected)


def test_export_to_the_stock_format(tmp_path):
    model = load("dit_p2")
    save_original(model, FAMILIES["diffusers"], tmp_path / "stock-v1.0")
    stock = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "stock-v1.0").eval()
    assert_is_stock(model, stock)
    assert torch.equal(forward(DiTTransformer2DModel.from_pretrained(tmp_path / "stock-v1.0")), forward(model))
    save_original(model, FAMILIES["diffusers"], tmp_path / "stock.safetensors")
    (tmp_path / "config.json").write_text((tmp_path / "stock-v1.0" / "config.json").read_text())
    file = DiTTransformer2DModel.from_single_file(tmp_path / "stock.safetensors")
    assert torch.equal(forward(file), forward(model))


def test_the_stock_format_has_a_null_class(tmp_path):
    stock_model().save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match="diffusers models have a null class; omit has_null_class"):
        parse_checkpoint(tmp_path / "stock", has_null_class=False)


@pytest.mark.parametrize(
    "change",
    [
        *({"out_channels": value} for value in ("8", 10**12, 7, {}, [8])),
        *({"dropout": value} for value in ([1], None, "x", 5)),
        *({"in_channels": value} for value in ({}, None, "4")),
        {"num_layers": 900},
        {"dtype": "x"},
        {"self": 1},
    ],
)
def test_odd_stock_configurations_are_named(change, stock_folder, tmp_path):
    folder = shutil.copytree(stock_folder, tmp_path / "stock")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match="stock") as error:
        DiTTransformer2DModel.from_pretrained(folder)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def stock_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    stock_model().save_pretrained(folder)
    return folder
