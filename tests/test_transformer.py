"""The model by itself: initialisation, label dropout, sizes, options, errors."""

import pytest
import torch
from conftest import DESIGNS, tiny_design, tiny_inputs, tiny_transformer

from dit_hf import DiTTransformer2DModel
from dit_hf.transformer_dit import CONDITIONINGS, count_weights, sincos_positions


TINY = {"sample_size": 8, "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 12, "num_classes": 10}


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@torch.no_grad()
def test_every_conditioning_depends_on_time_and_class(conditioning):
    model = tiny_transformer(conditioning=conditioning)
    inputs = tiny_inputs()
    output = model(**inputs).sample
    assert output.shape == (3, 8, 8, 8)
    for name, value in (("timestep", torch.tensor([1.0, 998.0, 400.0])), ("class_labels", torch.tensor([4, 1, 9]))):
        changed = model(**(inputs | {name: value})).sample
        assert (changed - output).abs().amax(dim=(1, 2, 3)).min() > 1e-4, name


def test_fresh_model_follows_the_paper():
    torch.manual_seed(0)
    model = DiTTransformer2DModel(**TINY | {"num_attention_heads": 8, "attention_head_dim": 32})
    for block in model.transformer_blocks:
        assert block.modulation.weight.abs().max() == 0
        # Xavier over the stacked (3D, D) matrix, as the original draws it.
        bound = (6 / (256 + 3 * 256)) ** 0.5
        assert 0.95 * bound < block.attn.to_q.weight.abs().max() <= bound
        assert 0.95 < block.ff.net[0].proj.weight.abs().max() / (6 / (256 + 1024)) ** 0.5 <= 1
        assert block.attn.to_q.bias.abs().max() == 0
    assert model.norm_out.linear.weight.abs().max() == 0
    for table in (model.class_embed, model.time_embed.linear_1, model.time_embed.linear_2):
        assert table.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.eval()(**tiny_inputs()).sample.abs().max() == 0


def test_gates_start_closed():
    """adaLN-Zero blocks are the identity at first; the other designs are not."""
    hidden_states, condition = torch.randn(2, 16, 48), torch.randn(2, 48)
    block = DiTTransformer2DModel(**TINY).transformer_blocks[0]
    assert torch.equal(block(hidden_states, condition), hidden_states)
    block = DiTTransformer2DModel(**TINY, conditioning="adaln").transformer_blocks[0]
    assert not torch.equal(block(hidden_states, condition), hidden_states)


@torch.no_grad()
def test_label_dropout_is_drawn_once_a_sample():
    model = tiny_transformer(class_dropout_prob=0.3).train()
    count, seen = 4096, []
    model.transformer_blocks = torch.nn.ModuleList()
    model.class_embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(torch.zeros(count, 4, 2, 2), torch.zeros(count), torch.full((count,), 5))
    assert len(seen) == 1
    assert set(seen[0].tolist()) == {5, 10}
    dropped = (seen[0] == 10).float().mean().item()
    assert abs(dropped - 0.3) < 5 * (0.3 * 0.7 / count) ** 0.5


@torch.no_grad()
def test_force_drop_ids_take_the_place_of_dropout(transformer):
    inputs = tiny_inputs()
    null = transformer(**(inputs | {"class_labels": torch.tensor([10, 0, 10])})).sample
    for mode in (False, True):
        transformer.train(mode)
        assert torch.equal(transformer(**inputs, force_drop_ids=torch.tensor([1, 0, 0])).sample, null)
    forgetful = tiny_transformer(class_dropout_prob=0.9)  # in training only
    assert torch.equal(forgetful(**inputs).sample, transformer(**inputs).sample)


def test_model_without_null_class():
    model = tiny_transformer(class_dropout_prob=0.0)
    assert model.class_embed.num_embeddings == 10
    inputs = tiny_inputs() | {"class_labels": torch.tensor([1, 2, 3])}
    assert torch.equal(model.train()(**inputs).sample, model.eval()(**inputs).sample)
    with pytest.raises(ValueError, match="class_dropout_prob=0"):
        model(**inputs, force_drop_ids=torch.tensor([1, 0, 0]))


@torch.no_grad()
def test_timesteps_may_be_numbers_and_fractions(transformer):
    inputs = tiny_inputs()
    inputs.pop("timestep")
    whole = transformer(**inputs, timestep=500).sample
    assert torch.equal(transformer(**inputs, timestep=torch.tensor(500)).sample, whole)
    assert torch.equal(transformer(**inputs, timestep=torch.full((3,), 500.0)).sample, whole)
    fraction = transformer(**inputs, timestep=500.5).sample
    later = transformer(**inputs, timestep=501.0).sample
    assert 0 < (fraction - whole).norm() < (later - whole).norm()


@torch.no_grad()
def test_timestep_scale_is_applied_inside(transformer):
    scaled = tiny_transformer(timestep_scale=0.001)
    scaled.load_state_dict(transformer.state_dict())
    inputs = tiny_inputs()
    by_hand = inputs | {"timestep": inputs["timestep"] * 0.001}
    torch.testing.assert_close(scaled(**inputs).sample, transformer(**by_hand).sample)


@torch.no_grad()
def test_timestep_embedding_has_no_frequency_shift(transformer):
    """cos and sin of t · 10000^(-k/128): stock diffusers divides by 127."""
    frequencies = 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    angles = 123.0 * frequencies
    expected = torch.cat([angles.cos(), angles.sin()]).float()
    torch.testing.assert_close(transformer.time_proj(torch.tensor([123.0]))[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 16), (4, 16), (2, 2), (20, 6)])
