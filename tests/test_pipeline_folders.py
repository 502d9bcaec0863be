"""Hostile folders of pipelines: one file of a good one altered. Each is refused by file and key, and runs no code."""

import json
import os
import pickle
import shutil
from contextlib import nullcontext

import pytest
import torch
from conftest import tiny_transformer, tiny_vae
from diffusers import AutoencoderKLFlux2, DiffusionPipeline
from safetensors.torch import load_file, save_file

from dit_hf import DiTClassCondPipeline, DiTTransformer2DModel, make_scheduler
from dit_hf.model_folders import check_autoencoder, check_scheduler, weight_files
from dit_hf.schedulers import RECIPES


INDEX, CONFIG, VAE = "model_index.json", "transformer/config.json", "vae/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
VAE_WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
NAN = float("nan")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "pipe"
    call = {"num_inference_steps": 2}
    DiTClassCondPipeline(
        tiny_transformer(), make_scheduler("ddim"), tiny_vae(), id2label={0: "a"}, recommended_call=call
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "pipe")


def edit(path, change):
    """Alters a file: bytes replace it, a dictionary is put into its JSON, a function changes its tensors."""
    if isinstance(change, bytes):
        path.write_bytes(change)
    elif isinstance(change, dict):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    elif change is None:
        path.unlink()
    else:
        weights = load_file(path)
        change(weights)
        save_file(weights, path)


def cast(key, dtype):
    return lambda weights: weights.update({key: weights[key].to(dtype)})


def cut(key):
    return lambda weights: weights.update({key: weights[key][:3].clone()})


def drop(key):
    return lambda weights: weights.pop(key)


