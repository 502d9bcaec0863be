"""Guidance: diffusers' guiders in the pipeline, scales by noise level, autoguidance; each against a closed form."""

import copy
import json

import diffusers
import pytest
import torch
from conftest import predict, tiny_transformer
from diffusers import (
    AdaptiveProjectedGuidance,
    AdaptiveProjectedMixGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    DiffusionPipeline,
    LayerSkipConfig,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
    TangentialClassifierFreeGuidance,
)
from diffusers.guiders import MagnitudeAwareGuidance

from dit_hf import DiTClassCondPipeline, make_scheduler
from dit_hf.pipeline_dit_class_cond import count_hooks


STEPS, SCALE = 6, 3.0
LABELS = torch.tensor([3, 7])
LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def build(scheduler="flow_euler", **options):
    return DiTClassCondPipeline(tiny_transformer(learn_sigma=False), make_scheduler(scheduler), **options)


def sample(pipe, **options):
    call = {"latents": LATENTS, "num_inference_steps": STEPS, "output_type": "latent"} | options
    return pipe(LABELS, **call).images


def count_rows(pipe):
    """A list that gets the batch size of each evaluation of the model."""
    rows = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    return rows


def by_hand(pipe, combine, changed=None):
    """Euler's steps along what `combine(step, conditional, null, of the changed model)` makes of the predictions."""
    scheduler, latents, null = pipe.scheduler, LATENTS, torch.full_like(LABELS, 10)
    sigmas = torch.linspace(1, 0, STEPS + 1)
    for step, (sigma, following) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        time = scheduler.config.num_train_timesteps * sigma
        with torch.no_grad():
            models = [(pipe.transformer, LABELS), (pipe.transformer, null)]
            models += [] if changed is None else [(changed, LABELS), (changed, null)]
            predictions = [
                model(hidden_states=latents, timestep=time, class_labels=labels).sample for model, labels in models
            ]
        latents = latents + (following - sigma) * combine(step, *predictions)
    return latents


def assert_close(actual, expected):
    error = ((actual - expected).norm() / expected.norm()).item()
    assert error < 1e-5, f"{error:.1e}"


def norm(values):
    return values.flatten(1).norm(dim=1)[:, None, None, None]


def dot(left, right):
    return (left * right).flatten(1).sum(1)[:, None, None, None]


def plain(step, strong, weak, *others):
    return weak + SCALE * (strong - weak)


def projected(eta, threshold):
    """APG without momentum: the difference, no longer than the threshold, with less along the prediction."""

    def combine(step, strong, weak, *others):
        difference = strong - weak
        difference = difference * (threshold / norm(difference)).clamp(max=1)
        along = dot(difference, strong) / dot(strong, strong) * strong
        return weak + SCALE * (difference - along + eta * along)

    return combine


def with_momentum(momentum):
    average = 0

    def combine(step, strong, weak, *others):
        nonlocal average
        average = strong - weak + momentum * average
        return weak + SCALE * average

    return combine


def zero_star(step, strong, weak, *others):
    """No step at first, then guidance from the null prediction at the length that fits best."""
    if step == 0:
        return torch.zeros_like(strong)
    weak = dot(strong, weak) / dot(weak, weak) * weak
    return weak + SCALE * (strong - weak)


def tangential(step, strong, weak, *others):
    """The null prediction's part in the plane's main direction of both predictions."""
    both = torch.stack([strong.flatten(1), weak.flatten(1)], dim=1).double()
    main = torch.linalg.eigh(both.mT @ both).eigenvectors[:, :, -1:]
    weak = (main @ (main.mT @ weak.flatten(1).double()[:, :, None]))[:, :, 0].to(weak).view_as(weak)
    return weak + SCALE * (strong - weak)


def without_block(transformer):
    changed = copy.deepcopy(transformer)
    del changed.transformer_blocks[1]
    return changed


def without_attention_scores(transformer):
    """Attention of the second block returns each token's value."""
    changed = copy.deepcopy(transformer)
    attention = changed.transformer_blocks[1].attn
    attention.forward = lambda hidden_states, **kwargs: attention.to_out[0](attention.to_v(hidden_states))
    return changed


