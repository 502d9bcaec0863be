"""Shared fixtures: golden data, tiny models, a workspace to train in."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from diffusers import AutoencoderKL
from PIL import Image as PILImage
from safetensors.torch import load_file

from dit_hf import DDTTransformer2DModel, DiTTransformer2DModel, JiTTransformer2DModel
from dit_hf.pipeline_dit_class_cond import ScaleGuidance
from dit_hf.presets import RAE_DIT_DH
from dit_hf.transformer_dit import CONDITIONINGS


FIXTURES = Path(__file__).parent / "fixtures"
ROOT = Path(__file__).parents[1]


def load_golden(name):
    """A recorded output of the original code."""
    return load_file(FIXTURES / f"{name}.safetensors")


def tiny_transformer(seed=0, model_class=DiTTransformer2DModel, **overrides):
    """Two blocks of width 48 with random, not zero, head and gates, so that every weight matters."""
    config = {
        "sample_size": 8,
        "num_layers": 2,
        "num_attention_heads": 4,
        "attention_head_dim": 12,
        "num_classes": 10,
    }
    torch.manual_seed(seed)
    model = model_class(**(config | overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


# The paper's four designs, and LightningDiT's and MeanFlow's additions to the first.
LIGHTNING = {"norm": "rms_norm", "qk_norm": True, "ff": "swiglu", "modulation_shift": False}
DESIGNS = {name: {"conditioning": name} for name in CONDITIONINGS} | {
    "lightningdit": LIGHTNING | {"position_embedding": "sincos+rope"},
    "meanflow": {"interval_embedding": True, "learn_sigma": False, "timestep_scale": 0.001},
}
# DDT, and RAE's DiT-DH with and without a second width.
DDT = {"model_class": DDTTransformer2DModel, "num_layers": 4, "num_encoder_layers": 2}
DECODER = {"decoder_num_attention_heads": 2, "decoder_attention_head_dim": 32}
GELU = {"norm": "layer_norm", "head_norm": "layer_norm", "qk_norm": True, "ff": "gelu"}
TWO_STREAMS = {"ddt": DDT, "dit_dh": DDT | RAE_DIT_DH | DECODER, "dit_dh_gelu": DDT | RAE_DIT_DH | GELU}
# Other architectures.
ARCHITECTURES = TWO_STREAMS | {
    "jit": {
        "model_class": JiTTransformer2DModel,
        "patch_size": 2,
        "in_channels": 4,
        "bottleneck_dim": 16,
        "in_context_len": 4,
        "in_context_start": 1,
        "t_eps": 0.5,  # a division by small sigmas would enlarge rounding errors
    },
}


def predict(pipe, latents, timestep, labels, scale=1.0, channels=None):
    """One evaluation of a pipeline's model, guided by a scale."""
    guidance = ScaleGuidance()
    guidance.guidance_scale = scale
    guidance.set_state(0, 1, timestep)
    with torch.no_grad():
        return pipe._predict(guidance, latents, labels, {"timestep": torch.as_tensor(timestep)}, channels)


def tiny_design(name, **overrides):
    """A tiny model of one of the designs or architectures."""
    return tiny_transformer(**((DESIGNS | ARCHITECTURES)[name] | overrides))


def tiny_inputs(batch_size=3, channels=4, height=8, width=8, seed=0):
    """Keyword arguments of a forward pass; the last label is the null class."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch_size, channels, height, width, generator=generator),
        "timestep": torch.tensor([0.0, 999.0, 412.5, 77.0])[:batch_size],
        "class_labels": torch.tensor([3, 0, 10, 7])[:batch_size],
    }


def inputs_of(model, **sizes):
    """[`tiny_inputs`] with everything that the model takes."""
    return tiny_inputs(**sizes) | (
        {"r_timestep": torch.tensor(20.0)} if model.config.get("interval_embedding") else {}
    )


@pytest.fixture
def transformer():
    return tiny_transformer()


def tiny_vae():
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        mid_block_add_attention=False,
    ).eval()


@pytest.fixture(scope="module")
def hangup():
    """SIGHUP has its default action here and in new processes, under nohup too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """A folder with a Parquet dataset of two classes, a VAE and a model configuration."""
    folder = tmp_path_factory.mktemp("training")
    generator = np.random.default_rng(0)
    features = Features({"image": Image(), "label": ClassLabel(names=["dark", "light"])})
    (folder / "data").mkdir()
    for split, count in (("train", 20), ("test", 8)):
        rows = []
        for index in range(count):
            low = 128 * (index % 2)
            pixels = generator.integers(low, low + 128, (32, 32, 3), dtype=np.uint8)
            rows.append({"image": PILImage.fromarray(pixels), "label": index % 2})
        Dataset.from_list(rows, features=features).to_parquet(folder / "data" / f"{split}.parquet")
    tiny_vae().save_pretrained(folder / "vae")
    config = {"patch_size": 2, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def parallel_results(tmp_path_factory):
    """What two processes computed together, one dictionary a rank."""
    path = tmp_path_factory.mktemp("parallel")
    tiny_transformer().save_pretrained(path / "model")
    script = Path(__file__).parent / "testing_utils" / "parallel_forward.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, script, path / "model", path], env=environment, check=True, timeout=600)
    return [torch.load(path / f"rank{rank}.pt") for rank in range(2)]