# file -> changes, each with words of the message
REFUSED = {
    INDEX: [
        *((content, ["model_index.json"]) for content in (b"", b"[]", b"null", b'"x"', b"\xff\xfe\0", b"[" * 10**5)),
        (b"{}", ["transformer", "None"]),
        (None, ["model_index.json"]),
        *(({"transformer": value}, ["transformer"]) for value in (None, "x", [], [1, 2], {"a": 1}, [None, None])),
        *(({name: ["os", "system"]}, [name, "system"]) for name in ("transformer", "scheduler", "vae")),
        *(({"vae": value}, ["vae"]) for value in (None, "x", {}, [1, 2], ["diffusers"], ["a", "b", "c"])),
        ({"vae": ["../x", "AutoencoderKL"]}, ["vae", "../x"]),
        ({"vae": ["antigravity", "AutoencoderKL"]}, ["vae", "antigravity"]),
        *(
            ({"vae": ["diffusers", name]}, ["vae", name, "pass it as `vae=`"])
            for name in (
                "NoSuch",
                "logging",
                "__builtins__",
                "UNet2DModel",
                "DDIMScheduler",
                "StableDiffusionPipeline",
            )
        ),
        ({"scheduler": ["diffusers", "AutoencoderKL"]}, ["scheduler", "AutoencoderKL"]),
        *(({"scheduler": value}, ["scheduler"]) for value in (None, [None, None])),
        *(({name: 5}, [name, "5"]) for name in ("_use_default_values", "_ignore_files")),
        *(
            ({"id2label": value}, ["id2label"])
            for value in ([], ["a"], "abc", 5, {"x": "y"}, {"-1": "y"}, {"1.5": "y"})
        ),
        *(({"id2label": {"0": value}}, ["id2label", "class 0"]) for value in (5, None, ["a"])),
        ({"id2label": {"0": "a", "00": "b"}}, ["id2label", "two names for class 0"]),
        ({"id2label": {"9" * 5000: "y"}}, ["id2label"]),
        *(({"recommended_call": value}, ["recommended_call"]) for value in ([], [1], 5, "x", {"foo": 1})),
        ({"recommended_call": {"num_inference_steps": "50"}}, ["recommended_call", "num_inference_steps", "'50'"]),
        ({"recommended_call": {"guidance_interval": ["a", "b"]}}, ["recommended_call", "guidance_interval"]),
    ],
    CONFIG: [
        *((content, [CONFIG]) for content in (b"", b"[]", b"\xff\xfe\0")),
        (None, ["config.json"]),
        *(({"_class_name": name}, ["holds a"]) for name in ("AutoencoderKL", ["os", "system"])),
        *(
            ({name: value}, [CONFIG, name, repr(value)])
            for name in ("num_layers", "num_attention_heads", "attention_head_dim", "sample_size", "num_classes")
            for value in ("two", 0, -1, True, None, 2.0, [2], 10**9, 10**30)
        ),
        *(({"patch_size": value}, [CONFIG, "patch_size", repr(value)]) for value in (0, 3, [2, 2], 10**9)),
        *(({"mlp_ratio": value}, [CONFIG, "mlp_ratio"]) for value in (0, -4, NAN, float("inf"), "4", 1e9, True, 1e-9)),
        *(({"timestep_scale": value}, [CONFIG, "timestep_scale"]) for value in ("x", NAN, 0, -1, True)),
        *(({"class_dropout_prob": value}, [CONFIG, "class_dropout_prob"]) for value in (2, -0.1, NAN, "0.1", True)),
        *(({name: "yes"}, [CONFIG, name]) for name in ("learn_sigma", "qk_norm", "modulation_shift")),
        *(({name: [1]}, [CONFIG, name]) for name in ("conditioning", "position_embedding", "norm", "ff")),
        ({"num_attention_heads": 4096, "attention_head_dim": 4096}, [CONFIG, "parameters", "num_attention_heads"]),
        ({"quantization_config": 5}, [CONFIG, "quantization_config"]),
        *(
            ({"quantization_config": {"quant_method": value}}, [CONFIG, "quantized"])
            for value in ([], "x", None, "gguf")
        ),
        *(({name: 1}, [CONFIG, name, "is not an option"]) for name in ("self", "dtype")),
        *(({name: 10**400}, [CONFIG, name]) for name in ("mlp_ratio", "class_dropout_prob", "num_layers")),
        ({"num_layers": 900}, [CONFIG, "900", "tensors"]),
        ({"_use_default_values": 3}, [CONFIG, "_use_default_values"]),
        ({"num_layers": 3}, [WEIGHTS, "transformer_blocks.2", "missing"]),
        ({"num_layers": 1}, [WEIGHTS, "transformer_blocks.1"]),
        ({"num_attention_heads": 2}, [WEIGHTS, "shape"]),
    ],
    SCHEDULER: [
        *((content, [SCHEDULER]) for content in (b"", b"[]", None)),
        *(({"num_train_timesteps": value}, [SCHEDULER, "num_train_timesteps"]) for value in ("1", 0, -1, 10**9, True)),
        *(({"beta_start": value}, ["beta_start"]) for value in (NAN, -1.0)),
        ({"beta_start": "x"}, [SCHEDULER]),
        ({"beta_end": 5.0}, ["beta_end"]),
        ({"trained_betas": ["a"]}, [SCHEDULER]),
        *(({"trained_betas": value}, [SCHEDULER]) for value in (0, [0.1], [[0.1] * 1000])),
        ({"beta_schedule": "x"}, [SCHEDULER, "x"]),
        ({"timestep_spacing": "x"}, [SCHEDULER, "x"]),
        *(({"prediction_type": value}, ["prediction_type"]) for value in ([1], "nonsense")),
        ({"steps_offset": 10**9}, [SCHEDULER, "steps_offset"]),
    ],
    VAE: [
        *((content, [VAE]) for content in (b"", b"[]", None)),
        *(({"block_out_channels": value}, [VAE]) for value in ("x", [10**9] * 3, [], [8, NAN, 8])),
        *(({"layers_per_block": value}, [VAE]) for value in (10**9, "x")),
        *(({"latent_channels": value}, [VAE]) for value in (10**9, "4")),
        *(({"norm_num_groups": value}, [VAE]) for value in (0, True)),
        ({"down_block_types": ["os"]}, [VAE]),
        ({"down_block_types": ["DownEncoderBlock2D"] * 100}, [VAE, "down_block_types", "too large"]),
        ({"quantization_config": {"quant_method": "gguf"}}, [VAE, "quantized"]),
        ({"latents_mean": [10**400] * 4, "latents_std": [1] * 4}, [VAE, "latents_mean"]),
        *(({"scaling_factor": value}, ["scaling_factor"]) for value in (0, -1.0, NAN, "x", [1])),
        ({"latents_mean": [1], "latents_std": ["a"]}, ["latents_mean"]),
    ],
    WEIGHTS: [
        *((content, [WEIGHTS]) for content in (b"", b"x" * 1000, b"\xff" * 1000)),
        (None, ["no file", "diffusion_pytorch_model"]),
        *(
            (cast("proj_out.weight", getattr(torch, name)), [WEIGHTS, "type"])
            for name in ("int32", "bool", "complex64")
        ),
        (cut("proj_out.weight"), [WEIGHTS, "proj_out.weight", "(3, 48)", "(32, 48)"]),
        (drop("proj_out.weight"), [WEIGHTS, "proj_out.weight", "missing"]),
        (lambda weights: weights.update(stray=torch.zeros(3)), [WEIGHTS, "stray"]),
    ],
    VAE_WEIGHTS: [
        *((content, ["vae"]) for content in (b"", b"x" * 1000, None)),
        (cast("decoder.conv_in.weight", torch.int32), [VAE_WEIGHTS, "decoder.conv_in.weight", "I32"]),
        (cut("decoder.conv_in.weight"), [VAE_WEIGHTS, "decoder.conv_in.weight", "shape"]),
        (drop("decoder.conv_in.weight"), [VAE_WEIGHTS, "decoder.conv_in.weight", "missing"]),
    ],
}


