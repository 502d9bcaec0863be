"""The table of modulation, presets that can be undone, int8 weights."""

import pytest
import torch
from conftest import DESIGNS, tiny_design, tiny_inputs, tiny_transformer, tiny_vae
from diffusers import FasterCacheConfig, FirstBlockCacheConfig, TorchAoConfig
from torchao.quantization import Int8DynamicActivationInt8WeightConfig

import dit_hf
from dit_hf import DiTClassCondPipeline, DiTTransformer2DModel, make_scheduler, modulation_table
from dit_hf.optimization import SPEED_PRESETS, quantize_blocks, use_modulation_table


INT8 = TorchAoConfig(Int8DynamicActivationInt8WeightConfig(), modules_to_not_convert=["time_embed", "proj_out"])
ADAPTIVE = [name for name, design in DESIGNS.items() if design.get("conditioning", "adaln_zero").startswith("adaln")]


def tiny_pipeline(scheduler="ddim", **overrides):
    scheduler = make_scheduler(scheduler) if isinstance(scheduler, str) else scheduler
    pipe = DiTClassCondPipeline(tiny_transformer(**overrides), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, labels=(1, 1, 4), **options):
    options = {"num_inference_steps": 6, "output_type": "latent"} | options
    return pipe(list(labels), generator=torch.Generator().manual_seed(0), **options).images


def embedded_rows(pipe, **options):
    """How many rows of time are embedded in each call of the time embedding during one call of the pipeline."""
    rows = []
    handle = pipe.transformer.time_embed.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    images = generate(pipe, **options)
    handle.remove()
    return rows, images


def tabulated_pipeline(*args, **overrides):
    pipe = tiny_pipeline(*args, **overrides)
    use_modulation_table(pipe)
    return pipe


@pytest.mark.parametrize("design", ADAPTIVE)
def test_modulation_given_equals_modulation_computed(design):
    model, inputs = tiny_design(design), tiny_inputs()
    with torch.no_grad():
        modulation = model.compute_modulation(inputs["timestep"], inputs["class_labels"])
        given = model(**inputs, modulation=modulation).sample
        torch.testing.assert_close(given, model(**inputs).sample, atol=1e-6, rtol=0)
        other = model(**inputs, modulation=modulation.roll(1, dims=0)).sample
    assert not torch.allclose(given, other, atol=1e-2)


def test_modulation_drops_no_label_in_training():
    model, labels = tiny_transformer().train(), torch.arange(10).repeat(30)
    with torch.no_grad():
        rows = model.compute_modulation(torch.full((300,), 5.0), labels)
    torch.testing.assert_close(rows, rows[:10].repeat(30, 1), atol=1e-5, rtol=0)


def test_modulation_is_refused_where_it_has_no_place():
    context = tiny_design("in_context")
    with pytest.raises(ValueError, match="in_context"):
        context.compute_modulation(torch.zeros(3), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="modulation"):
        context(**tiny_inputs(), modulation=torch.zeros(3, 48))
    with pytest.raises(ValueError, match="force_drop_ids"):
        tiny_transformer()(**tiny_inputs(), force_drop_ids=torch.ones(3), modulation=torch.zeros(3, 672))


def test_time_and_class_are_embedded_once_for_all_steps():
    """Six steps of two distinct labels and the null class are 18 rows, in one call; without the table 6 calls."""
    rows, images = embedded_rows(tabulated_pipeline())
    assert rows == [6 * 3]
    rows, expected = embedded_rows(tiny_pipeline())
    assert rows == [6] * 6
    assert (images - expected).norm() / expected.norm() < 1e-5


def test_calls_that_are_no_step_are_computed_without_the_table():
    model, tabulated = tiny_transformer(), tabulated_pipeline()
    generate(tabulated)
    inputs = tiny_inputs()
    steps = tabulated.scheduler.timesteps[:1].float()
    with torch.no_grad():
        for changed in (
            {},  # every row another timestep
            {"timestep": 500},
            {"timestep": torch.full((3,), 0.5)},
            {"timestep": steps.expand(3), "force_drop_ids": torch.tensor([1, 0, 1])},
        ):
            expected = model(**inputs | changed).sample
            torch.testing.assert_close(tabulated.transformer(**inputs | changed).sample, expected, atol=1e-5, rtol=0)


