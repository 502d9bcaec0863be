"""What the pipeline accepts and refuses, labels and names, latents, callbacks, and the scheduler recipes."""

import inspect
import re

import numpy as np
import pytest
import torch
from conftest import predict, tiny_transformer
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from dit_hf import DiTClassCondPipeline, make_scheduler
from dit_hf.schedulers import RECIPES, trained_options


ID2LABEL = {
    0: "tench, Tinca tinca",
    1: "goldfish, Carassius auratus",
    2: "crane",
    3: "Cardigan, Cardigan Welsh corgi",
    4: "crane",
    5: "cardigan",
    6: "projectile, missile",
    7: "missile",
    11: "beyond the model",
}


def tiny_pipeline(scheduler="ddim", id2label=ID2LABEL, **config):
    scheduler = make_scheduler(scheduler) if isinstance(scheduler, str) else scheduler
    pipe = DiTClassCondPipeline(tiny_transformer(**config), scheduler, id2label=id2label)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(count):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def test_defaults_are_the_documented_ones():
    defaults = {name: p.default for name, p in inspect.signature(DiTClassCondPipeline.__call__).parameters.items()}
    expected = {
        "num_images_per_label": 1,
        "eta": 0.0,
        "output_type": "pil",
        "callback_on_step_end_tensor_inputs": ["latents"],
        "return_dict": True,
    }
    optional = (
        "guidance_scale",
        "guidance_channels",
        "guidance_interval",
        "num_inference_steps",
        "timesteps",
        "sigmas",
        "generator",
        "latents",
        "height",
        "width",
        "callback_on_step_end",
    )
    expected |= dict.fromkeys(optional)
    assert {name: defaults[name] for name in expected} == expected
    settings = {"num_inference_steps": 50, "guidance_scale": 4.0, "guidance_channels": None}
    settings["guidance_interval"] = (0.0, 1.0)
    assert tiny_pipeline().resolve_call() == settings
    assert tiny_pipeline(class_dropout_prob=0.0).resolve_call()["guidance_scale"] == 1.0