@pytest.mark.parametrize("file", REFUSED)
def test_an_altered_file_is_refused_by_name(file, good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "pipe")
    for change, words in REFUSED[file]:
        shutil.copyfile(good / file, folder / file)
        edit(folder / file, change)
        with pytest.raises((ValueError, OSError)) as error:
            if file.startswith("transformer/"):
                DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer")
            else:
                DiTClassCondPipeline.from_pretrained(folder)
        for word in (str(folder), *words):
            assert word in str(error.value), (change, str(error.value))


def test_what_looks_odd_and_loads(folder):
    edit(
        folder / INDEX, {"id2label": {str(index): f"a\n{index}" for index in range(20_000)}, "more": ["os", "system"]}
    )
    pipe = DiTClassCondPipeline.from_pretrained(folder)
    assert pipe.id2label[19_999] == "a\n19999" and not hasattr(pipe, "more")
    edit(folder / VAE, {"scaling_factor": None})
    assert DiTClassCondPipeline.from_pretrained(folder).vae is not None


def test_components_that_are_given_are_not_checked_in_the_folder(folder):
    shutil.rmtree(folder / "vae")
    assert DiTClassCondPipeline.from_pretrained(folder, vae=None).vae is None


def test_weights_that_are_not_finite_end_in_an_error(folder):
    edit(folder / WEIGHTS, lambda weights: weights["proj_out.weight"].fill_(NAN))
    with pytest.raises(ValueError, match="latents .* are not finite.*weights"):
        DiTClassCondPipeline.from_pretrained(folder)(0)


class Touch:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_weights_run_no_code(folder, tmp_path):
    for name, file in (("transformer", WEIGHTS), ("vae", VAE_WEIGHTS)):
        content = (folder / file).read_bytes()
        (folder / file).unlink()
        other = folder / name / "diffusion_pytorch_model.bin"
        other.write_bytes(pickle.dumps({"a": Touch(tmp_path / "ran")}))
        with pytest.raises(ValueError, match="diffusion_pytorch_model.bin .*not run"):
            DiTClassCondPipeline.from_pretrained(folder)
        torch.save(load_file_from(content, tmp_path), other)  # weights alone are read
        assert DiTClassCondPipeline.from_pretrained(folder)(0).images
        torch.save({}, other)
        with pytest.raises(ValueError, match=r"diffusion_pytorch_model.bin: .* is missing"):
            DiTClassCondPipeline.from_pretrained(folder)
        other.unlink()
        (folder / file).write_bytes(content)
    assert not (tmp_path / "ran").exists()