def test_every_trajectory_has_a_table_of_its_own():
    """What a call embedded is not used by the next, whose weights and schedule may be others."""
    pipe = tabulated_pipeline()
    assert embedded_rows(pipe, num_inference_steps=5)[0] == embedded_rows(pipe, num_inference_steps=5)[0] == [15]
    first = generate(pipe)
    with torch.no_grad():
        pipe.transformer.class_embed.weight.mul_(2)
    assert not torch.allclose(generate(pipe), first, atol=1e-3)
    assert embedded_rows(pipe, num_inference_steps=7)[0] == [21]


def test_short_trajectories_go_without_a_table():
    assert embedded_rows(tabulated_pipeline(), num_inference_steps=4)[0] == [6] * 4


@pytest.mark.parametrize("way", ["short", "long", "cached", "direct"])
def test_mixed_classes_of_an_optimized_pipeline_are_those_of_the_pipeline(way):
    """With and without the table; the compiled network embeds the label itself, where a mixture can't reach it."""
    pipe = tiny_pipeline("flow_euler")

    def run():
        if way != "direct":
            return generate(pipe, num_inference_steps=2 if way == "short" else 6)
        with torch.no_grad():
            return pipe.transformer(**tiny_inputs()).sample

    if way == "cached":
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e-9))
    found = []
    for _ in range(2):
        found.append(run())
        with dit_hf.mix_classes(pipe.transformer, 7, 0.5):
            found.append(run())
        found.append(run())
        dit_hf.optimize(pipe, "exact")
    assert not torch.allclose(found[0], found[1], atol=1e-2)
    for before, after in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_no_timestep_is_taken_to_the_device_on_the_way():
    """The model gets views of one tensor, which is there before the first step: a copy would wait for a GPU."""
    pipe, seen = tiny_pipeline("dpm++"), []
    pipe.transformer.register_forward_pre_hook(
        lambda module, inputs, options: seen.append(options["timestep"].untyped_storage().data_ptr()), with_kwargs=True
    )
    generate(pipe, guidance_interval=(0.0, 0.5))
    assert len(seen) == 6 and len(set(seen)) == 1


@pytest.mark.parametrize("at_a_time", (3, 7, 2))
def test_the_table_is_made_in_parts_when_it_is_large(at_a_time, monkeypatch):
    _, expected = embedded_rows(tiny_pipeline("dpm++"), guidance_interval=(0.3, 0.8))
    monkeypatch.setattr(modulation_table, "ROWS", at_a_time)
    rows, images = embedded_rows(tabulated_pipeline("dpm++"), guidance_interval=(0.3, 0.8))
    assert max(rows) <= max(3, at_a_time) and sum(rows) == 18
    assert (images - expected).norm() / expected.norm() < 1e-5


def test_models_without_a_null_class_get_a_table_too():
    rows, images = embedded_rows(tabulated_pipeline(class_dropout_prob=0.0))
    assert rows == [12]
    torch.testing.assert_close(images, generate(tiny_pipeline(class_dropout_prob=0.0)), atol=1e-5, rtol=1e-5)


def test_labels_changed_on_the_way_are_used():
    def change(pipe, step, timestep, tensors):
        return {"class_labels": torch.full_like(tensors["class_labels"], 7)} if step == 2 else {}

    options = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["class_labels"]}
    pipe = tabulated_pipeline()
    changed = generate(pipe, **options)
    assert not torch.allclose(changed, generate(pipe), atol=1e-3)
    expected = generate(tiny_pipeline(), **options)
    assert (changed - expected).norm() / expected.norm() < 1e-5


def test_a_table_beside_caches_and_other_conditionings():
    pipe = tabulated_pipeline()
    pipe.transformer.enable_cache(
        FasterCacheConfig(
            spatial_attention_block_identifiers=["transformer_blocks"],
            _unconditional_conditional_input_kwargs_identifiers=["hidden_states", "timestep", "class_labels"],
            current_timestep_callback=lambda: int(pipe.current_timestep),
            tensor_format="BCHW",
        )
    )
    assert len(embedded_rows(pipe)[0]) == 6
    pipe.transformer.disable_cache()
    assert len(embedded_rows(pipe)[0]) == 1
    pipe = DiTClassCondPipeline(tiny_design("cross_attention"), make_scheduler("ddim"))
    dit_hf.optimize(pipe, "exact")
    assert getattr(pipe.transformer._compiled_call_impl, "embeds_classes_eagerly", None) is None


