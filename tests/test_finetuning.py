"""Fine-tuning: given weights, other classes, frozen parts, a rate for each layer, low-rank adapters."""

import json

import pytest
import torch
from conftest import tiny_inputs, tiny_transformer, tiny_vae
from diffusers import EDMEulerScheduler
from safetensors.torch import load_file
from testing_utils.scripts import run_forked
from testing_utils.training_runs import read_log, run, train_command

from dit_hf import DiTClassCondPipeline, make_scheduler, mix_classes
from dit_hf.schedulers import RECIPES, trained_prediction
from dit_hf.training.finetuning import freeze, match_names, parameter_groups, remap_classes
from dit_hf.training.model import recommended_call, sampling_scheduler, training_scheduler
from dit_hf.training.objectives import VelocityObjective


def test_training_starts_from_given_weights(workspace, tmp_path):
    run(train_command(workspace, tmp_path / "first", max_train_steps=1))
    start = {"transformer_config": None, "vae": None, "pretrained_model_name_or_path": tmp_path / "first" / "pipeline"}
    start["resolution"] = None  # that of the weights
    command = train_command(workspace, tmp_path / "second", **start, learning_rate=0, max_train_steps=1)
    run([*command, "--balance_classes"])
    file = "pipeline/transformer/diffusion_pytorch_model.safetensors"
    given, kept = load_file(tmp_path / "first" / file), load_file(tmp_path / "second" / file)
    assert all(torch.equal(given[key], kept[key]) for key in given)


def test_other_classes_keep_the_rows_of_equal_names(workspace, tmp_path):
    names = {0: "night, dark", 1: "dusk", 2: "Light"}
    pipe = DiTClassCondPipeline(
        tiny_transformer(num_classes=3, learn_sigma=False), make_scheduler("flow_euler"), tiny_vae(), names
    )
    pipe.save_pretrained(tmp_path / "pretrained")
    start = {"transformer_config": None, "vae": None, "pretrained_model_name_or_path": tmp_path / "pretrained"}
    run(train_command(workspace, tmp_path / "run", **start, learning_rate=0, max_train_steps=1))
    old = pipe.transformer.class_embed.weight
    new = DiTClassCondPipeline.from_pretrained(tmp_path / "run" / "pipeline").transformer.class_embed.weight
    assert torch.equal(new, old[[0, 2, 3]])  # dark, light, null
    assert match_names(["dark", "noon"], names) == [0, None]
    assert match_names(["maillot"], {0: "maillot", 1: "maillot, tank suit"}) == [0]  # as the pipeline finds them
    with pytest.raises(ValueError, match="'crane' is the name of classes 0, 1"):
        match_names(["crane"], {0: "crane", 1: "crane"})
    assert match_names(["crane", "kite", "crane"], {0: "crane", 1: "crane", 2: "kite"}) == [0, 2, 1]
    remap_classes(pipe.transformer, [None, 1], 0.0)
    torch.testing.assert_close(pipe.transformer.class_embed.weight, torch.stack([old[:3].mean(0), old[1]]))
    assert (pipe.transformer.config.num_classes, pipe.transformer.config.class_dropout_prob) == (2, 0.0)
    command = train_command(workspace, tmp_path / "other", **start, objective="epsilon")
    result = run_forked(command)
    assert result.returncode == 2
    assert "predicts velocity, which --objective epsilon would spoil" in result.stderr


def test_the_scheduler_tells_what_is_predicted():
    def told(scheduler):
        return trained_prediction(json.loads(scheduler.to_json_string()))

    names = {name: told(make_scheduler(name)) for name in RECIPES}
    assert {name for name, prediction in names.items() if prediction == "velocity"} == {
        name for name in RECIPES if name.startswith("flow_")
    }
    assert names["ddpm"] == names["unipc"] == "epsilon"
    assert told(EDMEulerScheduler()) == "edm"
    assert told(make_scheduler("ddim", prediction_type="v_prediction")) == "v_prediction"