def and_changed(scale):
    """Plain guidance, and away from the changed model's prediction for the class."""
    return lambda step, strong, weak, other, _: plain(step, strong, weak) + scale * (strong - other)


def autoguided(step, strong, weak, changed, changed_weak):
    return changed_weak + SCALE * (strong - changed_weak)


# fmt: off
GUIDERS = {
    "cfg": (ClassifierFreeGuidance(SCALE), plain, None, 2),
    "apg": (AdaptiveProjectedGuidance(SCALE, eta=0.3, adaptive_projected_guidance_rescale=5.0), projected(0.3, 5.0),
            None, 2),
    "apg with momentum": (AdaptiveProjectedGuidance(SCALE, adaptive_projected_guidance_momentum=-0.4,
                                                    adaptive_projected_guidance_rescale=0.0), with_momentum(-0.4),
                          None, 2),
    "zero*": (ClassifierFreeZeroStarGuidance(SCALE), zero_star, None, 2),
    "tangential": (TangentialClassifierFreeGuidance(SCALE), tangential, None, 2),
    "skipped layer": (SkipLayerGuidance(SCALE, skip_layer_guidance_scale=2.0, skip_layer_config={"indices": [1]},
                                        skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0),
                      and_changed(2.0), without_block, 3),
    "perturbed attention": (PerturbedAttentionGuidance(SCALE, perturbed_guidance_scale=2.0,
                                                       perturbed_guidance_layers=[1], perturbed_guidance_start=0.0,
                                                       perturbed_guidance_stop=1.0),
                            and_changed(2.0), without_attention_scores, 3),
    "auto": (AutoGuidance(SCALE, auto_guidance_config={"indices": [1]}), autoguided, without_block, 2),
}
# fmt: on


@pytest.mark.parametrize("name", GUIDERS)
def test_every_guider_equals_its_closed_form(name):
    guider, combine, change, predictions = GUIDERS[name]
    pipe = build()
    changed = None if change is None else change(pipe.transformer)
    if predictions == 3:  # diffusers' perturbations start after the first step of their interval
        whole = combine
        combine = lambda step, *outputs: whole(step, *outputs) if step else plain(step, *outputs)  # noqa: E731
    expected = by_hand(pipe, combine, changed)
    before, rows = copy.deepcopy(guider.get_state()), count_rows(pipe)
    output = sample(pipe, guider=guider)
    assert_close(output, expected)
    assert sum(rows) == 2 * (predictions * STEPS - (predictions == 3))
    assert torch.equal(output, sample(pipe, guider=guider)) and guider.get_state() == before  # no call leaves a trace
    pipe.guider = guider
    assert torch.equal(output, sample(pipe))
    assert not torch.allclose(output, sample(pipe, guidance_scale=SCALE + 1), atol=1e-3)


def test_projected_guidance_with_pyramids_of_the_mix():
    """APG's mix is plain guidance while it has not started."""
    guider = AdaptiveProjectedMixGuidance(guidance_scale=SCALE, adaptive_projected_guidance_start_step=STEPS)
    pipe = build()
    assert_close(sample(pipe, guider=guider), by_hand(pipe, plain))


def test_the_plain_guider_equals_the_scale_to_the_bit():
    pipe = build()
    for options in ({}, {"guidance_channels": 3}, {"guidance_interval": (0.2, 0.7)}):
        rows = count_rows(pipe)
        expected, paid = sample(pipe, guidance_scale=SCALE, **options), rows.copy()
        rows.clear()
        assert torch.equal(sample(pipe, guider=ClassifierFreeGuidance(SCALE), **options), expected)
        assert rows == paid


def test_the_variance_stays_conditional_with_a_guider():
    """With DDPM's learned variance, of which nothing is guided."""
    transformer = tiny_transformer()
    pipe = DiTClassCondPipeline(transformer, make_scheduler("ddpm"), guider=ClassifierFreeGuidance(SCALE))
    options = {"latents": LATENTS, "num_inference_steps": 3, "output_type": "latent"}
    images = [
        pipe(LABELS, generator=torch.manual_seed(0), **options).images,
        build_plain(transformer)(LABELS, generator=torch.manual_seed(0), guidance_scale=SCALE, **options).images,
    ]
    assert torch.equal(*images)


