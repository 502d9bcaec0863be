"""From a file of the original to a pipeline's folder, that any process loads, and back to the file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, LIGHTNING, ROOT, load_golden, tiny_transformer
from testing_utils.scripts import run_forked

from dit_hf import DDTTransformer2DModel, DiTClassCondPipeline, DiTTransformer2DModel, JiTTransformer2DModel
from dit_hf.checkpoints import FAMILIES
from dit_hf.checkpoints.loading import original_tables
from dit_hf.checkpoints.reading import find_entry, read_checkpoint
from dit_hf.checkpoints.saving import save_original


VAE = {"vae": FIXTURES / "repae_vae.pt", "norm_num_groups": 2}
# Folder -> its family, the fixture's name, and the flags of its conversion.
CONVERSIONS = {
    "meanflow": ("meanflow", "meanflow_p2", {"num_attention_heads": 4}),
    "soflow": ("soflow", "soflow_p2", {"num_attention_heads": 4}),
    "soflow_nonull": ("soflow", "soflow_p4_nonull", {"num_attention_heads": 2, "no_null_class": True}),
    "repae": ("repae", "repae", {"num_attention_heads": 4} | VAE),
    "repae_ldm": ("repae", "repae_ldm", {"num_attention_heads": 2}),
    "jit": ("jit", "jit_b16_train", {}),
    "jit_model": ("jit", "jit_b16_train", {"weights": "model"}),
    "jit_told": ("jit", "jit_p4", {"in_context_start": 1, "noise_scale": 2.0}),
    "ddt": ("ddt", "ddt_lightning", {"num_encoder_blocks": 2}),
    "ddt_model": ("ddt", "ddt_lightning", {"num_encoder_blocks": 2, "weights": "model"}),
    "ddt_ema": ("ddt", "ddt_ema_only", {"num_encoder_blocks": 1}),
    "rae": ("rae", "rae_dh", {}),
    "rae_told": ("rae", "rae_dh_qknorm", {"num_encoder_blocks": 1}),
    "rae_lightningdit": ("rae_lightningdit", "rae_lightningdit", {"null_class": True}),
    "lightningdit": (
        "lightningdit",
        None,  # the recorded ones have other latents than the recorded autoencoder
        {
            "num_attention_heads": 4,
            "vae": FIXTURES / "vavae.pt",
            "norm_num_groups": 3,
            "latents_stats": FIXTURES / "vavae-latents-stats.pt",
        },
    ),
}
FRESH = """
import json, sys, torch
from diffusers import DiffusionPipeline
images = {}
for folder in json.loads(sys.argv[1]):
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    call = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    images[folder] = pipe([1, 2], output_type="latent" if pipe.vae is None else "pt", **call).images
assert "dit_hf" not in sys.modules
torch.save(images, sys.argv[2])
"""


def run_script(name, flags):
    arguments = []
    for flag, value in flags.items():
        arguments += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
    return run_forked([sys.executable, ROOT / "conversion" / f"{name}.py", *arguments], ROOT)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    options = {"sample_size": 4, "patch_size": 1, "learn_sigma": False, "timestep_scale": 0.001}
    save_original(tiny_transformer(**LIGHTNING, **options), FAMILIES["lightningdit"], folder / "lightningdit.pt")
    recorded = {name: FIXTURES / f"{fixture}.pt" for name, (_, fixture, _) in CONVERSIONS.items() if fixture}
    return recorded | {"lightningdit": folder / "lightningdit.pt"}


@pytest.fixture(scope="module")
def folders(files, tmp_path_factory):
    parent = tmp_path_factory.mktemp("converted")
    for name, (*_, flags) in CONVERSIONS.items():
        file = files[name]
        result = run_script("convert_original_to_hf", {"checkpoint_path": file, "output_dir": parent / name} | flags)
        assert result.returncode == 0, result.stderr
    return {name: parent / name for name in CONVERSIONS}


def test_a_fresh_process_without_the_package_generates_the_same(folders, tmp_path):
    names = json.dumps([str(folder) for folder in folders.values()])
    subprocess.run([sys.executable, "-c", FRESH, names, tmp_path / "images.pt"], check=True)
    for folder, images in torch.load(tmp_path / "images.pt").items():
        pipe = DiTClassCondPipeline.from_pretrained(folder)
        call = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
        expected = pipe([1, 2], output_type="latent" if pipe.vae is None else "pt", **call).images
        assert torch.equal(images, expected), folder
        assert type(pipe.transformer).__name__ == FAMILIES[CONVERSIONS[Path(folder).name][0]].model


@pytest.mark.parametrize("name", CONVERSIONS)
def test_the_original_gets_its_file_back(name, files, folders, tmp_path):
    (family, _, given_flags), file = CONVERSIONS[name], tmp_path / "back.pt"
    flags = {"pretrained_model_name_or_path": folders[name], "family": family, "checkpoint_path": file}
    result = run_script("convert_hf_to_original", flags)
    assert result.returncode == 0, result.stderr
    back = torch.load(file, weights_only=True)
    wrapper = FAMILIES[family].wrapper
    back = back[wrapper] if wrapper else back
    given = wanted(read_checkpoint(files[name]), given_flags.get("weights", "auto"))
    assert back.keys() == given.keys()
    inexact = {key for key in given if not torch.equal(back[key], given[key])}
    assert {key for key in inexact if not key.endswith("t_embedder.mlp.0.weight")} <= set(FAMILIES[family].tables)
    baked = FAMILIES[family].data_at_one and FAMILIES[family].bakes
    assert baked or inexact <= set(FAMILIES[family].tables)


def wanted(content, weights):
    """What is converted of a file, with the keys that the original's code reads: those of the average."""
    if "state_dict" in content:  # Lightning's: both models, and what training needs
        read, other = ("denoiser.", "ema_denoiser.") if weights == "model" else ("ema_denoiser.", "denoiser.")
        return {
            key.replace(read, "ema_denoiser.", 1): value
            for key, value in content["state_dict"].items()
            if not key.startswith(other)
        }
    entry = find_entry(content, weights, "")
    return content if entry is None else content[entry]


