"""Models of the mean velocity over an interval (MeanFlow, SoFlow), and their samplers of few steps."""

import shutil

import pytest
import torch
from conftest import DESIGNS, FIXTURES, load_golden, tiny_inputs, tiny_transformer
from diffusers.schedulers import scheduling_flow_match_lcm

from dit_hf import DiTClassCondPipeline, DiTTransformer2DModel, make_scheduler, optimize, restore
from dit_hf.checkpoints import meanflow
from dit_hf.checkpoints.parsing import parse_checkpoint
from dit_hf.training.finetuning import record_guidance
from dit_hf.training.model import pretrained_transformer


# Fixture -> its heads, whether it has a null class, the name of the second time, the recipe of its sampler.
GOLDEN = {
    "meanflow_p2": (4, None, "r", "flow_map"),
    "meanflow_p4": (2, None, "r", "flow_map"),
    "soflow_p2": (4, None, "s", "flow_lcm"),
    "soflow_p4_nonull": (2, False, "s", "flow_lcm"),
}
RECORDED = [
    *(("meanflow_p2", steps) for steps in (1, 2, 4, 10)),
    *(("meanflow_p4", steps) for steps in (1, 2)),
    *(("soflow_p2", steps) for steps in (1, 2, 4)),
    *(("soflow_p4_nonull", steps) for steps in (1, 2)),
]


def load(name, **options):
    heads, has_null_class, *_ = GOLDEN[name]
    file = FIXTURES / f"{name}.pt"
    return DiTTransformer2DModel.from_single_file(file, heads, has_null_class=has_null_class, **options)


def call_of(golden, **settings):
    """A call on the recorded labels, in which the models with 4 channels have 10 for the null class, and 3 5."""
    null_class = {4: 10, 3: 5}[golden["x"].shape[1]]
    labels = [None if label == null_class else label for label in golden["sample_y"].tolist()]
    return {"class_labels": labels, "latents": golden["sample_z"], "output_type": "latent"} | settings


def interval_model(**overrides):
    return tiny_transformer(**(DESIGNS["meanflow"] | overrides))


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("weights", ["ema", "model"])
def test_forward_equals_the_original(name, weights):
    golden = load_golden(f"{name}.io")
    end = golden[GOLDEN[name][2]]
    expected = golden["out" if weights == "ema" else "out_of_model"]
    with torch.no_grad():
        model = load(name, weights=weights)
        output = model(golden["x"], 1000 * golden["t"], golden["y"], r_timestep=1000 * end).sample
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_without_an_end_the_output_is_the_velocity():
    golden = load_golden("soflow_p2.io")
    with torch.no_grad():
        velocity = load("soflow_p2")(golden["x"], 1000 * golden["t"], golden["y"]).sample
    torch.testing.assert_close(velocity, golden["velocity"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "steps"), RECORDED)
def test_sampling_equals_the_original(name, steps, monkeypatch):
    golden = load_golden(f"{name}.io")
    noises = [*golden.get(f"sample_{steps}_noises", torch.empty(0)), torch.zeros(())]
    drawn = iter(noises)
    monkeypatch.setattr(scheduling_flow_match_lcm, "randn_tensor", lambda *args, **kwargs: next(drawn))
    pipe = DiTClassCondPipeline(load(name), make_scheduler(GOLDEN[name][3]))
    inputs, times = [], []

    def record(module, args, kwargs):
        inputs.append(kwargs["hidden_states"])
        times.append((kwargs["timestep"][0].item() / 1000, kwargs["r_timestep"][0].item() / 1000))

    pipe.transformer.register_forward_pre_hook(record, with_kwargs=True)
    sample = pipe(**call_of(golden, num_inference_steps=steps, guidance_scale=1)).images
    expected = zip(golden[f"sample_{steps}_t"], golden[f"sample_{steps}_{GOLDEN[name][2]}"], strict=True)
    assert times == [pytest.approx([float(time), float(end)], abs=1e-6) for time, end in expected]
    for given, recorded in zip(inputs, golden[f"sample_{steps}_inputs"], strict=True):
        assert (given - recorded).norm() / recorded.norm() < 1e-5
    assert (sample - golden[f"sample_{steps}"]).norm() / golden[f"sample_{steps}"].norm() < 1e-5


