"""Autoencoders of every class: what training asks of them."""

import pytest
import torch
from conftest import tiny_transformer, tiny_vae
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLWan, AutoencoderTiny, VQModel

from dit_hf import DiTClassCondPipeline, make_scheduler
from dit_hf.data.autoencoders import latent_channels, load_autoencoder, spatial_factor, vae_statistics
from dit_hf.data.images import load_image_dataset
from dit_hf.data.latents import CachedLatents, cache_latents, encode_images, index_latents
from dit_hf.data.reader import ImageReader


def tiny(name, **overrides):
    """An autoencoder of a class with few weights."""
    torch.manual_seed(0)
    if name == "AutoencoderKL":
        return tiny_vae()
    if name == "AutoencoderTiny":
        channels, blocks = (8, 8, 8), (1, 1, 1)
        return AutoencoderTiny(
            encoder_block_out_channels=channels,
            decoder_block_out_channels=channels,
            num_encoder_blocks=blocks,
            num_decoder_blocks=blocks,
            **overrides,
        ).eval()
    if name == "VQModel":
        return VQModel(block_out_channels=(8,), norm_num_groups=4, latent_channels=2, num_vq_embeddings=8).eval()
    sizes = {"block_out_channels": (8, 16), "layers_per_block": (1, 1)}
    sizes = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in sizes.items()}
    return AutoencoderDC(
        latent_channels=8,
        attention_head_dim=4,
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        **sizes,
    ).eval()


@pytest.mark.parametrize(
    ("name", "factor", "channels"),
    [("AutoencoderKL", 4, 4), ("AutoencoderTiny", 4, 4), ("AutoencoderDC", 2, 8), ("VQModel", 1, 2)],
)
def test_any_autoencoder_makes_a_cache(workspace, tmp_path, name, factor, channels):
    tiny(name).save_pretrained(tmp_path / "vae")
    vae = load_autoencoder(tmp_path / "vae")
    assert type(vae).__name__ == name
    assert not vae.training
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    assert (spatial_factor(vae), latent_channels(vae)) == (factor, channels)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    encoded = encode_images(vae, images)
    assert encoded["mean"].shape == encoded["std"].shape == (2, channels, 32 // factor, 32 // factor)
    assert bool(encoded["std"].any()) == (name == "AutoencoderKL")
    reader = ImageReader(load_image_dataset(str(workspace / "data")), ["dark", "light"], 32)
    count = cache_latents(vae, reader, tmp_path / "latents", "made here")
    index_latents(tmp_path / "latents", "made here", reader.names, count, {"vae": None, "encoder": None})
    latents = CachedLatents(tmp_path / "latents")
    assert latents.shape == encoded["mean"].shape[1:]
    assert all(0 < value < float("inf") for value in latents.statistics[1])
    mean, std = latents.statistics
    vae.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=1.0, shift_factor=None)
    vae.save_pretrained(tmp_path / "normalized")
    assert vae_statistics(load_autoencoder(tmp_path / "normalized")) == latents.statistics


def test_statistics_of_configs_that_lack_some():
    assert vae_statistics(tiny("AutoencoderDC")) == ([0.0], [1.0])
    assert vae_statistics(tiny("AutoencoderTiny", scaling_factor=0.5, shift_factor=0.1)) == ([0.1], [2.0])


def test_an_autoencoder_of_a_pipeline_is_found(tmp_path):
    DiTClassCondPipeline(tiny_transformer(), make_scheduler("ddim"), tiny("AutoencoderTiny")).save_pretrained(tmp_path)
    assert isinstance(load_autoencoder(tmp_path, subfolder="vae"), AutoencoderTiny)
    with pytest.raises(ValueError, match="DiTTransformer2DModel; pass an autoencoder"):
        load_autoencoder(tmp_path, subfolder="transformer")
    with pytest.raises(OSError, match="nowhere"):
        load_autoencoder(tmp_path / "nowhere")


def test_what_does_not_encode_rgb_images_is_refused(tmp_path):
    AutoencoderKL(in_channels=1, out_channels=1, norm_num_groups=4, block_out_channels=(8,)).save_pretrained(
        tmp_path / "grey"
    )
    with pytest.raises(ValueError, match="grey: AutoencoderKL encodes images of 1 channels; images are read as RGB"):
        load_autoencoder(tmp_path / "grey")
    AutoencoderKLWan(base_dim=4, z_dim=2, num_res_blocks=1).save_pretrained(tmp_path / "video")
    with pytest.raises(ValueError, match="AutoencoderKLWan encodes videos"):
        load_autoencoder(tmp_path / "video")