@pytest.mark.parametrize("preset", SPEED_PRESETS)
def test_presets_are_undone_to_the_bit(preset):
    pipe = tiny_pipeline("flow_euler")
    weights = {name: (parameter, parameter.clone()) for name, parameter in pipe.transformer.named_parameters()}
    scheduler, expected = pipe.scheduler, generate(pipe, guidance_scale=3.0)
    pipe.register_to_config(recommended_call={"guidance_scale": 3.0, "num_inference_steps": 9})
    assert dit_hf.optimize(pipe, preset=preset) is None
    steps, interval = SPEED_PRESETS[preset].num_inference_steps, SPEED_PRESETS[preset].guidance_interval
    call = {"guidance_scale": 3.0, "num_inference_steps": steps or 9, "guidance_interval": interval or (0.0, 1.0)}
    assert pipe.resolve_call() == {"guidance_channels": None} | call
    images = generate(pipe)
    assert images.isfinite().all() and pipe.num_timesteps == 6  # what a call gives goes before
    if preset == "exact":
        torch.testing.assert_close(images, expected, atol=1e-4, rtol=1e-4)
    if SPEED_PRESETS[preset].precision == "int8":
        assert type(pipe.transformer.transformer_blocks[0].attn.to_q.weight).__name__ == "Int8Tensor"
        assert (images - expected).norm() / expected.norm() > 0
    dit_hf.restore(pipe)
    assert pipe.resolve_call()["num_inference_steps"] == 9
    assert pipe.scheduler is scheduler and pipe.transformer._compiled_call_impl is None
    for name, parameter in pipe.transformer.named_parameters():
        assert parameter is weights[name][0] and torch.equal(parameter, weights[name][1]), name
    assert torch.equal(generate(pipe), expected)


@pytest.mark.parametrize("name", ["jit", "ddt"])
def test_other_architectures_are_quantized_whole_and_have_no_table(name):
    model = tiny_design(name)
    pipe = DiTClassCondPipeline(model, make_scheduler("flow_euler"))
    dit_hf.optimize(pipe)
    assert not hasattr(pipe.transformer._compiled_call_impl, "embeds_classes_eagerly")
    dit_hf.restore(pipe)
    assert pipe.transformer._compiled_call_impl is None
    assert len(quantize_blocks(model)) == 7 * model.config.num_layers  # attention and SwiGLU of both streams


def test_the_decoder_is_compiled_and_restored_too():
    pipe = DiTClassCondPipeline(tiny_transformer(), make_scheduler("ddim"), tiny_vae())
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = pipe.decode_latents(latents, "pt")
        dit_hf.optimize(pipe, "exact")
        assert pipe.vae.decoder._compiled_call_impl is not None
        torch.testing.assert_close(pipe.decode_latents(latents, "pt"), expected, atol=1e-5, rtol=1e-5)
        dit_hf.restore(pipe)
        assert pipe.vae.decoder._compiled_call_impl is None
        assert torch.equal(pipe.decode_latents(latents, "pt"), expected)