def build_plain(transformer):
    return DiTClassCondPipeline(transformer, make_scheduler("ddpm"))


def test_a_guide_takes_the_place_of_a_guiders_null_class():
    guide = tiny_transformer(1, learn_sigma=False, num_layers=1)
    pipe = build(guide=guide)
    expected = by_hand(pipe, lambda step, strong, _, weak, __: projected(0.0, 5.0)(step, strong, weak), guide)
    rows, labels = count_rows(pipe), []
    guide.register_forward_pre_hook(
        lambda module, args, kwargs: labels.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    guider = AdaptiveProjectedGuidance(SCALE, eta=0.0, adaptive_projected_guidance_rescale=5.0)
    assert_close(sample(pipe, guider=guider), expected)
    assert rows == [2] * STEPS and labels == [LABELS.tolist()] * STEPS


@pytest.mark.parametrize("name", ["skipped layer", "perturbed attention"])
def test_a_guide_beside_a_guider_that_changes_the_model(name):
    """Away from the guide's prediction, and away from the changed model's."""
    guide, pipe = tiny_transformer(1, learn_sigma=False, num_layers=1), build()
    changed = GUIDERS[name][2](pipe.transformer)

    def combine(step, strong, _, perturbed, __):
        with torch.no_grad():
            weak = guide(hidden_states=combine.latents, timestep=combine.time, class_labels=LABELS).sample
        return weak + SCALE * (strong - weak) + (2.0 * (strong - perturbed) if step else 0)

    forward = pipe.transformer.forward

    def remember(hidden_states, timestep, class_labels, **options):
        combine.latents, combine.time = hidden_states, timestep
        return forward(hidden_states=hidden_states, timestep=timestep, class_labels=class_labels, **options)

    pipe.transformer.forward = remember
    expected = by_hand(pipe, combine, changed)
    pipe.transformer.forward = forward
    pipe.guide = guide
    assert_close(sample(pipe, guider=GUIDERS[name][0]), expected)


def test_the_scale_by_noise_level():
    """A table, linear between its rows and constant beyond, and a function; rows of 1 cost no second prediction."""
    pipe = build()
    levels = torch.linspace(1, 0, STEPS + 1)[:-1]
    table = [(0.5, 4.0), (0.25, 1.0), (0.8, 1.0)]
    scales = [1.0, 1.0, 1 + 3 * (0.8 - 4 / 6) / 0.3, 4.0, 1 + 3 * (2 / 6 - 0.25) / 0.25, 1.0]

    def combine(step, strong, weak):
        return weak + scales[step] * (strong - weak)

    expected, rows = by_hand(pipe, combine), count_rows(pipe)
    assert_close(sample(pipe, guidance_scale=table), expected)
    assert rows == [2, 2, 4, 4, 4, 2]
    seen = []
    assert_close(sample(pipe, guidance_scale=lambda level: seen.append(level) or scales[len(seen) - 1]), expected)
    torch.testing.assert_close(torch.tensor(seen), levels.double().float())
    guider = ClassifierFreeGuidance(9.0)
    assert torch.equal(sample(pipe, guidance_scale=table, guider=guider), sample(pipe, guidance_scale=table))


def test_a_table_and_a_guider_are_saved(tmp_path):
    guider = PerturbedAttentionGuidance(2.0, perturbed_guidance_scale=1.5, perturbed_guidance_layers=[1])
    table = [[0.5, 4.0], [0.25, 1.0]]
    pipe = build(guider=guider, recommended_call={"guidance_scale": table, "num_inference_steps": 3})
    pipe.save_pretrained(tmp_path)
    assert "| guider | PerturbedAttentionGuidance |" in (tmp_path / "README.md").read_text()
    loaded = [
        DiTClassCondPipeline.from_pretrained(tmp_path),
        DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True),
    ]
    for other in loaded:
        assert other.resolve_call()["guidance_scale"] == 2.0
        assert torch.equal(sample(other), sample(pipe))
    without = DiTClassCondPipeline.from_pretrained(tmp_path, guider=None)
    assert without.resolve_call()["guidance_scale"] == table
    assert torch.equal(sample(without), sample(build(), guidance_scale=table))
    given = DiTClassCondPipeline.from_pretrained(tmp_path, guider=ClassifierFreeGuidance(5.0))
    assert torch.equal(sample(given), sample(build(), guidance_scale=5.0))
    given.guider = MagnitudeAwareGuidance()
    with pytest.raises(ValueError, match="The guider is a MagnitudeAwareGuidance, .* would not load again"):
        given.save_pretrained(tmp_path / "other")
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["guider"] = ["diffusers", "AutoencoderKL"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="has no such guider"):
        DiTClassCondPipeline.from_pretrained(tmp_path)