# name -> (pipeline, call, every word of it in the message: what was given and what is allowed)
LATENTS = torch.zeros(1, 4, 8, 8)
REFUSED = {
    "no image": ({}, {"output_type": "pil"}, ("no VAE", "4 channels", "latent")),
    "no labels": ({}, {"class_labels": []}, ["class_labels", "empty"]),
    "no labels in a tensor": ({}, {"class_labels": torch.tensor([]).long()}, ["class_labels", "empty"]),
    "label too large": ({}, {"class_labels": [1, 10]}, ["10", "0 to 9"]),
    "null label": ({}, {"class_labels": torch.tensor(10)}, ["10", "0 to 9"]),
    "label negative": ({}, {"class_labels": -1}, ["-1", "0 to 9"]),
    "label of the names only": ({}, {"class_labels": "beyond the model"}, ["11", "0 to 9"]),
    "label bool": ({}, {"class_labels": True}, ["True", "int", "str"]),
    "label bool in a list": ({}, {"class_labels": [1, False]}, ["False", "int", "str"]),
    "label bool in a tensor": ({}, {"class_labels": torch.tensor([True])}, ["True", "int", "str"]),
    "label float": ({}, {"class_labels": 1.0}, ["1.0", "int", "str"]),
    "label float in a tensor": ({}, {"class_labels": torch.tensor([1.0])}, ["1.0", "int", "str"]),
    "null class of a model without": (
        {"class_dropout_prob": 0.0},
        {"class_labels": [1, None]},
        ["None", "null class", "without"],
    ),
    "one-hot labels": ({}, {"class_labels": torch.eye(10).long()[3:4]}, ["(1, 10)", "one id per image", "argmax"]),
    "labels nested": ({}, {"class_labels": [[1, 2]]}, ["[1, 2]", "int", "str"]),
    "name unknown": ({}, {"class_labels": ["goldfsh"]}, ["goldfsh", "Did you mean 'goldfish'"]),
    "name without names": ({"id2label": None}, {"class_labels": "goldfish"}, ["goldfish", "no `id2label`"]),
    "name of two classes": ({}, {"class_labels": "crane"}, ["crane", "2, 4"]),
    "generators too few": ({}, {"class_labels": [1, 2], "generator": generators(1)}, ["1 generators", "2 images"]),
    "generators not per label": (
        {},
        {"class_labels": [1, 2], "generator": generators(2), "num_images_per_label": 2},
        ["2 generators", "4 images"],
    ),
    "generators in a tuple": ({}, {"generator": tuple(generators(3))}, ["3 generators", "1 images"]),
    "generators empty": ({}, {"generator": []}, ["0 generators", "1 images"]),
    "latents too few": ({}, {"class_labels": [1, 2], "latents": LATENTS}, ["(1, 4, 8, 8)", "(2, 4, 8, 8)"]),
    "latents channels": ({}, {"latents": LATENTS[:, :3]}, ["(1, 3, 8, 8)", "(1, 4, 8, 8)"]),
    "latents axes": ({}, {"latents": LATENTS[0]}, ["(4, 8, 8)", "(1, 4, 8, 8)"]),
    "latents against height": ({}, {"latents": LATENTS, "height": 16}, ["(1, 4, 8, 8)", "(1, 4, 16, 8)"]),
    "latents odd": ({}, {"latents": LATENTS[..., :7]}, ["8×7", "2"]),
    "latents without pixels": ({}, {"latents": LATENTS[..., :0]}, ["(1, 4, 8, 0)"]),
    "height odd": ({}, {"height": 15}, ["height", "15", "2"]),
    "width odd": ({}, {"width": 15}, ["width", "15", "2"]),
    "height zero": ({}, {"height": 0}, ["height", "0", "2"]),
    "height negative": ({}, {"height": -16}, ["height", "-16", "2"]),
    "height float": ({}, {"height": 16.0}, ["height", "16.0", "2"]),
    "steps zero": ({}, {"num_inference_steps": 0}, ["num_inference_steps", "0", "from 1"]),
    "steps negative": ({}, {"num_inference_steps": -5}, ["num_inference_steps", "-5", "from 1"]),
    "steps float": ({}, {"num_inference_steps": 2.0}, ["num_inference_steps", "2.0", "whole"]),
    "steps bool": ({}, {"num_inference_steps": True}, ["num_inference_steps", "True", "whole"]),
    "no images": ({}, {"num_images_per_label": 0}, ["num_images_per_label", "0", "from 1"]),
    "scale 1e30": ({}, {"guidance_scale": 1e30}, ["guidance_scale", "1e+30", "1000"]),
    "scale negative": ({}, {"guidance_scale": -1.0}, ["guidance_scale", "-1.0"]),
    "no null class": (
        {"class_dropout_prob": 0.0},
        {"guidance_scale": 4.0},
        ["guidance_scale", "4.0", "class_dropout_prob=0", "null class"],
    ),
    "guided channels none": ({}, {"guidance_channels": 0}, ["guidance_channels", "0", "1 to 4"]),
    "guided channels many": ({}, {"guidance_channels": 5}, ["guidance_channels", "5", "1 to 4"]),
    "guided channels float": ({}, {"guidance_channels": 3.0}, ["guidance_channels", "3.0", "1 to 4"]),
    "interval reversed": ({}, {"guidance_interval": (0.7, 0.2)}, ["(0.7, 0.2)", "0 ≤ start < end ≤ 1"]),
    "interval empty": ({}, {"guidance_interval": (0.5, 0.5)}, ["(0.5, 0.5)", "0 ≤ start < end ≤ 1"]),
    "interval below": ({}, {"guidance_interval": (-0.1, 1.0)}, ["(-0.1, 1.0)", "0 ≤ start < end ≤ 1"]),
    "interval in steps": ({}, {"guidance_interval": (0, 20)}, ["(0, 20)", "0 ≤ start < end ≤ 1"]),
    "interval of one": ({}, {"guidance_interval": (0.5,)}, ["(0.5,)", "(start, end)"]),
    "two schedules": (
        {"scheduler": EulerDiscreteScheduler()},
        {"timesteps": [999, 1], "sigmas": [100.0, 0.0]},
        ["timesteps", "sigmas", "both"],
    ),
    "timesteps for DDIM": ({}, {"timesteps": [999, 500]}, ["timesteps", "DDIMScheduler"]),
    "sigmas for DDIM": ({}, {"sigmas": [1.0, 0.5]}, ["sigmas", "DDIMScheduler"]),
    "sigmas for DDPM": ({"scheduler": "ddpm"}, {"sigmas": [1.0, 0.5]}, ["sigmas", "DDPMScheduler"]),
    "sigmas for EDM": ({"scheduler": EDMEulerScheduler()}, {"sigmas": [80.0, 1.0]}, ["sigmas", "EDMEulerScheduler"]),
    "sigmas without flow": ({"scheduler": UniPCMultistepScheduler()}, {"sigmas": [1.0, 0.5]}, ["use_flow_sigmas"]),
    "timesteps empty": ({"scheduler": "ddpm"}, {"timesteps": []}, ["timesteps", "a list of 1 to"]),
    "timesteps ascending": ({"scheduler": "ddpm"}, {"timesteps": [0, 500]}, ["descending"]),
    "steps beyond training": ({}, {"num_inference_steps": 1001}, ["1001", "1000"]),
    "eta for DDPM": ({"scheduler": "ddpm"}, {"eta": 0.5}, ["eta", "0.5", "DDPMScheduler"]),
    "eta for Euler": ({"scheduler": EulerDiscreteScheduler()}, {"eta": 1.0}, ["eta", "1.0", "EulerDiscreteScheduler"]),
    "eta large": ({}, {"eta": 1.5}, ["eta", "1.5", "0 to 1"]),
    "eta negative": ({}, {"eta": -0.5}, ["eta", "-0.5", "0 to 1"]),
    "learned variance": (
        {"scheduler": "ddpm", "learn_sigma": False},
        {},
        ["DDPMScheduler", "learned_range", "learn_sigma=False", "fixed_large"],
    ),
    "interval is a number": ({}, {"guidance_interval": 0.5}, ["guidance_interval", "0.5", "(start, end)"]),
    "scale is a text": ({}, {"guidance_scale": "3"}, ["guidance_scale", "'3'"]),
    "scale is no number": ({}, {"guidance_scale": float("nan")}, ["guidance_scale", "nan"]),
    "channels is a bool": ({}, {"guidance_channels": True}, ["guidance_channels", "True"]),
    "generator is a number": ({}, {"generator": 5}, ["generator", "int"]),
    "latents are a list": ({}, {"latents": [1]}, ["latents", "list"]),
    "dynamic shift": (
        {"scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)},
        {},
        ["FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting", "shift"],
    ),
    "output type": ({}, {"output_type": "jpeg"}, ["output_type", "jpeg", "pil", "np", "pt", "latent"]),
    "callback tensor": (
        {},
        {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]},
        ["prompt_embeds", "latents", "class_labels"],
    ),
}

