"""What the transformer declares to diffusers, each declaration used the way diffusers uses it."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ARCHITECTURES, DESIGNS, TWO_STREAMS, inputs_of, tiny_design, tiny_inputs, tiny_transformer
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import LayerSkipConfig, SeaCacheConfig, apply_layer_skip
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters


ONE_STREAM = [name for name in (*DESIGNS, *ARCHITECTURES) if name not in TWO_STREAMS]
every_conditioning = pytest.mark.parametrize("conditioning", (*DESIGNS, *ARCHITECTURES))
of_one_stream = pytest.mark.parametrize("conditioning", ONE_STREAM)
one_per_architecture = pytest.mark.parametrize("conditioning", ("adaln_zero", *ARCHITECTURES))
one_per_block_class = pytest.mark.parametrize("conditioning", ("adaln_zero", "cross_attention", *ARCHITECTURES))


EMBEDDERS = {
    *("pos_embed", "patch_embed", "decoder_patch_embed", "context_embed"),
    *("time_proj", "time_embed", "interval_embed"),
}


def run(model, **overrides):
    with torch.no_grad():
        return model(**(inputs_of(model) | overrides)).sample


def run_unfused(model, **overrides):
    """With a gradient: CPU inference fuses a plain layer with its GELU, but not one with hooks or adapters."""
    return model(**(inputs_of(model) | overrides)).sample.detach()


def assert_near(actual, expected, tolerance=0.0):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def relative_error(actual, expected):
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def count_calls(module):
    """A list that grows by one with every call of the module."""
    calls = []
    module.register_forward_hook(lambda *args: calls.append(1))
    return calls


def attentions(module):
    return [child for child in module.modules() if isinstance(child, AttentionModuleMixin)]


def saved(model, path, **options):
    model.save_pretrained(path, **options)
    return path


# Gradient checkpointing


def gradients(model):
    model.zero_grad()
    keep_labels = torch.zeros(3, dtype=torch.int64)
    model.train()(**inputs_of(model), force_drop_ids=keep_labels).sample.square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


@every_conditioning
def test_gradient_checkpointing_recomputes_blocks_and_keeps_gradients(conditioning):
    model = tiny_design(conditioning)
    expected = gradients(model)
    model.enable_gradient_checkpointing()
    calls = [count_calls(block.attn.to_q) for block in model.transformer_blocks]
    actual = gradients(model)
    assert [len(block_calls) for block_calls in calls] == [2, 2]
    for name, gradient in expected.items():
        assert_near(actual[name], gradient, 1e-7)
    model.disable_gradient_checkpointing()
    gradients(model)
    assert [len(block_calls) for block_calls in calls] == [3, 3]


# Placement and offloading


@of_one_stream
def test_device_map_splits_between_blocks_only(conditioning, tmp_path):
    model = tiny_design(conditioning, num_layers=4)
    block = sum(parameter.numel() * 4 for parameter in model.transformer_blocks[0].parameters())
    # Room for one block and a half, beside the one that accelerate reserves.
    memory = model.get_memory_footprint() - 4 * block + int(2.5 * block)
    mapped = type(model).from_pretrained(
        saved(model, tmp_path), device_map="auto", max_memory={"cpu": memory}, offload_folder=tmp_path / "offload"
    )
    places = {name: place for name, place in mapped.hf_device_map.items() if name.startswith("transformer_blocks")}
    assert places == {f"transformer_blocks.{index}": "disk" if index else "cpu" for index in range(4)}
    assert mapped.transformer_blocks[1].attn.to_q.weight.device.type == "meta"
    assert_near(run_unfused(mapped), run_unfused(model))


def test_forward_mode_derivatives_do_not_need_a_gradient():
    """As in the likelihood of a flow or a consistency loss, whose teacher runs without one."""
    model, inputs = tiny_transformer(), tiny_inputs()
    hidden_states = inputs.pop("hidden_states")
    direction = torch.randn_like(hidden_states)

    def output(hidden_states):
        return model(hidden_states, **inputs, return_dict=False)[0]

    with attention_backend("_native_math"):  # torch's other kernels have no forward mode
        expected = torch.func.jvp(output, (hidden_states,), (direction,))[1]
        with torch.no_grad():
            found = torch.func.jvp(output, (hidden_states,), (direction,))[1]
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected)


@every_conditioning
@pytest.mark.parametrize(
    "options", ({"offload_type": "leaf_level"}, {"num_blocks_per_group": 1}), ids=("leaf", "block")
)
def test_group_offloading_brings_every_weight_back_before_use(conditioning, options, tmp_path):
    model = tiny_design(conditioning)
    expected = run_unfused(model)
    model.enable_group_offload(torch.device("cpu"), offload_to_disk_path=str(tmp_path), **options)
    for _ in range(2):
        # What is left in memory is no longer a weight: a layer that is not loaded from disk first makes NaNs.
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.fill_(float("nan"))
        assert_near(run_unfused(model), expected)


@every_conditioning
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_layerwise_casting_skips_declared_modules(conditioning, dtype, tmp_path):
    model = tiny_design(conditioning)
    cast = type(model).from_pretrained(saved(model, tmp_path), torch_dtype=dtype)
    # Without patterns of ours, diffusers' default ones would skip the same modules.
    cast.enable_layerwise_casting(torch.float8_e4m3fn, dtype, skip_modules_pattern=())
    full = {name for name, parameter in cast.named_parameters() if parameter.dtype != torch.float8_e4m3fn}
    embedders = {
        name
        for name, child in cast.named_children()
        if name in EMBEDDERS and next(child.parameters(), None) is not None
    }
    assert {name.split(".")[0] for name in full if "norm" not in name} == embedders
    assert all(name in full for name, _ in cast.named_parameters() if "norm" in name)
    assert cast.dtype == dtype
    output = run(cast, hidden_states=tiny_inputs()["hidden_states"].to(dtype))
    assert relative_error(output, run(model)) < 0.15


# Compilation


@of_one_stream
def test_repeated_blocks_compile_once_without_graph_breaks(conditioning):
    model = tiny_design(conditioning)
    expected = run(model)
    torch._dynamo.reset()
    counters.clear()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert_near(run(model), expected, 1e-6)
    # One for blocks without context tokens, and one for those with them.
    assert counters["stats"]["unique_graphs"] == (2 if conditioning == "jit" else 1)


@every_conditioning
def test_whole_model_compiles_without_graph_breaks(conditioning):
    model = tiny_design(conditioning)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for size in (8, 12):
        inputs = tiny_inputs(height=size)
        assert_near(run(compiled, **inputs), run(model, **inputs), 1e-6)


def test_repeated_blocks_compile_with_inductor():
    model = tiny_transformer()
    expected = run(model)
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True)
    assert_near(run(model), expected, 1e-5)


# Caches


def visual_latents(model, args, kwargs):
    return [latents.unsqueeze(1) for latents in kwargs["hidden_states"]]  # (C, T, H, W) each


CACHES = {
    "first_block": lambda: FirstBlockCacheConfig(threshold=0.05),
    "mag": lambda: MagCacheConfig(mag_ratios=[1.0] * 3, num_inference_steps=3, retention_ratio=0.3),
    "sea": lambda: SeaCacheConfig(raw_vision_callback=visual_latents),
    "taylorseer": lambda: TaylorSeerCacheConfig(disable_cache_before_step=1, taylor_factors_dtype=torch.float32),
    "taylorseer_lite": lambda: TaylorSeerCacheConfig(
        disable_cache_before_step=1, taylor_factors_dtype=torch.float32, use_lite_mode=True
    ),
    "pyramid_attention_broadcast": lambda: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=2,
        current_timestep_callback=lambda: 500,
    ),
    "faster_cache": lambda: FasterCacheConfig(
        current_timestep_callback=lambda: 500,
        alpha_low_frequency=1.0,
        tensor_format="BCHW",
        _unconditional_conditional_input_kwargs_identifiers=["hidden_states", "timestep", "class_labels"],
    ),
}


def guided_inputs(seed=0):
    """Unconditional half first, the order that FasterCache expects."""
    latents = tiny_inputs(batch_size=1, seed=seed)["hidden_states"].repeat(2, 1, 1, 1)
    return {"hidden_states": latents, "timestep": torch.full((2,), 500.0), "class_labels": torch.tensor([10, 3])}


def run_step(model, step, seed=0):
    with model.cache_context("cond_uncond", step_index=step, num_inference_steps=3, sigma=0.5):
        return run(model, **guided_inputs(seed))


@every_conditioning
@pytest.mark.parametrize("cache", CACHES)
def test_cache_skips_attention_and_disables_cleanly(conditioning, cache):
    model = tiny_design(conditioning)
    expected = run_step(model, 0)
    # FasterCache leaves cross-attention alone.
    attention = attentions(model.transformer_blocks[1])[0 if cache == "faster_cache" else -1]
    calls = count_calls(attention.to_q)
    model.enable_cache(CACHES[cache]())
    assert model.is_cache_enabled
    assert_near(run_step(model, 0), expected, 1e-6)
    assert_near(run_step(model, 1), expected, 1e-4)
    assert len(calls) == 1
    model._reset_stateful_cache()
    assert torch.isfinite(run_step(model, 0, seed=1)).all()
    assert len(calls) == 2
    model.disable_cache()
    assert_near(run_step(model, 0), expected)
    assert len(calls) == 3


@one_per_block_class
def test_layer_skip_passes_input_in_place_of_attention(conditioning):
    model, expected = (tiny_design(conditioning) for _ in range(2))
    config = LayerSkipConfig([1], fqn="transformer_blocks", skip_attention=True, skip_ff=False)
    apply_layer_skip(model, config)
    expected.transformer_blocks[1].attn.register_forward_hook(lambda module, args, output: args[0])
    assert_near(run(model), run(expected))


# Attention


@every_conditioning
def test_attention_backend_is_the_one_of_the_processor(conditioning, monkeypatch):
    model = tiny_design(conditioning)
    expected = run(model)
    calls, math = [], _AttentionBackendRegistry._backends[AttentionBackendName._NATIVE_MATH]
    recorder = lambda **kwargs: (calls.append(1), math(**kwargs))[1]  # noqa: E731
    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName._NATIVE_MATH, recorder)
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName.NATIVE)
    model.set_attention_backend("_native_math")
    # It also became everyone's default, which would hide a processor that ignores its own.
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    assert_near(run(model), expected, 1e-5)
    assert len(calls) == len(attentions(model)) == len(model.attn_processors)
    model.reset_attention_backend()
    assert_near(run(model), expected)
    assert len(calls) == len(model.attn_processors)


@every_conditioning
def test_attention_processor_can_be_replaced(conditioning):
    model = tiny_design(conditioning)

    class CountingProcessor(type(attentions(model)[0].processor)):
        calls = 0

        def __call__(self, *args, **kwargs):
            self.calls += 1
            return super().__call__(*args, **kwargs)

    processor = CountingProcessor()
    expected = run(model)
    model.set_attn_processor(processor)
    assert_near(run(model), expected)
    assert processor.calls == len(model.attn_processors)


@every_conditioning
def test_fused_projections_are_used_and_unfused(conditioning):
    model = tiny_design(conditioning)
    expected = run(model)
    model.fuse_qkv_projections()
    for attention in attentions(model):
        fused = attention.to_kv if attention.is_cross_attention else attention.to_qkv
        fused_calls, calls = count_calls(fused), count_calls(attention.to_k)
        assert_near(run(model), expected, 1e-5)
        assert len(fused_calls) == 1 and not calls
    model.unfuse_qkv_projections()
    assert not any("to_qkv" in name or "to_kv" in name for name in model.state_dict())
    assert_near(run(model), expected)


# Parallelism: two processes, see `testing_utils/parallel_forward.py`


@every_conditioning
def test_context_parallel_splits_tokens_and_keeps_output(conditioning, parallel_results):
    expected = run(tiny_design(conditioning))
    num_tokens = {"in_context": 18, "jit": 20}.get(conditioning, 16)
    for result in (rank[("context", conditioning)] for rank in parallel_results):
        assert "error" not in result, result
        assert result["tokens"] == [num_tokens // 2]
        assert_near(result["output"], expected, 1e-5)


def test_context_parallel_refuses_tokens_that_do_not_divide(parallel_results):
    for rank in parallel_results:
        assert "must be divisible by mesh size" in rank["context", "odd"]["error"]


@pytest.mark.parametrize("case", (*ONE_STREAM, "loaded"))
def test_tensor_parallel_halves_weights_and_keeps_output(case, parallel_results):
    model = tiny_design("adaln_zero" if case == "loaded" else case)
    for result in (rank[("tensor", case)] for rank in parallel_results):
        assert "error" not in result, result
        assert_near(result["output"], run(model), 1e-5)
        swiglu = case in ("lightningdit", "jit")
        columns = ("ff.gate_proj", "ff.up_proj") if swiglu else ("ff.net.0.proj",)
        rows = ("attn.to_out.0", "ff.down_proj" if swiglu else "ff.net.2")
        halved = {name: whole for name, (whole, local) in result["shards"].items() if whole != local}
        assert set(halved) == {
            f"transformer_blocks.{index}.{name}"
            for index in range(2)
            for layer in ("attn.to_q", "attn.to_k", "attn.to_v", *columns)
            for name in (f"{layer}.weight", f"{layer}.bias")
        } | {f"transformer_blocks.{index}.{name}.weight" for index in range(2) for name in rows}
        for name, whole in halved.items():
            local = result["shards"][name][1]
            assert 2 * torch.Size(local).numel() == torch.Size(whole).numel() == model.get_parameter(name).numel()


# Adapters


def with_lora(model, name="style"):
    layers = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "gate_proj", "down_proj", "modulation"]
    names = [name for name, _ in model.named_modules()]
    targets = [layer for layer in layers if any(name.endswith(layer) for name in names)]
    config = LoraConfig(r=4, lora_alpha=12, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(len(name))
    model.add_adapter(config, adapter_name=name)
    return model


@every_conditioning
def test_lora_adapters_scale_switch_and_go(conditioning):
    model = tiny_design(conditioning)
    base = run_unfused(model)
    adapted = run_unfused(with_lora(model))
    assert not torch.allclose(adapted, base, atol=1e-2)
    assert_near(run_unfused(model, attention_kwargs={"scale": 0.0}), base)
    assert_near(run_unfused(model, attention_kwargs={"scale": 1.0}), adapted)
    assert_near(run_unfused(model), adapted)

    with_lora(model, "detail")
    model.set_adapters(["style", "detail"], [1.0, 0.5])
    assert not torch.allclose(run_unfused(model), adapted, atol=1e-2)
    model.set_adapters("style")
    assert_near(run_unfused(model), adapted)
    model.disable_adapters()
    assert_near(run_unfused(model), base)
    model.enable_adapters()
    model.delete_adapters(["style", "detail"])
    assert_near(run_unfused(model), base)


@every_conditioning
def test_lora_adapters_survive_saving(conditioning, tmp_path):
    model = with_lora(tiny_design(conditioning))
    model.save_lora_adapter(tmp_path, adapter_name="style")
    loaded = tiny_design(conditioning)
    loaded.load_lora_adapter(tmp_path, prefix=None, adapter_name="loaded", use_safetensors=True)
    assert loaded.peft_config["loaded"].lora_alpha == 12
    assert_near(run(loaded), run(model))


# Saving and loading


def assert_same_weights(actual, expected):
    actual, expected = actual.state_dict(), expected.state_dict()
    assert list(actual) == list(expected)
    for name, weight in expected.items():
        assert actual[name].dtype == weight.dtype and torch.equal(actual[name], weight), name


@every_conditioning
def test_save_is_one_safetensors_file(conditioning, tmp_path):
    model = tiny_design(conditioning)
    loaded = type(model).from_pretrained(saved(model, tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {
        *("config.json", "diffusion_pytorch_model.safetensors"),
        *(f"{json.loads(model.to_json_string())['auto_map']['AutoModel'].split('.')[0]}.py", "README.md"),
    }
    assert all(loaded.config[name] == value for name, value in model.config.items() if not name.startswith("_"))
    assert_same_weights(loaded, model)
    assert_near(run(loaded), run(model))


@one_per_architecture
@pytest.mark.parametrize("shard_size", ("100KB", "10GB"))
@pytest.mark.parametrize("variant", (None, "fp16"))
def test_shards_and_variants_round_trip(conditioning, shard_size, variant, tmp_path):
    dtype = torch.float16 if variant else torch.float32
    model = tiny_design(conditioning)
    model = type(model).from_pretrained(saved(model, tmp_path / "full"), torch_dtype=dtype)
    path = saved(model, tmp_path / "saved", max_shard_size=shard_size, variant=variant)
    if shard_size == "100KB":
        (index,) = path.glob("*.index*.json")
        assert len(set(json.loads(index.read_text())["weight_map"].values())) > 1
    assert all(variant in file.name for file in path.glob("*.safetensors") if variant)
    loaded = type(model).from_pretrained(path, variant=variant, torch_dtype=dtype)
    assert_same_weights(loaded, model)


@every_conditioning
@pytest.mark.parametrize(("dtype", "tolerance"), ((torch.float16, 3e-3), (torch.bfloat16, 3e-2)), ids=str)
def test_half_precision_keeps_time_embedding_in_float32(conditioning, dtype, tolerance, tmp_path):
    model = tiny_design(conditioning)
    half = type(model).from_pretrained(saved(model, tmp_path), torch_dtype=dtype)
    assert half.dtype == dtype
    for name, parameter in half.named_parameters():
        assert parameter.dtype == (torch.float32 if name.startswith(("time_", "interval_embed")) else dtype), name
    output = run(half, hidden_states=tiny_inputs()["hidden_states"].to(dtype))
    assert output.dtype == dtype
    assert relative_error(output, run(model)) < tolerance


FRESH_PROCESS = """
import sys
import torch
from safetensors.torch import load_file, save_file
import dit_hf

model = getattr(dit_hf, sys.argv[4]).from_pretrained(sys.argv[1])
with torch.no_grad():
    save_file({"sample": model(**load_file(sys.argv[2])).sample}, sys.argv[3])
"""


@one_per_architecture
def test_fresh_process_gives_the_same_output(conditioning, tmp_path):
    model = tiny_design(conditioning)
    save_file(tiny_inputs(), tmp_path / "inputs.safetensors")
    paths = [saved(model, tmp_path / "model"), tmp_path / "inputs.safetensors", tmp_path / "output.safetensors"]
    subprocess.run([sys.executable, "-c", FRESH_PROCESS, *paths, type(model).__name__], check=True, timeout=600)
    assert_near(load_file(paths[-1])["sample"], run(model), 1e-6)