def load_file_from(content, folder):
    (folder / "copy.safetensors").write_bytes(content)
    return load_file(folder / "copy.safetensors")


def test_an_index_of_weights_stays_in_its_folder(folder):
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    for weight_map in ({"proj_out.weight": "../../other.safetensors"}, {"proj_out.weight": 5}, [1], None):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=r"index\.json"):
            DiTClassCondPipeline.from_pretrained(folder)


def split(folder):
    """The weights of a component in two files, with the index of these."""
    file = folder / "diffusion_pytorch_model.safetensors"
    weights, names = load_file(file), [f"{file.stem}-{part}.safetensors" for part in "ab"]
    file.unlink()
    weight_map = {key: names[number % 2] for number, key in enumerate(sorted(weights))}
    for name in names:
        save_file({key: weights[key] for key in weights if weight_map[key] == name}, folder / name)
    return folder / f"{file.name}.index.json", {"metadata": {}, "weight_map": weight_map}


@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_an_index_names_every_weight(component, folder):
    """What it does not name would not be loaded, and stay without values."""
    file, index = split(folder / component)
    file.write_text(json.dumps(index))
    DiTClassCondPipeline.from_pretrained(folder)
    half = dict(list(index["weight_map"].items())[::2])
    one = dict.fromkeys(index["weight_map"], next(iter(half.values())))
    for change in ({"weight_map": half}, {"weight_map": one}, {"metadata": None}, {"metadata": []}):
        file.write_text(json.dumps(index | change))
        with pytest.raises(ValueError, match=component):
            DiTClassCondPipeline.from_pretrained(folder)


OPTIONS = {
    "variant": (3, [], "../x", "a/b", "", "a\nb"),
    "subfolder": (3, {}),
    "revision": (3,),
    "dtype": (torch.float8_e4m3fn, "float8_e5m2", 3),
    "scheduler": (1, "ddim", {}),
    "vae": (1, "x"),
    "transformer": (1, "x"),
    "id2label": ([], 5),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in OPTIONS.items() for value in values])
def test_odd_options_are_named(name, value, good):
    with pytest.raises(ValueError, match=name) as error:
        DiTClassCondPipeline.from_pretrained(good, **{name: value})
    assert "\n" not in str(error.value)
    if name in ("variant", "subfolder", "revision", "dtype"):
        with pytest.raises(ValueError, match=f"`{name}` is"):
            DiTTransformer2DModel.from_pretrained(good / "transformer", **{name: value})


@pytest.mark.parametrize("options", [{"variant": 3}, {"variant": "../x"}, {"max_shard_size": []}])
def test_odd_options_of_saving_are_named(options, tmp_path):
    pipe = DiTClassCondPipeline(tiny_transformer(num_layers=1), make_scheduler("ddim"))
    for model in (pipe, pipe.transformer):
        with pytest.raises(ValueError, match=next(iter(options))):
            model.save_pretrained(tmp_path / "saved", **options)


@pytest.mark.parametrize("path", [None, 3, [], b"x", "", "\ud800", "a\0b"])
def test_what_is_no_path_is_named(path):
    model = tiny_transformer(num_layers=1)
    for load in (DiTClassCondPipeline.from_pretrained, DiTTransformer2DModel.from_pretrained, model.save_pretrained):
        with pytest.raises(ValueError, match="it must be the name or path"):
            load(path)