def no_null(**options):
    return DiTClassCondPipeline(tiny_transformer(learn_sigma=False, class_dropout_prob=0.0), make_scheduler("ddim"))


@pytest.mark.parametrize(
    ("pipe", "options", "words"),
    [
        (build, {"guider": ClassifierFreeGuidance}, "`guider` is the class ClassifierFreeGuidance"),
        (build, {"guider": 3.0}, "`guider` is a float; it must be a diffusers guider"),
        (build, {"guidance_scale": [(0.5, 2.0), (1.5, 1.0)]}, "a table of it must hold pairs"),
        (build, {"guidance_scale": [1.0, 2.0]}, "a table of it must hold pairs"),
        (build, {"guidance_scale": []}, "a table of it must hold pairs"),
        (build, {"guidance_scale": [(0.5, -2.0)]}, "`guidance_scale` is -2.0; it must be a number from 0"),
        (build, {"guidance_scale": lambda level: float("nan")}, "`guidance_scale` is nan"),
        (
            build,
            {"guider": SkipLayerGuidance(skip_layer_config={"indices": [7]}, skip_layer_guidance_stop=1.0)},
            "SkipLayerGuidance can't guide this pipeline: Could not find any transformer blocks",
        ),
        (
            no_null,
            {"guider": AutoGuidance(2.0, auto_guidance_config={"indices": [1]}), "guidance_scale": 2.0},
            "it needs the null class, which this model was trained without",
        ),
        (
            build,
            {"guider": MagnitudeAwareGuidance()},
            "MagnitudeAwareGuidance can't guide this pipeline: RuntimeError",
        ),
        (
            no_null,
            {"guider": SmoothedEnergyGuidance(1.0, seg_guidance_layers=[1], use_original_formulation=True)},
            "it needs the null class, which this model was trained without",
        ),
    ],
)
def test_what_can_not_guide_is_refused_before_any_compute(pipe, options, words):
    pipe = pipe()
    rows = count_rows(pipe)
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        sample(pipe, **options)
    assert rows == []


def test_a_guider_without_effect_is_reported(caplog):
    """Smoothed energy is not applied by diffusers 0.42; a skipped layer has no step in a short interval of its own."""
    pipe = build()
    expected = sample(pipe, guidance_scale=SCALE)
    assert not caplog.records
    for guider in (
        SmoothedEnergyGuidance(SCALE, seg_guidance_layers=[1]),
        SkipLayerGuidance(SCALE, skip_layer_config={"indices": [1]}, skip_layer_guidance_stop=0.2),
    ):
        caplog.clear()
        assert_close(sample(pipe, guider=guider), expected)
        assert f"{type(guider).__name__} changes the model at none of these 6 steps" in caplog.text


def test_a_failing_model_keeps_no_perturbation():
    pipe = build()
    guider = SkipLayerGuidance(skip_layer_config={"indices": [1]}, skip_layer_guidance_stop=1.0)
    expected = sample(pipe, guidance_scale=SCALE)

    def fail(module, args, kwargs):
        if count_hooks(pipe.transformer):
            raise RuntimeError("out of memory")

    handle = pipe.transformer.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        sample(pipe, guider=guider)
    handle.remove()
    assert count_hooks(pipe.transformer) == 0
    assert torch.equal(sample(pipe, guidance_scale=SCALE), expected)