NAN, INF = float("nan"), float("inf")
REFUSED |= {
    f"{argument} {value!r:.30}": ({}, {argument: value}, [argument])
    for argument, values in {
        "num_inference_steps": (10**9, 10**30, "2", [2], NAN),
        "num_images_per_label": (10**9, -1, 2.0, True),
        "guidance_scale": (INF, -INF, True, [1], torch.ones(2), 10**400, 1j),
        "guidance_interval": ((NAN, 1.0), (0.0, NAN), ("a", "b"), (0, 1, 2), "ab", (None, 1)),
        "eta": (NAN, INF, "x", None, True),
        "class_labels": (10**30, range(10**10), 1j, [NAN], torch.tensor([NAN])),
        "height": (10**9, 2**62),
        "latents": (torch.full((1, 4, 8, 8), NAN), torch.full((1, 4, 8, 8), INF), torch.zeros(1, 4, 8, 8).long()),
        "generator": ([5],),
        "callback_on_step_end_tensor_inputs": (None, "latents"),
    }.items()
    for value in values
}
REFUSED |= {
    f"timesteps {values!r:.30}": ({"scheduler": "ddpm"}, {"timesteps": values}, ["timesteps"])
    for values in ([NAN, 1], [5, 5], [1, 5], [10**9, 1], [5, -1], ["a"], 5, [True, False], list(range(20_000, 0, -1)))
}
REFUSED |= {
    f"sigmas {values!r:.30}": ({"scheduler": "flow_euler"}, {"sigmas": values}, ["sigmas"])
    for values in ([1.0, NAN], [0.5, 1.0], [1.0, 1.0], [1.0, -0.5], [INF, 1.0], "ab", [None])
}
REFUSED |= {
    f"{name} in {steps} steps": ({"scheduler": name}, {"num_inference_steps": steps}, ["num_inference_steps", "zero"])
    for name, steps in (("dpm++", 1000), ("unipc", 1000), ("dpm++_singlestep", 1001))
}
REFUSED["too many values"] = ({}, {"num_images_per_label": 2**20, "height": 2**12, "width": 2**12}, ["at most"])
REFUSED["offset"] = (
    {"scheduler": DDIMScheduler.from_config(make_scheduler("ddim").config, steps_offset=999)},
    {},
    ["steps_offset"],
)