def test_no_code_of_a_folder_runs(folder, tmp_path, monkeypatch):
    """Every file of Python in it would create a folder when it is imported, also where Python looks for modules."""
    ran = tmp_path / "ran"
    code = f"import os\nos.mkdir({str(ran)!r})\n"
    names = (
        "pipeline",
        "pipeline_dit_class_cond",
        "transformer_dit",
        "evil",
        "__init__",
        "model",
        "setup",
        "conftest",
    )
    for place in (folder, folder / "transformer", folder / "vae", folder / "scheduler"):
        for name in names:
            (place / f"{name}.py").write_text(code)
    auto_map = {"AutoModel": "evil.Evil", "DiTTransformer2DModel": "evil.Evil"}
    edit(folder / INDEX, {"auto_map": auto_map, "custom_pipeline": "evil", "_class_name": ["evil", "Evil"]})
    for config in (CONFIG, VAE, SCHEDULER):
        edit(folder / config, {"auto_map": auto_map, "custom_pipeline": "evil"})
    monkeypatch.syspath_prepend(folder)
    evil = {"vae": ["evil", "Evil"]}
    other = {"transformer": ["evil", "DiTTransformer2DModel"], "vae": [None, None]}
    for change, loads in (({}, True), (evil, False), (other, True)):
        edit(folder / INDEX, change)
        DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer")
        with pytest.raises(ValueError, match="trust_remote_code|evil"):
            DiffusionPipeline.from_pretrained(folder)
        with nullcontext() if loads else pytest.raises(ValueError, match="evil"):
            DiTClassCondPipeline.from_pretrained(folder)
    assert not ran.exists()


@pytest.mark.parametrize("config", [5, [1], None, "x", {"num_layers": 10**9}])
def test_a_configuration_of_another_kind(config):
    with pytest.raises((ValueError, OSError)):
        DiTTransformer2DModel.from_config(config)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_loaded_as_it_was_saved(name, good, tmp_path):
    make_scheduler(name).save_pretrained(tmp_path)
    scheduler = type(make_scheduler(name))
    state = torch.get_rng_state()
    check_scheduler(tmp_path / "scheduler_config.json", scheduler)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_autoencoder_with_integer_buffers(tmp_path):
    sizes = {"latent_channels": 1, "norm_num_groups": 4, "block_out_channels": (8,) * 4, "layers_per_block": 1}
    vae = AutoencoderKLFlux2(**sizes)
    assert not vae.state_dict()["bn.num_batches_tracked"].is_floating_point()
    vae.save_pretrained(tmp_path)
    check_autoencoder(tmp_path / "config.json", AutoencoderKLFlux2)


def test_a_component_of_another_library_is_given(folder):
    own = {"scheduler": ["elsewhere", "OwnScheduler"], "vae": ["elsewhere", "OwnVAE"]}
    edit(folder / INDEX, own | {"transformer": ["elsewhere", "OwnDiT"]})
    parts = {"transformer": tiny_transformer(), "scheduler": make_scheduler("ddim"), "vae": tiny_vae()}
    for name in parts:
        with pytest.raises(ValueError, match=f"pass it as `{name}=`"):
            DiTClassCondPipeline.from_pretrained(folder, **{key: parts[key] for key in parts.keys() - {name}})
    pipe = DiTClassCondPipeline.from_pretrained(folder, **parts)
    assert pipe.scheduler is parts["scheduler"]
    with pytest.raises(ValueError, match="elsewhere is not one of the libraries"):  # diffusers' own
        DiTClassCondPipeline.from_pretrained(folder, transformer=parts["transformer"], trust_remote_code=True)


def test_a_subclass_is_loaded_by_itself(tmp_path):
    class MyDiT(DiTTransformer2DModel):
        pass

    MyDiT.from_config(tiny_transformer().config).save_pretrained(tmp_path)
    assert isinstance(MyDiT.from_pretrained(tmp_path), MyDiT)
    with pytest.raises(ValueError, match="holds a MyDiT, not a DiTTransformer2DModel"):
        DiTTransformer2DModel.from_pretrained(tmp_path)


def test_weights_in_a_file_that_is_not_read_do_not_count(folder):
    stray = "diffusion_pytorch_model-00001-of-00002.safetensors"
    shutil.copyfile(folder / WEIGHTS, folder / "transformer" / stray)
    edit(folder / WEIGHTS, drop("proj_out.weight"))
    with pytest.raises(ValueError, match=r"proj_out\.weight' is missing"):
        DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(load_file(folder / WEIGHTS), stray)}))
    assert list(weight_files(folder / "transformer")) == [folder / "transformer" / stray]


def test_no_quantization_is_written_as_null(folder):
    for config in (CONFIG, VAE):
        edit(folder / config, {"quantization_config": None})
    assert DiTClassCondPipeline.from_pretrained(folder).vae is not None