def test_a_refused_guider_leaves_the_model_as_it_was():
    pipe = build()
    layers = [LayerSkipConfig(indices=[0]), LayerSkipConfig(indices=[7])]
    with pytest.raises(ValueError, match="Could not find any transformer blocks"):
        sample(pipe, guider=SkipLayerGuidance(SCALE, skip_layer_config=layers, skip_layer_guidance_stop=1.0))
    assert count_hooks(pipe.transformer) == 0


def test_a_guider_is_judged_with_the_scale_and_interval_of_the_call(caplog):
    """Its own scale may need the null class that the call's does not, or be neutral where the call's is not."""
    layers = {"skip_layer_config": {"indices": [1]}, "skip_layer_guidance_stop": 1.0}
    auto = {"auto_guidance_config": {"indices": [1]}}
    pipe = build()
    expected = sample(pipe, guider=AutoGuidance(SCALE, **auto))
    caplog.clear()
    assert torch.equal(sample(pipe, guider=AutoGuidance(1.0, **auto), guidance_scale=SCALE), expected)
    assert "changes the model at none" not in caplog.text
    early = SkipLayerGuidance(SCALE, **(layers | {"skip_layer_guidance_stop": 0.5}))
    sample(pipe, guider=early, guidance_interval=(0.5, 1.0))
    assert "changes the model at none" in caplog.text
    with pytest.raises(ValueError, match="where `guidance_scale` is 1, diffusers takes the null class"):
        sample(pipe, guider=SkipLayerGuidance(SCALE, **layers), guidance_scale=1.0)


def test_an_interval_without_a_guided_step_is_reported(caplog):
    sample(build(), guidance_scale=[(1.0, 1.0), (0.4, 1.0), (0.0, 9.0)], guidance_interval=(0.0, 0.5))
    assert "`guidance_interval` (0.0, 0.5) guides none of the 6 steps that run, 0 to 5 of 6" in caplog.text


def test_the_recommended_interval_is_for_the_recommended_kind_of_guidance():
    pipe = build(recommended_call={"guidance_scale": 2.0, "guidance_interval": (0.0, 0.5)})
    whole = {"guidance_interval": (0.0, 1.0)}
    for options in ({"guider": ClassifierFreeGuidance(SCALE)}, {"guidance_scale": [(0.0, 5.0), (1.0, 1.0)]}):
        assert torch.equal(sample(pipe, **options), sample(pipe, **options, **whole))
    assert not torch.equal(sample(pipe), sample(pipe, **whole))


def test_a_callback_ends_guidance_where_the_table_has_none():
    pipe, rows = build(), []

    def end(pipe, step, timestep, tensors):
        rows.append(step)
        if step == 2:
            pipe._guidance_scale = 1.0
        return {}

    table = [(1.0, 3.0), (0.8, 1.0), (0.6, 1.0), (0.5, 3.0)]  # 1 at the third step
    paid = count_rows(pipe)
    sample(pipe, guidance_scale=table, callback_on_step_end=end)
    assert paid == [4, 4, 2, 2, 2, 2]


def test_a_guider_disabled_by_its_owner_does_not_guide():
    pipe, guider = build(), ClassifierFreeGuidance(SCALE)
    guider.disable()
    assert torch.equal(sample(pipe, guider=guider), sample(pipe, guidance_scale=1.0))


def test_the_scale_of_one_is_the_models_own_prediction():
    pipe = build()
    expected = pipe.transformer(LATENTS, 500, LABELS).sample
    assert torch.equal(predict(pipe, LATENTS, 500, LABELS, scale=1.0), expected)


def test_every_guider_of_diffusers_is_known_here():
    """A new one makes this fail, and wants a row above or a word in the guide."""
    known = {type(guider).__name__ for guider, *_ in GUIDERS.values()} | {"AdaptiveProjectedMixGuidance"}
    known |= {"MagnitudeAwareGuidance", "SmoothedEnergyGuidance"}  # which this diffusers does not apply to images
    others = {"BaseGuidance", "FrequencyDecoupledGuidance", "LTX2Guidance"}  # needs kornia; of video with sound
    assert {name for name in dir(diffusers.guiders) if name.endswith("Guidance")} <= known | others