@pytest.mark.parametrize(
    ("name", "sampler", "call"),
    [
        ("meanflow", "FlowMapEulerDiscreteScheduler", {"num_inference_steps": 1, "guidance_scale": 1.0}),
        ("soflow", "FlowMatchLCMScheduler", {"num_inference_steps": 1, "guidance_scale": 1.0}),
        ("soflow_nonull", "FlowMatchLCMScheduler", {"num_inference_steps": 1, "guidance_scale": 1.0}),
        ("repae", "FlowMatchEulerDiscreteScheduler", {"num_inference_steps": 250, "guidance_scale": 2.5}),
        ("lightningdit", "FlowMatchEulerDiscreteScheduler", {"num_inference_steps": 250}),
        ("jit", "FlowMatchHeunDiscreteScheduler", {"num_inference_steps": 50, "guidance_scale": 3.0}),
    ],
)
def test_a_folder_samples_as_published_by_itself(name, sampler, call, folders):
    pipe = DiTClassCondPipeline.from_pretrained(folders[name])
    assert type(pipe.scheduler).__name__ == sampler
    assert call.items() <= pipe.resolve_call().items()


def test_single_files_load_as_they_convert(folders):
    for name, model_class, flags in (
        ("jit_model", JiTTransformer2DModel, {"weights": "model"}),
        ("ddt", DDTTransformer2DModel, {"num_encoder_blocks": 2}),
        ("rae_lightningdit", DiTTransformer2DModel, {"family": "rae", "has_null_class": True}),
    ):
        file = FIXTURES / f"{CONVERSIONS[name][1]}.pt"
        given = model_class.from_single_file(file, **flags).state_dict()
        converted = DiTClassCondPipeline.from_pretrained(folders[name]).transformer.state_dict()
        assert all(torch.equal(given[key], converted[key]) for key in given | converted)
    with pytest.raises(
        ValueError, match=r"holds a JiTTransformer2DModel \(jit\), not a DiT.*`JiTTransformer2DModel\.from"
    ):
        DiTTransformer2DModel.from_single_file(FIXTURES / "jit_b16_train.pt")


def test_the_statistics_of_the_batch_norm_are_the_autoencoders(folders):
    golden = load_golden("repae.io")
    pipe = DiTClassCondPipeline.from_pretrained(folders["repae"])
    images = pipe.decode_latents(golden["ode_10_guided0_sample"], output_type="pt")
    expected = (golden["decoded"] / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


def test_published_sizes_have_the_originals_keys():
    """All names and shapes of SiT-XL/1, without its projector and batch norm."""
    layout = json.loads((FIXTURES / "repae_sit_xl_1.keys.json").read_text())
    family = FAMILIES["repae"]
    with torch.device("meta"):
        model = DiTTransformer2DModel(sample_size=16, patch_size=1, in_channels=32, **family.fixed_options)
    weights = family.to_original(model.state_dict(), model.config) | original_tables(family, model)
    expected = {key: shape for key, shape in layout["keys"].items() if not key.startswith(family.training_only)}
    assert {key: list(weight.shape) for key, weight in weights.items()} == expected