def test_weights_changed_after_a_restore_are_used():
    pipe = tiny_pipeline("flow_euler")
    dit_hf.optimize(pipe, "exact")
    first = generate(pipe)
    dit_hf.restore(pipe)
    pipe.transformer.load_state_dict(tiny_transformer(seed=1).state_dict())
    expected = generate(pipe)
    dit_hf.optimize(pipe, "exact")
    torch.testing.assert_close(generate(pipe), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(first, expected, atol=1e-2)


def test_a_preset_takes_the_place_of_another():
    pipe = tiny_pipeline(make_scheduler("ddim", beta_end=0.018, prediction_type="v_prediction"))
    weight = pipe.transformer.transformer_blocks[0].attn.to_q.weight
    dit_hf.optimize(pipe, "fastest")
    assert type(pipe.scheduler).__name__ == "UniPCMultistepScheduler"
    assert (pipe.scheduler.config.beta_end, pipe.scheduler.config.prediction_type) == (0.018, "v_prediction")
    assert generate(pipe).isfinite().all()
    dit_hf.optimize(pipe, "exact", device="cpu")
    assert pipe.transformer.transformer_blocks[0].attn.to_q.weight is weight
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"
    dit_hf.restore(pipe)
    dit_hf.restore(pipe)  # nothing left to undo


def test_what_optimized_pipelines_refuse(tmp_path):
    pipe = tiny_pipeline()
    with pytest.raises(ValueError, match="exact, int8, balanced, fastest"):
        dit_hf.optimize(pipe, "turbo")
    dit_hf.optimize(pipe, "int8")
    with pytest.raises(ValueError, match="restore"):
        pipe.save_pretrained(tmp_path / "pipe")
    assert not (tmp_path / "pipe").exists()
    dit_hf.restore(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match="offload"):
        dit_hf.optimize(pipe, "exact")


def test_int8_of_the_bundled_model_is_near_float32():
    pipe = DiTClassCondPipeline.from_bundled("emoji64")
    generator = torch.Generator().manual_seed(0)
    latents, labels = torch.randn(8, 8, 16, 16, generator=generator), torch.arange(8)
    with torch.no_grad():
        for timestep in (50.0, 500.0, 950.0):
            exact = pipe.transformer(latents, timestep, labels).sample
            weights = quantize_blocks(pipe.transformer)
            error = (pipe.transformer(latents, timestep, labels).sample - exact).norm() / exact.norm()
            assert 0 < error < 0.02, timestep
            for layer, weight in weights:
                layer.weight = weight


def test_int8_is_saved_and_loaded(tmp_path):
    """The network and the pipeline, through diffusers' quantization config, with a file about a quarter as large."""
    model = DiTTransformer2DModel.from_preset("DiT-S/8")
    for parameter in model.parameters():
        if not parameter.any():  # a fresh head and gates are zero, and so is every output
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(tmp_path / "float32")
    load = DiTTransformer2DModel.from_pretrained
    quantized = load(tmp_path / "float32", torch_dtype=torch.float32, quantization_config=INT8)
    DiTClassCondPipeline(quantized, make_scheduler("ddim")).save_pretrained(tmp_path / "int8")
    sizes = [next(tmp_path.glob(f"{name}/*.safetensors")).stat().st_size for name in ("float32", "int8/transformer")]
    assert sizes[1] < 0.35 * sizes[0]
    pipe = DiTClassCondPipeline.from_pretrained(tmp_path / "int8", torch_dtype=torch.float32)
    again = load(tmp_path / "int8", subfolder="transformer", torch_dtype=torch.float32)
    inputs = tiny_inputs(height=32, width=32)
    with torch.no_grad():
        outputs = [network(**inputs).sample for network in (quantized, again, pipe.transformer, model.eval())]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    assert 0 < (outputs[0] - outputs[3]).norm() / outputs[3].norm() < 0.02
    assert generate(pipe, num_inference_steps=2).isfinite().all()


def test_what_is_no_pipeline_is_named():
    for call in (dit_hf.optimize, dit_hf.restore):
        with pytest.raises(ValueError, match="DiTTransformer2DModel; it must be a DiTClassCondPipeline"):
            call(tiny_transformer())
    for preset in (None, ["exact"], 5):
        with pytest.raises(ValueError, match="no preset"):
            dit_hf.optimize(tiny_pipeline(), preset)


def test_weights_that_are_cast_meanwhile_do_not_go_unnoticed():
    pipe = tiny_pipeline()
    dit_hf.optimize(pipe, "fastest")
    with pytest.raises(ValueError, match="restore"):
        pipe.to(torch.bfloat16)
    pipe.to("cpu")
    pipe.transformer.to(torch.bfloat16)
    with pytest.raises(ValueError, match="cast from torch.float32 to torch.bfloat16"):
        dit_hf.restore(pipe)
    dit_hf.restore(pipe)  # nothing is left to undo
    assert type(pipe.scheduler).__name__ == "DDIMScheduler" and pipe.transformer._compiled_call_impl is None


def test_modulation_of_classes_that_are_none_is_refused():
    model = tiny_transformer()
    for labels in (
        torch.tensor([11]),
        torch.tensor([-1]),
        torch.tensor([1.0]),
        torch.tensor([[1]]),
        [1],
        torch.tensor(1),
    ):
        with pytest.raises(ValueError, match="class_labels"):
            model.compute_modulation(torch.zeros(1), labels)
    with pytest.raises(ValueError, match="timestep"):
        model.compute_modulation(torch.zeros(2), torch.tensor([1, 2, 3]))