@pytest.mark.parametrize("steps", [1, 4])
def test_a_model_trained_without_guidance_is_guided_as_the_original(steps):
    golden = load_golden("meanflow_p2.io")
    pipe = DiTClassCondPipeline(load("meanflow_p2"), make_scheduler("flow_map"))
    sample = pipe(**call_of(golden, num_inference_steps=steps, guidance_scale=2.5)).images
    expected = golden[f"sample_{steps}_cfg2.5"]
    assert (sample - expected).norm() / expected.norm() < 1e-5


def test_guidance_that_is_in_the_weights_is_not_added_again():
    pipe = DiTClassCondPipeline(load("soflow_p2"), make_scheduler("flow_lcm"))
    assert pipe.resolve_call()["guidance_scale"] == 1
    with pytest.raises(ValueError, match="`guidance_scale` is 1.5, but this model was trained to predict the guided"):
        pipe(0, guidance_scale=1.5)


def test_a_model_without_null_class_samples():
    pipe = DiTClassCondPipeline(load("soflow_p4_nonull"), make_scheduler("flow_lcm"))
    assert pipe.transformer.config.num_classes == 5
    assert pipe([4], num_inference_steps=1).images[0].size == (8, 8)


def test_any_solver_of_flow_matching_integrates_the_velocity():
    """Two solvers converge to one another, which mean velocities over their steps would not."""
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    call = {"class_labels": [1, 2], "latents": latents, "guidance_scale": 1, "output_type": "latent"}
    pipe = DiTClassCondPipeline(interval_model(), make_scheduler("flow_heun"))
    expected = pipe(num_inference_steps=64, **call).images
    pipe.scheduler = make_scheduler("flow_euler")
    euler = pipe(num_inference_steps=256, **call).images
    assert (euler - expected).norm() / expected.norm() < 1e-2
    pipe.scheduler = make_scheduler("flow_map")
    assert (pipe(num_inference_steps=1, **call).images - expected).norm() / expected.norm() > 1e-2


def test_an_interval_needs_a_model_that_embeds_it(transformer):
    with pytest.raises(ValueError, match="`r_timestep` was given, and a model without `interval_embedding=True`"):
        transformer(**tiny_inputs(), r_timestep=0)
    with pytest.raises(ValueError, match=r"`r_timestep` has shape \(2,\)"):
        interval_model()(**tiny_inputs(), r_timestep=torch.zeros(2))


