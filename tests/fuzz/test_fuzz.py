"""Damaged files: read right, or refused in a message for users; within seconds and a GiB of memory.

The suite tries a few examples of each, the same at every run; `make fuzz` tries FUZZ_EXAMPLES new ones.
"""

import contextlib
import json
import os
import resource
import shutil

import pytest
import torch
from conftest import FIXTURES, tiny_transformer, tiny_vae
from damage import damaged_bytes, damaged_json
from diffusers.utils import logging
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dit_hf import DiTClassCondPipeline, DiTTransformer2DModel, make_scheduler
from dit_hf.data.latents import CachedLatents, read_index, verify_latents
from dit_hf.evaluation.samples import sampling_recipe
from dit_hf.training.records import read_settings


settings.register_profile(
    "files",
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", 25)),
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    deadline=20_000,  # milliseconds: small input must not make large work
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
    database=None,
)
settings.load_profile("files")

logging.set_verbosity_error()
logging.disable_progress_bar()

# What a command shows as one line; anything else is an error of ours.
REFUSED = (ValueError, OSError)


@pytest.fixture(autouse=True)
def bounded_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


CHECKPOINT = (FIXTURES / "dit_p8_in3.pt").read_bytes()


@given(content=damaged_bytes(CHECKPOINT))
def test_a_damaged_checkpoint(place, content):
    file = place / "checkpoint.pt"
    file.write_bytes(content)
    try:
        model = DiTTransformer2DModel.from_single_file(file, num_attention_heads=4)
    except REFUSED:
        return
    whole = DiTTransformer2DModel.from_single_file(FIXTURES / "dit_p8_in3.pt", num_attention_heads=4).state_dict()
    for name, weight in model.state_dict().items():  # what the zip's checksums cover
        assert torch.equal(weight, whole[name]), name


WEIGHTS = torch.load(FIXTURES / "dit_p8_in3.pt", weights_only=True)
# Changes of a state dict: a key, and what becomes of it.
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(sorted(WEIGHTS)),
        st.none()
        | st.text(min_size=1, max_size=20).filter(lambda name: name != "__metadata__")
        | st.integers(-1, 10**12)
        | st.lists(st.integers(0, 8), max_size=5)
        | st.sampled_from((torch.int8, torch.bool, torch.int64, torch.float64, torch.bfloat16))
        | st.sampled_from((float("nan"), float("inf"))),
    ),
    min_size=1,
    max_size=3,
)


def changed(weights, key, change):
    """Weights of which one is removed, renamed, moved to another block, or has another shape, type or value."""
    weights = dict(weights)
    tensor = weights.pop(key, torch.zeros(1))
    match change:
        case str():
            weights[change] = tensor
        case int():
            first, _, *rest = *key.split("."), ""
            weights[".".join((first, str(change), *rest))] = tensor
        case list():
            weights[key] = torch.zeros(change)
        case torch.dtype():
            weights[key] = tensor.nan_to_num().clamp(-100, 100).to(change)
        case float():
            weights[key] = torch.full(tensor.shape, change)
    return weights


@given(changes=CHANGES)
def test_other_keys_and_shapes(place, changes):
    weights = WEIGHTS
    for key, change in changes:
        weights = changed(weights, key, change)
    file = place / "checkpoint.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file)
    with contextlib.suppress(*REFUSED):
        DiTTransformer2DModel.from_single_file(file, num_attention_heads=4)


@pytest.fixture(scope="module")
def pipeline(place):
    """A tiny pipeline's folder."""
    pipe = DiTClassCondPipeline(
        transformer=tiny_transformer(sample_size=4), vae=tiny_vae(), scheduler=make_scheduler("ddim")
    )
    pipe.save_pretrained(place / "pipeline")
    return place / "pipeline"


CONFIGS = ("model_index.json", "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json")


def check_pipeline(folder):
    """Loads a pipeline and takes one step: refused, or a finite image."""
    try:
        pipe = DiTClassCondPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        images = pipe([0], num_inference_steps=1, output_type="pt").images
    except REFUSED:
        return
    assert images.isfinite().all()


@given(data=st.data())
def test_a_damaged_configuration(pipeline, data):
    name = data.draw(st.sampled_from(CONFIGS))
    folder = pipeline.with_name("damaged")
    shutil.copytree(pipeline, folder, dirs_exist_ok=True)
    (folder / name).write_text(data.draw(damaged_json(json.loads((pipeline / name).read_text()))), encoding="utf-8")
    check_pipeline(folder)


@given(data=st.data())
def test_damaged_weights_of_a_pipeline(pipeline, data):
    folder = pipeline.with_name("damaged-weights")
    shutil.copytree(pipeline, folder, dirs_exist_ok=True)
    file = folder / data.draw(st.sampled_from(("transformer", "vae"))) / "diffusion_pytorch_model.safetensors"
    file.write_bytes(data.draw(damaged_bytes(file.read_bytes())))
    check_pipeline(folder)


LATENTS = FIXTURES / "emoji_latents"
SHARD = (LATENTS / "shard-00000.safetensors").read_bytes()


@given(content=damaged_bytes(SHARD))
def test_a_damaged_shard(place, content):
    folder = place / "latents"
    shutil.copytree(LATENTS, folder, dirs_exist_ok=True)
    (folder / "shard-00000.safetensors").write_bytes(content)
    try:
        verify_latents(folder)
    except REFUSED:
        return
    assert content == SHARD


INDEX = json.loads((LATENTS / "index.json").read_text(encoding="utf-8"))


@given(text=damaged_json(INDEX))
def test_a_damaged_index(place, text):
    folder = place / "index"
    shutil.copytree(LATENTS, folder, dirs_exist_ok=True)
    (folder / "index.json").write_text(text, encoding="utf-8")
    try:
        read_index(folder)
        latents = CachedLatents(folder)
        rows = latents.read(torch.arange(2), torch.zeros(2, dtype=torch.bool))
    except REFUSED:
        return
    assert all(tensor.isfinite().all() for tensor in rows.values())


RECIPE = {
    "seed": 0,
    "num_samples": 4,
    "guidance_scale": 1.5,
    "guidance_interval": [0.0, 1.0],
    "versions": {"torch": "2"},
}


@given(text=damaged_json(RECIPE) | st.text())
@pytest.mark.parametrize("read", [sampling_recipe, read_settings])
def test_a_damaged_record(place, read, text):
    (place / "recipe.json").write_text(text, encoding="utf-8", errors="replace")
    (place / "samples.npz").write_bytes(b"")
    try:
        value = read(place / ("samples.npz" if read is sampling_recipe else "recipe.json"))
    except REFUSED:
        return
    assert isinstance(value, dict)