@torch.no_grad()
def test_other_sizes(transformer, size):
    inputs = tiny_inputs(height=size[0], width=size[1])
    output = transformer(**inputs).sample
    assert output.shape == (3, 8, *size)
    embedded = transformer.pos_embed(inputs["hidden_states"])
    patches = transformer.pos_embed.proj(inputs["hidden_states"]).flatten(2).transpose(1, 2)
    positions = transformer.pos_embed.positions_for(size[0] // 2, size[1] // 2)
    torch.testing.assert_close(embedded, patches + positions)
    turned, seen = tiny_transformer(position_embedding="sincos+rope"), []
    turned.rotary_embed.register_forward_hook(lambda module, grid, angles: seen.append(grid[:2]))
    turned(**inputs)
    assert seen == [(size[0] // 2, size[1] // 2)]
    model = tiny_transformer(sample_size=max(size))  # built for the larger square: the same positions, cut out
    grid = sincos_positions(max(size) // 2, max(size) // 2, 48).unflatten(1, (max(size) // 2,) * 2)
    expected = grid[:, : size[0] // 2, : size[1] // 2].flatten(1, 2)
    assert torch.equal(model.pos_embed.positions_for(size[0] // 2, size[1] // 2), expected)


@torch.no_grad()
def test_positions_are_cached_by_size(transformer):
    first = transformer.pos_embed.positions_for(2, 8)
    assert transformer.pos_embed.positions_for(2, 8) is first
    assert transformer.pos_embed.positions_for(8, 2) is not first
    assert transformer.to(torch.bfloat16).pos_embed.positions_for(2, 8).dtype == torch.bfloat16
    assert not any("positions" in key for key in transformer.state_dict())


@torch.no_grad()
def test_tokens_keep_their_place():
    """A change in one patch, with attention closed, changes that patch alone: rows and columns are not swapped."""
    model = tiny_transformer()
    for block in model.transformer_blocks:
        for parameter in block.attn.to_out.parameters():
            parameter.zero_()
    inputs = tiny_inputs(height=4, width=8)
    changed = inputs["hidden_states"].clone()
    changed[:, :, 2:4, 6:8] += 1
    difference = model(**(inputs | {"hidden_states": changed})).sample - model(**inputs).sample
    assert difference[:, :, 2:4, 6:8].abs().min() > 0
    difference[:, :, 2:4, 6:8] = 0
    assert difference.abs().max() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.zeros(3, 4, 7, 8)}, "7×8 is not divisible by the patch size 2"),
        ({"hidden_states": torch.zeros(3, 3, 8, 8)}, r"\(3, 3, 8, 8\).*\(batch, 4, height, width\)"),
        ({"hidden_states": torch.zeros(4, 8, 8)}, r"\(4, 8, 8\)"),
        ({"hidden_states": torch.zeros(8, 8)}, r"\(8, 8\)"),
        ({"class_labels": torch.tensor([1, 2])}, r"\(2,\).*batch of 3"),
        ({"force_drop_ids": torch.zeros(3, 1)}, r"`force_drop_ids` has shape \(3, 1\).*\(3,\)"),
        ({"timestep": torch.zeros(2)}, r"`timestep` has shape \(2,\).*\(3,\)"),
        *(({"timestep": value}, "`timestep` is") for value in (None, "x", [1, 2, 3], True)),
        *(({"class_labels": value}, "`class_labels` is") for value in (None, [1, 2, 3], torch.ones(3).to_sparse())),
        ({"hidden_states": None}, "`hidden_states` is NoneType"),
        ({"hidden_states": torch.zeros(3, 4, 8, 8).to_sparse()}, "`hidden_states` is sparse"),
        ({"force_drop_ids": [1, 0, 1]}, "`force_drop_ids` is list"),
        ({"modulation": "x"}, "`modulation` is str"),
        ({"modulation": torch.zeros(3)}, r"`modulation` has shape \(3,\)"),
    ],
)
def test_wrong_inputs_are_named(transformer, change, message):
    with pytest.raises(ValueError, match=message):
        transformer(**(tiny_inputs() | change))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"conditioning": "film"}, "film.*adaln_zero"),
        ({"position_embedding": "learned"}, "learned.*sincos"),
        ({"sample_size": 0}, "`sample_size` is 0"),
        ({"num_classes": 0}, "`num_classes` is 0"),
        ({"class_dropout_prob": 1.5}, "`class_dropout_prob` is 1.5"),
        ({"sample_size": 9}, "9 is not divisible by `patch_size` 2"),
        ({"num_attention_heads": 3, "attention_head_dim": 3}, "9 must be divisible by 4"),
    ],
)
def test_wrong_options_are_named(option, message):
    with pytest.raises(ValueError, match=message):
        DiTTransformer2DModel(**(TINY | option))


