"""What the two-stream transformer declares to diffusers, each declaration used the way diffusers uses it."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import TWO_STREAMS, tiny_inputs, tiny_two_streams
from diffusers import ModelMixin
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from safetensors.torch import load_file, save_file
from test_transformer_features import (
    CACHES,
    assert_near,
    assert_same_weights,
    count_calls,
    relative_error,
    run,
    run_step,
    run_unfused,
    saved,
    with_lora,
)
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from dit_hf import DDTTransformer2DModel
from dit_hf.complexity import count_macs
from dit_hf.transformer_ddt import DDTAttention, DDTAttnProcessor


every_design = pytest.mark.parametrize("design", TWO_STREAMS)


def blocks_of(model):
    return [*model.transformer_blocks, *model.decoder_blocks]


def attentions(module):
    return [child for child in module.modules() if isinstance(child, DDTAttention)]


# The forward pass


@every_design
def test_an_encoder_state_gives_the_same_output(design):
    model = tiny_two_streams(design)
    inputs = tiny_inputs()
    with torch.no_grad():
        sample, state = model(**inputs, return_dict=False)
        calls = count_calls(model.patch_embed)
        again = model(**inputs, encoder_state=state)
        elsewhere = model(
            **(inputs | {"timestep": 3, "class_labels": torch.zeros(3, dtype=torch.int64)}), encoder_state=state
        )
    assert torch.equal(again.sample, sample) and torch.equal(elsewhere.sample, sample)
    assert state.shape == (3, 16, 48) and not calls


@every_design
def test_every_input_and_every_size_matters(design):
    model = tiny_two_streams(design)
    expected = run(model)
    for change in ({"timestep": torch.full((3,), 500.0)}, {"class_labels": torch.tensor([4, 1, 2])}):
        assert relative_error(run(model, **change), expected) > 1e-3
    dropped = run(model, force_drop_ids=torch.tensor([1, 0, 1]))
    assert torch.equal(dropped[1:], expected[1:])  # the last label is the null class already
    assert not torch.equal(dropped[0], expected[0])
    assert run(model, **tiny_inputs(height=4, width=12)).shape == (3, 4, 4, 12)


def test_labels_are_dropped_in_training_once_a_sample():
    model = tiny_two_streams("ddt", class_dropout_prob=1.0).train()
    null = tiny_inputs() | {"class_labels": torch.full((3,), 10)}
    with torch.no_grad():
        assert torch.equal(model(**tiny_inputs()).sample, model.eval()(**null).sample)


@every_design
def test_a_new_model_predicts_nothing_and_its_gates_are_shut(design):
    torch.manual_seed(0)
    model = DDTTransformer2DModel(**tiny_two_streams(design).config)
    assert run(model).abs().max() == 0
    assert all(block.modulation.weight.abs().max() == 0 for block in blocks_of(model))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_encoder_layers": 4}, "`num_encoder_layers` is 4; it must be below `num_layers` 4"),
        ({"num_encoder_layers": 0}, "`num_encoder_layers` is 0; it must be a whole number from 1"),
        ({"num_layers": 2**40}, "`num_layers` is 1099511627776"),
        ({"attention_head_dim": 10}, "`attention_head_dim` is 10; rotary positions of two axes need a multiple of 4"),
        ({"decoder_attention_head_dim": 6}, "`decoder_attention_head_dim` is 6; rotary"),
        ({"decoder_num_attention_heads": 0}, "`decoder_num_attention_heads` is 0"),
        ({"rotary_span": -1.0}, "`rotary_span` is -1.0; it must be a number above 0"),
        ({"time_embedding": "learned"}, "`time_embedding` is 'learned'; it must be one of sinusoidal, fourier"),
        ({"head_norm": None}, "`head_norm` is None; it must be one of layer_norm, rms_norm"),
        ({"bias": 1}, "`bias` is 1; it must be True or False"),
        ({"class_dropout_prob": 2}, "`class_dropout_prob` is 2; it must be from 0 to 1"),
        ({"patch_size": 3}, "`sample_size` 8 is not divisible by `patch_size` 3"),
        ({"sample_size": 2**14, "patch_size": 1}, "268,435,456 patches of 1; at most 262,144"),
        ({"decoder_num_attention_heads": 2**12, "decoder_attention_head_dim": 2**14}, "parameters; at most"),
        ({"mlp_ratio": 0.001}, "`mlp_ratio` is 0.001, which leaves the feed-forward layers no width"),
    ],
)
def test_impossible_options_are_refused_before_anything_is_allocated(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny_two_streams("ddt", **overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_states": torch.zeros(3, 5, 8, 8)}, r"must be \(batch, 4, height, width\)"),
        ({"hidden_states": torch.zeros(3, 4, 7, 8)}, "7×8 is not divisible by the patch size 2"),
        ({"class_labels": torch.zeros(2, dtype=torch.int64)}, r"a batch of 3 needs \(3,\)"),
        ({"class_labels": torch.full((3,), 11)}, "holds 11; the allowed ids are 0 to 10"),
        ({"timestep": torch.zeros(2)}, r"`timestep` has shape \(2,\)"),
        ({"force_drop_ids": torch.zeros(2)}, r"`force_drop_ids` has shape \(2,\)"),
        ({"encoder_state": torch.zeros(3, 16, 24)}, r"these latents need \(3, 16, 48\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        run(tiny_two_streams("ddt"), **overrides)


@every_design
@pytest.mark.parametrize("size", [(8, 8), (12, 8)])
def test_counts_equal_torchs_counter(design, size):
    model = tiny_two_streams(design, mlp_ratio=3.0, patch_size=4)
    counter = FlopCounterMode(display=False)
    with counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        run(model, **tiny_inputs(1, height=size[0], width=size[1]))
    assert counter.get_total_flops() == 2 * count_macs(model.config, *size)


# Gradient checkpointing, placement, offloading


def gradients(model):
    model.zero_grad()
    model.train()(**tiny_inputs(), force_drop_ids=torch.zeros(3)).sample.square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


@every_design
def test_gradient_checkpointing_recomputes_blocks_and_keeps_gradients(design):
    model = tiny_two_streams(design)
    expected = gradients(model)
    assert all(gradient.abs().max() > 0 for name, gradient in expected.items() if "to_k.bias" not in name)
    model.enable_gradient_checkpointing()
    calls = [count_calls(block.attn.to_q) for block in blocks_of(model)]
    actual = gradients(model)
    assert [len(block_calls) for block_calls in calls] == [2] * 4
    for name, gradient in expected.items():
        assert_near(actual[name], gradient, 1e-6)


@every_design
def test_device_map_splits_between_blocks_only(design, tmp_path):
    model = tiny_two_streams(design)
    sizes = [sum(parameter.numel() * 4 for parameter in block.parameters()) for block in blocks_of(model)]
    memory = model.get_memory_footprint() - sum(sizes) // 2
    mapped = DDTTransformer2DModel.from_pretrained(
        saved(model, tmp_path), device_map="auto", max_memory={"cpu": memory}, offload_folder=tmp_path / "offload"
    )
    split = [name for name in mapped.hf_device_map if "blocks." in name]
    assert all(name.count(".") == 1 for name in split), split
    assert "disk" in mapped.hf_device_map.values()
    assert_near(run_unfused(mapped), run_unfused(model))


@every_design
@pytest.mark.parametrize(
    "options", ({"offload_type": "leaf_level"}, {"num_blocks_per_group": 1}), ids=("leaf", "block")
)
def test_group_offloading_brings_every_weight_back_before_use(design, options, tmp_path):
    model = tiny_two_streams(design)
    expected = run_unfused(model)
    model.enable_group_offload(torch.device("cpu"), offload_to_disk_path=str(tmp_path), **options)
    for _ in range(2):
        # What is left in memory is no longer a weight: a layer that is not loaded from disk first makes NaNs.
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.fill_(float("nan"))
        assert_near(run_unfused(model), expected)


@every_design
def test_layerwise_casting_skips_declared_modules(design, tmp_path):
    model = tiny_two_streams(design)
    cast = DDTTransformer2DModel.from_pretrained(saved(model, tmp_path), torch_dtype=torch.bfloat16)
    cast.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16, skip_modules_pattern=())
    full = {name for name, parameter in cast.named_parameters() if parameter.dtype != torch.float8_e4m3fn}
    skipped = {"patch_embed", "decoder_patch_embed", "time_embed"} | ({"time_proj"} if design != "ddt" else set())
    assert {name.split(".")[0] for name in full if "norm" not in name} == skipped
    assert all(name in full for name, _ in cast.named_parameters() if "norm" in name)
    output = run(cast, hidden_states=tiny_inputs()["hidden_states"].to(torch.bfloat16))
    assert relative_error(output, run(model)) < 0.15


# Compilation


@every_design
def test_repeated_blocks_compile_once_a_stream_without_graph_breaks(design):
    model = tiny_two_streams(design)
    expected = run(model)
    torch._dynamo.reset()
    counters.clear()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert_near(run(model), expected, 1e-6)
    assert counters["stats"]["unique_graphs"] == 2


@every_design
def test_whole_model_compiles_without_graph_breaks(design):
    model = tiny_two_streams(design)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for size in (8, 12):
        inputs = tiny_inputs(height=size)
        assert_near(run(compiled, **inputs), run(model, **inputs), 1e-6)


# Caches


@every_design
@pytest.mark.parametrize("cache", CACHES)
def test_cache_skips_attention_and_disables_cleanly(design, cache):
    model = tiny_two_streams(design)
    expected = run_step(model, 0)
    calls = count_calls(model.transformer_blocks[1].attn.to_q)
    decoder_calls = count_calls(model.decoder_blocks[1].attn.to_q)
    model.enable_cache(CACHES[cache]())
    assert model.is_cache_enabled
    assert_near(run_step(model, 0), expected, 1e-6)
    assert_near(run_step(model, 1), expected, 1e-4)
    assert len(calls) == 1
    # Lists of blocks are known by their names, and that of the decoder is none of them: it is computed anew, but where
    # the output is predicted or attention is skipped wherever it is.
    assert len(decoder_calls) == (1 if cache in ("taylorseer_lite", "pyramid_attention_broadcast") else 2)
    model._reset_stateful_cache()
    assert torch.isfinite(run_step(model, 0, seed=1)).all()
    assert len(calls) == 2
    model.disable_cache()
    assert_near(run_step(model, 0), expected)
    assert len(calls) == 3


def test_layer_skip_passes_input_in_place_of_attention():
    model, expected = tiny_two_streams("ddt"), tiny_two_streams("ddt")
    for blocks in ("transformer_blocks", "decoder_blocks"):
        apply_layer_skip(model, LayerSkipConfig([1], fqn=blocks, skip_attention=True, skip_ff=False))
        getattr(expected, blocks)[1].attn.register_forward_hook(lambda module, args, output: args[0])
    assert_near(run(model), run(expected))


# Attention


@every_design
def test_attention_backend_is_the_one_of_the_processor(design, monkeypatch):
    model = tiny_two_streams(design)
    expected = run(model)
    calls, math = [], _AttentionBackendRegistry._backends[AttentionBackendName._NATIVE_MATH]
    recorder = lambda **kwargs: (calls.append(1), math(**kwargs))[1]  # noqa: E731
    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName._NATIVE_MATH, recorder)
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName.NATIVE)
    model.set_attention_backend("_native_math")
    # It also became everyone's default, which would hide a processor that ignores its own.
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    assert_near(run(model), expected, 1e-5)
    assert len(calls) == len(attentions(model)) == len(model.attn_processors) == 4
    model.reset_attention_backend()
    assert_near(run(model), expected)
    assert len(calls) == 4


def test_attention_processor_can_be_replaced():
    class CountingProcessor(DDTAttnProcessor):
        calls = 0

        def __call__(self, *args, **kwargs):
            self.calls += 1
            return super().__call__(*args, **kwargs)

    model, processor = tiny_two_streams("ddt"), CountingProcessor()
    expected = run(model)
    model.set_attn_processor(processor)
    assert_near(run(model), expected)
    assert processor.calls == 4


@every_design
def test_fused_projections_are_used_and_unfused(design):
    model = tiny_two_streams(design)
    expected = run(model)
    model.fuse_qkv_projections()
    for attention in attentions(model):
        fused_calls, calls = count_calls(attention.to_qkv), count_calls(attention.to_k)
        assert_near(run(model), expected, 1e-5)
        assert len(fused_calls) == 1 and not calls
    model.unfuse_qkv_projections()
    assert not any("to_qkv" in name for name in model.state_dict())
    assert_near(run(model), expected)


# Parallelism: two processes, see `testing_utils/parallel_forward.py`


@every_design
def test_context_parallel_splits_tokens_and_keeps_output(design, parallel_results):
    expected = run(tiny_two_streams(design))
    for result in (rank["context", design] for rank in parallel_results):
        assert "error" not in result, result
        assert result["tokens"] == [8]
        assert_near(result["output"], expected, 1e-5)


@every_design
def test_tensor_parallel_halves_weights_and_keeps_output(design, parallel_results):
    model = tiny_two_streams(design)
    for result in (rank["tensor", design] for rank in parallel_results):
        assert "error" not in result, result
        assert_near(result["output"], run(model), 1e-5)
        halved = {name for name, (whole, local) in result["shards"].items() if whole != local}
        columns = ("to_q", "to_k", "to_v", "gate_proj", "up_proj", "ff.net.0.proj")
        rows = ("to_out.0.weight", "down_proj.weight", "ff.net.2.weight")
        expected = {
            name
            for name, _ in model.named_parameters()
            if name.endswith(rows) or name.rsplit(".", 1)[0].endswith(columns)
        }
        assert halved == expected and any(name.startswith("decoder_blocks") for name in halved)


# Adapters


@every_design
def test_lora_adapters_scale_switch_and_go(design, tmp_path):
    model = tiny_two_streams(design)
    base = run_unfused(model)
    adapted = run_unfused(with_lora(model))
    assert not torch.allclose(adapted, base, atol=1e-2)
    assert any("lora" in name for name, _ in model.decoder_blocks.named_parameters())
    assert_near(run_unfused(model, attention_kwargs={"scale": 0.0}), base)
    assert_near(run_unfused(model, attention_kwargs={"scale": 1.0}), adapted)
    model.save_lora_adapter(tmp_path, adapter_name="style")
    model.disable_adapters()
    assert_near(run_unfused(model), base)
    model.delete_adapters(["style"])
    assert_near(run_unfused(model), base)
    loaded = tiny_two_streams(design)
    loaded.load_lora_adapter(tmp_path, prefix=None, adapter_name="loaded", use_safetensors=True)
    assert_near(run_unfused(loaded), adapted)


# Saving and loading


@every_design
def test_save_is_one_safetensors_file(design, tmp_path):
    model = tiny_two_streams(design)
    loaded = DDTTransformer2DModel.from_pretrained(saved(model, tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {
        *("config.json", "diffusion_pytorch_model.safetensors"),
        *("transformer_ddt.py", "README.md"),
    }
    assert all(loaded.config[name] == value for name, value in model.config.items() if not name.startswith("_"))
    assert_same_weights(loaded, model)
    assert_near(run(loaded), run(model))


@pytest.mark.parametrize("variant", (None, "fp16"))
def test_shards_and_variants_round_trip(variant, tmp_path):
    dtype = torch.float16 if variant else torch.float32
    model = DDTTransformer2DModel.from_pretrained(
        saved(tiny_two_streams("dit_dh"), tmp_path / "full"), torch_dtype=dtype
    )
    path = saved(model, tmp_path / "saved", max_shard_size="100KB", variant=variant)
    (index,) = path.glob("*.index*.json")
    assert len(set(json.loads(index.read_text())["weight_map"].values())) > 1
    loaded = DDTTransformer2DModel.from_pretrained(path, variant=variant, torch_dtype=dtype)
    assert_same_weights(loaded, model)


@every_design
@pytest.mark.parametrize(("dtype", "tolerance"), ((torch.float16, 5e-3), (torch.bfloat16, 4e-2)), ids=str)
def test_half_precision_keeps_time_embedding_in_float32(design, dtype, tolerance, tmp_path):
    model = tiny_two_streams(design)
    half = DDTTransformer2DModel.from_pretrained(saved(model, tmp_path), torch_dtype=dtype)
    assert half.dtype == dtype
    for name, parameter in half.named_parameters():
        assert parameter.dtype == (torch.float32 if name.startswith("time_") else dtype), name
    with torch.no_grad():
        output = half(**(tiny_inputs() | {"hidden_states": tiny_inputs()["hidden_states"].to(dtype)}))
    assert output.sample.dtype == output.encoder_state.dtype == dtype
    assert relative_error(output.sample, run(model)) < tolerance


FRESH_PROCESS = """
import sys
import torch
from diffusers import AutoModel
from safetensors.torch import load_file, save_file

model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
assert not any(name.split(".")[0] == "dit_hf" for name in sys.modules)
with torch.no_grad():
    save_file({"sample": model(**load_file(sys.argv[2])).sample}, sys.argv[3])
"""


def test_fresh_process_gives_the_same_output_without_the_package(tmp_path):
    model = tiny_two_streams("dit_dh")
    assert isinstance(model, ModelMixin)
    save_file(tiny_inputs(), tmp_path / "inputs.safetensors")
    paths = [saved(model, tmp_path / "model"), tmp_path / "inputs.safetensors", tmp_path / "output.safetensors"]
    subprocess.run([sys.executable, "-c", FRESH_PROCESS, *paths], check=True, timeout=600)
    assert_near(load_file(paths[-1])["sample"], run(model), 1e-6)