ODD = {
    "sparse": torch.zeros(1, 4, 8, 8).to_sparse(),
    "meta": torch.zeros(1, 4, 8, 8, device="meta"),
    "float8": torch.zeros(1, 4, 8, 8).to(torch.float8_e4m3fn),
    "complex": torch.zeros(1, 4, 8, 8, dtype=torch.complex64),
    "nested": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),
}
for kind, tensor in ODD.items():
    for argument in ("latents", "class_labels", "eta", "guidance_scale", "num_inference_steps", "height", "sigmas"):
        flow = {"scheduler": "flow_euler"} if argument == "sigmas" else {}
        REFUSED[f"{argument} {kind}"] = (flow, {argument: tensor}, [f"`{argument}`"])


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_before_any_compute(name):
    pipeline, call, words = REFUSED[name]
    pipe = tiny_pipeline(**pipeline)
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda *args: calls.append(args))
    state = torch.get_rng_state()
    with pytest.raises(ValueError) as error:
        pipe(**({"class_labels": 1, "num_inference_steps": 2, "output_type": "latent"} | call))
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
    assert not calls and torch.equal(torch.get_rng_state(), state)


def test_what_looks_bad_but_is_not():
    options = {"num_inference_steps": 1, "output_type": "latent"}
    pipe = tiny_pipeline(class_dropout_prob=0.0)
    pipe(9, guidance_scale=1.0, guidance_channels=4, guidance_interval=[0.0, 1.0], **options)
    pipe(0, guidance_scale=1, generator=tuple(generators(1)), eta=1, height=2, width=6, **options)
    fixed = make_scheduler("ddpm", variance_type="fixed_large")
    tiny_pipeline(fixed, learn_sigma=False)(0, **options)
    tiny_pipeline(DDIMScheduler.from_config(make_scheduler("ddpm").config), learn_sigma=False)(0, **options)


@pytest.mark.parametrize(
    ("labels", "ids"),
    [
        (3, [3]),
        ("goldfish", [1]),
        ([1, "tench", np.int64(7), torch.tensor(3)], [1, 0, 7, 3]),
        ((1, "Carassius auratus"), [1, 1]),
        (range(3), [0, 1, 2]),
        (torch.tensor(4), [4]),
        (torch.tensor([[4], [2]]), [4, 2]),
        (torch.tensor([9], dtype=torch.int32), [9]),
        (np.array([5, 0]), [5, 0]),
        (np.int64(6), [6]),
        ([None, 2], [10, 2]),  # the null class
    ],
)
def test_ways_to_give_labels(labels, ids):
    pipe = tiny_pipeline()
    options = {"num_inference_steps": 2, "output_type": "latent"}
    latents = torch.randn(len(ids), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    seen = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    pipe(labels, latents=latents, **options)
    assert seen == [[10] * len(ids) + ids] * 2  # the null class first


def test_latents_are_what_the_generator_would_draw():
    pipe = tiny_pipeline()
    options = {"num_inference_steps": 3, "output_type": "latent"}
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    kept = latents.clone()
    given = pipe([1, 2], latents=latents, **options).images
    assert torch.equal(given, pipe([1, 2], generator=torch.Generator().manual_seed(4), **options).images)
    assert torch.equal(latents, kept)
    half = pipe([1, 2], latents=latents.half(), **options).images
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, given, atol=0.05, rtol=0.05)