@torch.no_grad()
def test_return_tuple(transformer):
    inputs = tiny_inputs()
    assert torch.equal(transformer(**inputs, return_dict=False)[0], transformer(**inputs).sample)


def test_rotary_tables_of_an_inference_call_do_not_spoil_training():
    model = tiny_transformer(position_embedding="sincos+rope")
    with torch.inference_mode():
        model(**tiny_inputs())
    model.train()(**tiny_inputs()).sample.mean().backward()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"norm": "batch_norm"}, "`norm` is 'batch_norm'.*rms_norm"),
        ({"ff": "relu"}, "`ff` is 'relu'.*swiglu"),
        ({"position_embedding": "sincos+rope", "conditioning": "in_context"}, "no place for the tokens"),
        ({"position_embedding": "sincos+rope", "attention_head_dim": 14, "num_attention_heads": 2}, "multiple of 4"),
        ({"modulation_shift": False, "conditioning": "cross_attention"}, "needs adaptive norms"),
    ],
)
def test_options_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny_transformer(**overrides)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("num_layers", "num_classes") for value in ("two", 0, -1, True, None, 2.0, 10**9)),
        *(("patch_size", value) for value in (0, [2, 2], 10**9)),
        *(("mlp_ratio", value) for value in (0, float("nan"), "4", 1e9, 1e-9)),
        *(("class_dropout_prob", value) for value in (-0.1, 1.1, float("nan"), "x", True)),
        *(("timestep_scale", value) for value in (0, float("inf"), "x")),
        *(("learn_sigma", value) for value in ("yes", 1, None)),
        ("sample_size", 2**14),
        ("attention_head_dim", 2**14),
    ],
)
def test_sizes_out_of_range_are_refused_before_anything_is_allocated(name, value):
    options = {"sample_size": 8, "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 12}
    if name == "attention_head_dim":
        options |= {"num_attention_heads": 2**12}
    with pytest.raises(ValueError) as error:
        DiTTransformer2DModel(**(options | {name: value}))
    assert f"`{name}`" in str(error.value) and str(value) in str(error.value)


def test_weights_are_counted_as_they_are():
    for design in DESIGNS:
        model = tiny_design(design)
        matrices = sum(weight.numel() for weight in model.parameters() if weight.ndim > 1)
        assert count_weights(model.config) == matrices, design