def test_without_the_option_the_state_dict_is_the_same(transformer):
    assert not any(name.startswith("interval") for name in transformer.state_dict())
    added = interval_model(learn_sigma=True).state_dict().keys() - transformer.state_dict().keys()
    assert added == {f"interval_embed.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}


def test_timesteps_that_the_scheduler_takes_for_one_another_are_refused():
    pipe = DiTClassCondPipeline(interval_model(), make_scheduler("flow_map"))
    with pytest.raises(ValueError, match="timesteps closer than 0.002"):
        pipe(0, timesteps=[500.0, 499.9995], output_type="latent")
    pipe = DiTClassCondPipeline(interval_model(), make_scheduler("flow_map", num_train_timesteps=1))
    with pytest.raises(ValueError, match="num_train_timesteps=1000"):
        pipe(0, num_inference_steps=1000, output_type="latent")


def test_derivatives_by_both_times_equal_differences():
    """What MeanFlow's loss needs."""
    model, inputs = interval_model().double(), tiny_inputs()
    latents, labels = inputs["hidden_states"].double(), inputs["class_labels"]
    start, end = torch.tensor([[700.0, 900.0, 400.0], [100.0, 900.0, 250.0]], dtype=torch.float64)

    def mean_velocity(start, end):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return model(latents, start, labels, r_timestep=end).sample

    one = torch.ones_like(start)
    with torch.no_grad():
        _, tangent = torch.func.jvp(mean_velocity, (start, end), (one, 0 * one))
        difference = (mean_velocity(start + 0.5, end) - mean_velocity(start - 0.5, end)) / 1.0
    assert (tangent - difference).norm() / tangent.norm() < 1e-3


def test_modulation_can_be_computed_before_the_forward_pass():
    model, inputs = interval_model(), tiny_inputs()
    times = {"timestep": inputs.pop("timestep"), "r_timestep": torch.tensor([0.0, 250.0, 400.0])}
    modulation = model.compute_modulation(class_labels=inputs["class_labels"], **times)
    with torch.no_grad():
        given = model(**inputs, timestep=times["timestep"], modulation=modulation).sample
        torch.testing.assert_close(given, model(**inputs, **times).sample, rtol=0, atol=1e-6)


@pytest.mark.parametrize("recipe", ["flow_map", "flow_lcm"])
def test_optimize_keeps_the_sampler_of_few_steps(recipe, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    pipe = DiTClassCondPipeline(interval_model(), make_scheduler(recipe), None, None, {"num_inference_steps": 3})
    call = {"class_labels": [1, 2], "guidance_scale": 1, "output_type": "latent"}
    expected = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    optimize(pipe, "balanced")
    assert pipe.resolve_call()["num_inference_steps"] == 3
    assert type(pipe.scheduler) is type(make_scheduler(recipe))
    optimize(pipe, "exact")
    images = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    assert (images - expected).norm() / expected.norm() < 1e-5
    restore(pipe)


def test_a_saved_folder_samples_by_itself(tmp_path):
    """Sampler, steps and guidance are the folder's, and the model's facts are in its config."""
    pipe = DiTClassCondPipeline(load("soflow_p2"), make_scheduler("flow_lcm"), None, None, {"num_inference_steps": 1})
    pipe.save_pretrained(tmp_path / "soflow")
    again = DiTClassCondPipeline.from_pretrained(tmp_path / "soflow")
    assert again.transformer.config.guidance_in_weights and again.transformer.config.interval_embedding
    golden = load_golden("soflow_p2.io")
    sample = again(**call_of(golden)).images
    torch.testing.assert_close(sample, golden["sample_1"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, {}),
        ({"cfg_omega": 1.0, "cfg_kappa": 0.0}, {"guidance_in_weights": False}),
        ({"cfg_omega": 0.2, "cfg_kappa": 0.8}, {"guidance_in_weights": False}),  # 1 − 0.8 is no float
        ({"cfg_omega": 0.2, "cfg_kappa": 0.92}, {"guidance_in_weights": True}),
        ({"cfg_omega": 3.0}, {"guidance_in_weights": True}),
    ],
)
def test_arguments_of_meanflow_tell_whether_guidance_is_in_the_weights(arguments, expected):
    assert meanflow.trained_guidance(arguments) == expected
    with pytest.raises(ValueError, match="cfg_kappa 'None'"):
        meanflow.trained_guidance({"cfg_omega": 1.0, "cfg_kappa": None})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("noising_type: Trig\nl_schedule: Exponent", "noising_type='Trig'; only 'Linear'"),
        ("coefficient_type: Trig\nl_schedule: Exponent", "coefficient_type='Trig'; only 'Euler'"),
    ],
)
def test_the_config_of_a_soflow_run_counts(text, message, tmp_path):
    (tmp_path / "ckpts").mkdir()
    file = tmp_path / "ckpts" / "1.pt"
    shutil.copyfile(FIXTURES / "soflow_p4_nonull.pt", file)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_checkpoint(file, 2)
    (tmp_path / "config.yaml").write_text("cfg_drop_rate: 0.0\ncfg_scale: 1.0\nl_schedule: Const")
    config = parse_checkpoint(file, 2).config
    assert config["num_classes"] == 5 and config["class_dropout_prob"] == 0 and not config["guidance_in_weights"]
    for other in ("name: !ENV ${USER}", "a: [1, 2", "cfg_drop_rate: 0.0"):  # of another program
        (tmp_path / "config.yaml").write_text(other)
        assert parse_checkpoint(file, 2).config["num_classes"] == 4


def test_training_without_guidance_takes_it_out_of_the_weights(tmp_path, caplog):
    DiTClassCondPipeline(load("soflow_p2"), make_scheduler("flow_lcm")).save_pretrained(tmp_path / "soflow")
    model = pretrained_transformer(tmp_path / "soflow", ["one", "two"], 0.1, in_channels=4)
    record_guidance(model, guidance_in_weights=True)
    assert model.config.guidance_in_weights and "gets lost" not in caplog.text
    record_guidance(model, guidance_in_weights=False)
    assert not model.config.guidance_in_weights and "sample the result with a guidance_scale above 1" in caplog.text