def test_callback_sees_and_changes_tensors():
    pipe = tiny_pipeline()
    calls = []

    def callback(pipeline, step, timestep, tensors):
        calls.append((step, int(timestep), sorted(tensors)))
        assert pipeline is pipe and tensors["latents"].shape == (2, 4, 8, 8)
        if step == 0:
            assert tensors["class_labels"].tolist() == [1, 2]
            tensors["class_labels"] = torch.tensor([5, 6])
            return {"latents": torch.ones_like(tensors["latents"]), "class_labels": tensors["class_labels"]}
        assert tensors["class_labels"].tolist() == [5, 6]
        return {}

    options = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "latent"}
    tensor_inputs = ["latents", "class_labels"]
    output = pipe(
        [1, 2], callback_on_step_end=callback, callback_on_step_end_tensor_inputs=tensor_inputs, **options
    ).images
    assert calls == [(0, 500, sorted(tensor_inputs)), (1, 0, sorted(tensor_inputs))]
    prediction = predict(pipe, torch.ones(2, 4, 8, 8), 0, torch.tensor([5, 6]), scale=2.0)
    expected = pipe.scheduler.step(prediction, 0, torch.ones(2, 4, 8, 8)).prev_sample
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("returned", [5, [("latents", 1)], {"class_labels": [0]}, {"latents": "x"}])
def test_what_a_callback_returns_is_checked(returned):
    with pytest.raises(ValueError, match="`callback_on_step_end` returned"):
        tiny_pipeline(num_layers=1)(
            1, num_inference_steps=2, output_type="latent", callback_on_step_end=lambda *args: returned
        )


def test_labels_that_a_callback_gives_unasked_count():
    def generate(label, callback, wanted=["latents"]):
        options = {"num_inference_steps": 2, "output_type": "latent", "generator": torch.manual_seed(0)}
        options["callback_on_step_end_tensor_inputs"] = wanted
        return tiny_pipeline()(label, **options, callback_on_step_end=callback).images

    unasked = generate(1, lambda *args: {"class_labels": torch.tensor([5])})
    asked = generate(1, lambda *args: {"class_labels": torch.tensor([5])}, ["latents", "class_labels"])
    assert torch.equal(unasked, asked)
    assert not torch.allclose(unasked, generate(1, None))


class Cutoff(PipelineCallback):
    """Ends guidance at a step: with scale 1, as 0 would ignore the class."""

    tensor_inputs = ["class_labels"]

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        assert list(callback_kwargs) == ["class_labels"]
        if step_index == self.config.cutoff_step_index:
            pipeline._guidance_scale = 1.0
        return callback_kwargs


@pytest.mark.parametrize("wrap", [lambda callback: callback, lambda callback: MultiPipelineCallbacks([callback])])
def test_callback_objects_and_interrupt(wrap):
    pipe = tiny_pipeline()
    sizes = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    callback = wrap(Cutoff(cutoff_step_ratio=None, cutoff_step_index=1))
    pipe(3, num_inference_steps=5, callback_on_step_end=callback, output_type="latent")
    assert sizes == [2, 2, 1, 1, 1]

    def interrupt(pipeline, step, timestep, tensors):
        pipeline._interrupt = step == 1
        return tensors

    sizes.clear()
    pipe(3, num_inference_steps=5, callback_on_step_end=interrupt, output_type="latent")
    assert sizes == [2, 2] and pipe.interrupt
    pipe(3, num_inference_steps=1, output_type="latent")
    assert not pipe.interrupt


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("goldfish", [1]),
        ("Carassius auratus", [1]),
        ("goldfish, Carassius auratus", [1]),
        (" GOLDFISH ", [1]),
        (["tench", "goldfish", "Tinca tinca"], [0, 1, 0]),
        ("Cardigan", [3]),  # as written, before any case
        ("cardigan", [5]),
        ("Cardigan Welsh corgi", [3]),
        ("missile", [7]),  # the whole entry, before a synonym
        ("projectile", [6]),
        ([], []),
    ],
)
def test_label_ids(name, ids):
    assert tiny_pipeline().get_label_ids(name) == ids