@pytest.mark.parametrize(
    ("learn_sigma", "scheduler", "objective"),
    [
        (True, make_scheduler("flow_rae", shift=3.0), "velocity"),
        (False, make_scheduler("ddim", beta_schedule="squaredcos_cap_v2"), "epsilon"),
    ],
)
def test_head_and_schedule_stay_as_they_are(workspace, tmp_path, learn_sigma, scheduler, objective):
    """SiT's checkpoints have a half that nothing uses; DiTs without a learned variance have none."""
    given = tiny_transformer(num_classes=3, learn_sigma=learn_sigma)
    pipe = DiTClassCondPipeline(given, scheduler, tiny_vae(), {0: "night", 1: "dark", 2: "light"})
    pipe.save_pretrained(tmp_path / "pretrained")
    start = {"transformer_config": None, "vae": None, "pretrained_model_name_or_path": tmp_path / "pretrained"}
    run(train_command(workspace, tmp_path / "run", **start, objective=objective, max_train_steps=2))
    trained = DiTClassCondPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert trained.transformer.config.learn_sigma == learn_sigma
    assert type(trained.scheduler) is type(scheduler)
    configs = [
        {key: value for key, value in each.config.items() if key[0] != "_"} for each in (trained.scheduler, scheduler)
    ]
    assert configs[0] == configs[1]
    rows = [
        model.proj_out.weight.unflatten(0, (4, -1)) for model in (given, trained.transformer)
    ]  # 2x2 values a patch
    assert not torch.equal(rows[0][:, :4], rows[1][:, :4])
    assert torch.equal(rows[0][:, 4:], rows[1][:, 4:])
    image = trained("dark", num_inference_steps=2, output_type="latent").images
    assert image.isfinite().all()
    if objective == "epsilon":  # it is trained on as well
        pipe.scheduler = make_scheduler("ddim")
        pipe.save_pretrained(tmp_path / "pretrained")
        run(train_command(workspace, tmp_path / "linear", **start, objective=objective, max_train_steps=1))
        assert read_log(tmp_path / "linear")[0]["loss"] != read_log(tmp_path / "run")[0]["loss"]


@pytest.mark.parametrize(
    ("recipe", "option"), [("flow_rae", "shift"), ("flow_heun", "shift"), ("flow_dpm++", "flow_shift")]
)
def test_a_shift_changes_nothing_else_of_a_scheduler(recipe, option, tmp_path):
    DiTClassCondPipeline(tiny_transformer(), make_scheduler(recipe, **{option: 3.0})).save_pretrained(tmp_path)
    trained = training_scheduler(VelocityObjective, False, tmp_path)
    for shift, expected in ((1.0, 3.0), (2.0, 2.0)):
        scheduler = sampling_scheduler(trained, tmp_path, shift)
        assert type(scheduler) is RECIPES[recipe][0] and scheduler.config[option] == expected


def test_samplers_of_few_steps_are_not_kept(tmp_path, caplog):
    """A model that is trained on the velocity takes many."""
    call = {"num_inference_steps": 25, "num_jumps": 1, "guidance_scale": 1.0}
    model = tiny_transformer(interval_embedding=True)
    DiTClassCondPipeline(model, make_scheduler("flow_map"), recommended_call=call).save_pretrained(tmp_path)
    trained = training_scheduler(VelocityObjective, False, tmp_path)
    assert type(sampling_scheduler(trained, tmp_path)) is RECIPES["flow_euler"][0]
    assert "FlowMapEulerDiscreteScheduler is for models of few steps" in caplog.text
    assert recommended_call(tmp_path, True) == {"num_inference_steps": 25, "guidance_scale": 1.0}
    assert recommended_call(tmp_path, True, num_jumps=1) == call
    config = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    config |= {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 10**9}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="num_train_timesteps"):
        sampling_scheduler(trained, tmp_path)


