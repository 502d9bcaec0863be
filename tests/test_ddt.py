"""The transformer of two streams: its inputs and options, and where it differs in what all transformers declare."""

import json

import pytest
import torch
from conftest import TWO_STREAMS, tiny_design, tiny_inputs
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
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
)
from torch._dynamo.utils import counters

from dit_hf import DDTTransformer2DModel


every_design = pytest.mark.parametrize("design", TWO_STREAMS)


def blocks_of(model):
    return [*model.transformer_blocks, *model.decoder_blocks]


# The forward pass


@every_design
def test_an_encoder_state_gives_the_same_output(design):
    model = tiny_design(design)
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
    model = tiny_design(design)
    expected = run(model)
    for change in ({"timestep": torch.full((3,), 500.0)}, {"class_labels": torch.tensor([4, 1, 2])}):
        assert relative_error(run(model, **change), expected) > 1e-3
    dropped = run(model, force_drop_ids=torch.tensor([1, 0, 1]))
    assert torch.equal(dropped[1:], expected[1:])  # the last label is the null class already
    assert not torch.equal(dropped[0], expected[0])
    assert run(model, **tiny_inputs(height=4, width=12)).shape == (3, 4, 4, 12)


def test_labels_are_dropped_in_training_once_a_sample():
    model = tiny_design("ddt", class_dropout_prob=1.0).train()
    null = tiny_inputs() | {"class_labels": torch.full((3,), 10)}
    with torch.no_grad():
        assert torch.equal(model(**tiny_inputs()).sample, model.eval()(**null).sample)


@every_design
def test_a_new_model_predicts_nothing_and_its_gates_are_shut(design):
    torch.manual_seed(0)
    model = DDTTransformer2DModel(**tiny_design(design).config)
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
        tiny_design("ddt", **overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_states": torch.zeros(3, 5, 8, 8)}, r"must be \(batch, 4, height, width\)"),
        ({"hidden_states": torch.zeros(3, 4, 7, 8)}, "7×8 is not divisible by the patch size 2"),
        ({"class_labels": torch.zeros(2, dtype=torch.int64)}, r"a batch of 3 needs \(3,\)"),
        ({"class_labels": torch.full((3,), 11)}, "holds 11; the allowed ids are 0 to 10"),
        ({"timestep": torch.zeros(2)}, r"`timestep` has shape \(2,\)"),
        ({"timestep": None}, "`timestep` is NoneType; it must be a dense torch.Tensor"),
        ({"encoder_state": [1.0]}, "`encoder_state` is list; it must be a dense torch.Tensor"),
        ({"force_drop_ids": torch.zeros(2)}, r"`force_drop_ids` has shape \(2,\)"),
        ({"encoder_state": torch.zeros(3, 16, 24)}, r"these latents need \(3, 16, 48\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        run(tiny_design("ddt"), **overrides)


# Gradient checkpointing, placement, offloading


@every_design
def test_device_map_splits_between_blocks_only(design, tmp_path):
    model = tiny_design(design)
    sizes = [sum(parameter.numel() * 4 for parameter in block.parameters()) for block in blocks_of(model)]
    memory = model.get_memory_footprint() - sum(sizes) // 2
    mapped = DDTTransformer2DModel.from_pretrained(
        saved(model, tmp_path), device_map="auto", max_memory={"cpu": memory}, offload_folder=tmp_path / "offload"
    )
    split = [name for name in mapped.hf_device_map if "blocks." in name]
    assert all(name.count(".") == 1 for name in split), split
    assert "disk" in mapped.hf_device_map.values()
    assert_near(run_unfused(mapped), run_unfused(model))


# Compilation


@every_design
def test_repeated_blocks_compile_once_a_stream_without_graph_breaks(design):
    model = tiny_design(design)
    expected = run(model)
    torch._dynamo.reset()
    counters.clear()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert_near(run(model), expected, 1e-6)
    assert counters["stats"]["unique_graphs"] == 2


# Caches


@every_design
@pytest.mark.parametrize("cache", CACHES)
def test_caches_of_blocks_end_where_the_encoder_does(design, cache):
    """They know lists of blocks by name, and the decoder's is none of them, as its condition changes every step."""
    model = tiny_design(design)
    calls = count_calls(model.decoder_blocks[1].attn.to_q)
    model.enable_cache(CACHES[cache]())
    expected = run_step(model, 0)
    assert_near(run_step(model, 1), expected, 1e-4)
    # One predicts the output, the other skips attention wherever it is.
    assert len(calls) == (1 if cache in ("taylorseer_lite", "pyramid_attention_broadcast") else 2)


def test_layer_skip_passes_input_in_place_of_attention():
    model, expected = tiny_design("ddt"), tiny_design("ddt")
    for blocks in ("transformer_blocks", "decoder_blocks"):
        apply_layer_skip(model, LayerSkipConfig([1], fqn=blocks, skip_attention=True, skip_ff=False))
        getattr(expected, blocks)[1].attn.register_forward_hook(lambda module, args, output: args[0])
    assert_near(run(model), run(expected))


# Parallelism: two processes, see `testing_utils/parallel_forward.py`


@every_design
def test_tensor_parallel_halves_weights_and_keeps_output(design, parallel_results):
    model = tiny_design(design)
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


@pytest.mark.parametrize("variant", (None, "fp16"))
def test_shards_and_variants_round_trip(variant, tmp_path):
    dtype = torch.float16 if variant else torch.float32
    model = DDTTransformer2DModel.from_pretrained(saved(tiny_design("dit_dh"), tmp_path / "full"), torch_dtype=dtype)
    path = saved(model, tmp_path / "saved", max_shard_size="100KB", variant=variant)
    (index,) = path.glob("*.index*.json")
    assert len(set(json.loads(index.read_text())["weight_map"].values())) > 1
    loaded = DDTTransformer2DModel.from_pretrained(path, variant=variant, torch_dtype=dtype)
    assert_same_weights(loaded, model)