def test_names_that_change_are_found():
    pipe = tiny_pipeline()
    assert pipe.get_label_ids("goldfish") == [1] and pipe._class_names() is pipe._class_names()
    pipe.id2label[1] = "koi"
    assert pipe.get_label_ids("koi") == [1] and "goldfish" not in pipe.labels


def test_labels_and_suggestions():
    pipe = tiny_pipeline()
    assert list(pipe.labels) == sorted(pipe.labels)
    assert pipe.labels["goldfish"] == pipe.labels["Carassius auratus"] == 1 and "crane" not in pipe.labels
    assert all(pipe.get_label_ids(name) == [label] for name, label in pipe.labels.items())
    with pytest.raises(ValueError, match=re.escape("'carasius auratus'. Did you mean 'Carassius auratus'")):
        pipe.get_label_ids(["tench", "carasius auratus"])
    with pytest.raises(ValueError, match="There is no class 'qqqq'. There are 'tench, .*, 'crane'"):
        pipe.get_label_ids("qqqq")
    many = tiny_pipeline(id2label=dict(enumerate("abcdefghijklmnopqrstuvwxyz")), num_classes=26)
    with pytest.raises(ValueError, match=re.escape("There is no class 'qqqq'. See `pipe.labels`.")):
        many.get_label_ids("qqqq")
    assert tiny_pipeline(id2label=None).labels == {}


def test_id2label_keys_are_numbers_in_order():
    pipe = tiny_pipeline(id2label={"10": "k", "9": "j", "0": "a, b"})
    assert list(pipe.id2label.items()) == [(0, "a, b"), (9, "j"), (10, "k")]
    assert pipe.config.id2label == pipe.id2label
    assert tiny_pipeline(id2label=None).config.id2label is None


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name):
    pipe = tiny_pipeline(name)
    scheduler_class, config = RECIPES[name]
    assert type(pipe.scheduler) is scheduler_class and config.items() <= pipe.scheduler.config.items()
    assert torch.isfinite(pipe([1, 2], num_inference_steps=4, output_type="latent").images).all()