def test_adapters_are_trained_saved_and_loaded(workspace, tmp_path):
    names = {0: "night", 1: "light", 2: "dark"}  # more than the data's, in another order
    transformer = tiny_transformer(num_classes=3, learn_sigma=False)
    DiTClassCondPipeline(transformer, make_scheduler("flow_euler"), tiny_vae(), names).save_pretrained(
        tmp_path / "base"
    )
    start = {"transformer_config": None, "vae": None, "pretrained_model_name_or_path": tmp_path / "base"}
    flags = {"max_train_steps": 3, "lora_rank": 3, "lora_alpha": 9, "learning_rate": 0.01, "class_dropout_prob": 0}
    run(train_command(workspace, tmp_path / "run", **start, **flags))
    table = transformer.class_embed.weight.data  # the same classes under other ids learn the same
    table.copy_(table[[2, 0, 1, 3]])
    transformer.register_to_config(class_dropout_prob=0.9)  # by itself it would drop most labels in training
    names = {0: "dark", 1: "night", 2: "light"}
    DiTClassCondPipeline(transformer, make_scheduler("flow_euler"), tiny_vae(), names).save_pretrained(
        tmp_path / "other"
    )
    start["pretrained_model_name_or_path"] = tmp_path / "other"
    run(train_command(workspace, tmp_path / "again", **start, **flags, gradient_accumulation_steps=2))
    both = [[line["loss"] for line in read_log(tmp_path / name)] for name in ("again", "run")]
    assert both[0] == pytest.approx(both[1], rel=1e-4)

    pipe = DiTClassCondPipeline.from_pretrained(tmp_path / "base")
    inputs = tiny_inputs() | {"class_labels": torch.tensor([1, 2, 3])}

    def output():
        with torch.no_grad():
            return pipe.transformer(**inputs).sample

    before = output()
    pipe.load_lora_weights(tmp_path / "run", adapter_name="style")
    config = pipe.transformer.peft_config["style"]
    assert (config.r, config.lora_alpha) == (3, 9)
    assert "class_embed" in config.target_modules
    adapted = output()
    assert (adapted - before).abs().max() > 1e-4
    other = pipe.transformer(**(inputs | {"class_labels": torch.tensor([2, 2, 3])})).sample
    with mix_classes(pipe.transformer, 2, 1.0):
        torch.testing.assert_close(output(), other)  # with its adapter
    moved = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    assert next(value for key, value in moved.items() if "class_embed" in key and "_A" in key).shape[-1] == 4
    pipe.load_lora_weights(tmp_path / "run", adapter_name="again")
    pipe.set_adapters(["style", "again"], [0.25, 0.75])
    torch.testing.assert_close(output(), adapted, rtol=1e-4, atol=1e-4)
    pipe.delete_adapters("again")
    pipe.set_adapters("style")
    assert torch.equal(output(), adapted)
    pipe.unload_lora_weights()
    assert torch.equal(output(), before)
    pipe.load_lora_weights(tmp_path / "run")
    pipe.fuse_lora()
    torch.testing.assert_close(output(), adapted, rtol=1e-4, atol=1e-4)
    pipe.unfuse_lora()
    torch.testing.assert_close(output(), adapted, rtol=1e-4, atol=1e-4)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "fused")
    pipe = DiTClassCondPipeline.from_pretrained(tmp_path / "fused")
    torch.testing.assert_close(output(), adapted, rtol=1e-4, atol=1e-4)


def test_adapters_need_the_null_class_that_they_drop_to(workspace, tmp_path):
    transformer = tiny_transformer(num_classes=2, learn_sigma=False, class_dropout_prob=0.0)
    pipe = DiTClassCondPipeline(transformer, make_scheduler("flow_euler"), tiny_vae(), {0: "dark", 1: "light"})
    pipe.save_pretrained(tmp_path / "base")
    start = {"transformer_config": None, "vae": None, "pretrained_model_name_or_path": tmp_path / "base"}
    result = run_forked(train_command(workspace, tmp_path / "run", **start, lora_rank=2))
    assert result.returncode == 2
    assert "no null class, and adapters can't add one; pass --class_dropout_prob 0" in result.stderr


def test_frozen_parts_keep_their_weights(workspace, tmp_path):
    names = {0: "dark", 1: "light"}
    transformer = tiny_transformer(num_classes=2, learn_sigma=False)
    DiTClassCondPipeline(transformer, make_scheduler("flow_euler"), tiny_vae(), names).save_pretrained(
        tmp_path / "base"
    )
    start = {"transformer_config": None, "vae": None, "pretrained_model_name_or_path": tmp_path / "base"}
    command = train_command(workspace, tmp_path / "run", **start, max_train_steps=2, layer_decay=0.5)
    run([*command, "--freeze", "transformer_blocks.0", "time_embed"])
    trained = load_file(tmp_path / "run" / "pipeline/transformer/diffusion_pytorch_model.safetensors")
    for name, weight in transformer.state_dict().items():
        if name.startswith(("transformer_blocks.0.", "time_embed.")):
            assert torch.equal(trained[name], weight), name
    assert not torch.equal(trained["proj_out.weight"], transformer.proj_out.weight)


def test_bad_prefixes_are_named(transformer):
    with pytest.raises(ValueError, match="--freeze transformer_block matches no parameter.*transformer_blocks"):
        freeze(transformer, ["transformer_block"])
    with pytest.raises(ValueError, match="nothing to train"):
        freeze(transformer, [name for name, part in transformer.named_children() if list(part.parameters())])


def test_learning_rate_falls_with_the_distance_from_the_head(transformer):
    groups = parameter_groups(transformer, 1.0, layer_decay=0.5)
    assert [group["lr"] for group in groups] == [0.125, 0.25, 0.5, 1.0]  # embedders, two blocks, head
    counted = sum(parameter.numel() for group in groups for parameter in group["params"])
    assert counted == sum(parameter.numel() for parameter in transformer.parameters())
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    assert rates[id(transformer.class_embed.weight)] == 0.125
    assert rates[id(transformer.transformer_blocks[1].attn.to_q.weight)] == 0.5
    assert rates[id(transformer.proj_out.bias)] == 1.0