def test_recipe_overrides_and_errors():
    assert make_scheduler("ddim").config.prediction_type == "epsilon"
    scheduler = make_scheduler("ddim", prediction_type="v_prediction", beta_end=0.012)
    assert (scheduler.config.prediction_type, scheduler.config.beta_end) == ("v_prediction", 0.012)
    assert (scheduler.config.beta_start, scheduler.config.timestep_spacing) == (1e-4, "leading")
    assert make_scheduler("ddim").config.beta_end == 0.02  # the recipe itself is as it was
    assert isinstance(make_scheduler("dpm++", solver_order=3), DPMSolverMultistepScheduler)
    with pytest.raises(ValueError, match="no scheduler recipe 'dpm'") as error:
        make_scheduler("dpm")
    assert all(name in str(error.value) for name in RECIPES)
    for option in ("shiftt", "self", "args"):
        with pytest.raises(TypeError, match=f"FlowMatchEulerDiscreteScheduler.*'{option}'"):
            make_scheduler("flow_euler", **{option: 3.0})


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("ddpm", "trained_betas", "x"),
        ("ddpm", "num_train_timesteps", 10**12),
        ("ddim", "beta_schedule", None),
        ("ddim", "steps_offset", None),
        ("dpm++", "solver_order", 0),
        ("dpm++", "timestep_spacing", "x"),
        ("dpm++_singlestep", "algorithm_type", {}),
        ("unipc", "disable_corrector", None),
        ("flow_euler", "shift", {}),
        ("flow_heun", "num_train_timesteps", "1000"),
        ("flow_unipc", "final_sigmas_type", None),
    ],
)
def test_overrides_that_a_recipe_cant_run_with_are_refused(name, option, value):
    with pytest.raises(ValueError, match=option) as error:
        make_scheduler(name, **{option: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["transformer", "scheduler", "vae"])
def test_components_of_another_kind_are_refused(part):
    pipe = tiny_pipeline(num_layers=1)
    for value in (1, "x", {}, make_scheduler("ddim") if part != "scheduler" else pipe.transformer):
        for put in (
            lambda value: setattr(pipe, part, value),
            lambda value: type(pipe).from_pipe(pipe, **{part: value}),
        ):
            with pytest.raises(ValueError, match=f"`{part}` is a {type(value).__name__}"):
                put(value)
    with pytest.raises(ValueError, match="trained_betas=.*one per training timestep"):
        tiny_pipeline(DDIMScheduler(trained_betas=[0.1]), num_layers=1)
    with pytest.raises(ValueError, match="`pipeline` is a int"):
        type(pipe).from_pipe(5)
    with pytest.raises(ValueError, match="`dtype` is 'x'"):
        type(pipe).from_pipe(pipe, dtype="x")


@pytest.mark.parametrize("name", RECIPES)
def test_every_sampler_can_be_told_what_was_trained(name):
    trained = (
        make_scheduler("flow_euler", shift=3.0) if name.startswith("flow_") else make_scheduler("ddpm", beta_end=0.01)
    )
    config = make_scheduler(name, **trained_options(name, trained.config)).config
    if name.startswith("flow_"):
        assert config.get("shift", config.get("flow_shift")) == 3.0
    else:
        assert config.beta_end == 0.01


def test_recipes_log_nothing(caplog):
    for name in RECIPES:
        make_scheduler(name).set_timesteps(10)
    assert caplog.records == []


def test_no_such_bundled_pipeline():
    with pytest.raises(ValueError, match="no bundled pipeline 'imagenet'; this installation has"):
        DiTClassCondPipeline.from_bundled("imagenet")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_finite_at_its_ends(name):
    """With the most steps that are taken, too, and eta; what divides by zero is refused above."""
    pipe = tiny_pipeline(name, num_layers=1)
    most = {"dpm++": 999, "unipc": 999}.get(name, 1000)
    for steps in (1, 2, 3, most):
        for eta in (0.0, 1.0) if name == "ddim" and steps < 10 else (0.0,):
            images = pipe(1, num_inference_steps=steps, eta=eta, guidance_scale=1.0, output_type="latent").images
            assert torch.isfinite(images).all(), (steps, eta)


def test_a_scheduler_that_clips_does_not_hide_an_overflow():
    """Pixels are clipped to [-1, 1], and infinity with them."""
    pipe = DiTClassCondPipeline(tiny_transformer(in_channels=3), make_scheduler("ddim", clip_sample=True))
    torch.nn.init.constant_(pipe.transformer.proj_out.bias, -3e38)
    with pytest.raises(ValueError, match="not finite"):
        pipe(1, num_inference_steps=2, guidance_scale=1000, output_type="np")


TENSOR = {"guidance_scale": torch.tensor(2.0)}  # can't be saved


@pytest.mark.parametrize(
    "call", [5, [1], {"steps": 1}, {"num_inference_steps": "50"}, {"guidance_scale": NAN}, TENSOR]
)
def test_recommended_calls_are_checked_at_construction(call):
    with pytest.raises(ValueError, match="recommended_call"):
        DiTClassCondPipeline(tiny_transformer(num_layers=1), make_scheduler("ddim"), recommended_call=call)


@pytest.mark.parametrize("names", [5, "ab", ["a"], {"x": "a"}, {-1: "a"}, {1.5: "a"}, {0: "a", "00": "b"}, {0: None}])
def test_names_that_are_none_are_refused(names):
    with pytest.raises(ValueError, match="id2label"):
        tiny_pipeline(id2label=names, num_layers=1)
