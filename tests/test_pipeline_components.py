"""Components that don't fit together, are set later or were changed in place; names, adapters, overflow."""

import json
import logging
import time

import numpy as np
import pytest
import torch
from conftest import tiny_transformer, tiny_vae
from diffusers import (
    AutoencoderKL,
    ConsistencyDecoderVAE,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchHeunDiscreteScheduler,
    IPNDMScheduler,
    KarrasVeScheduler,
    SD3Transformer2DModel,
    UniPCMultistepScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from peft import LoraConfig, get_peft_model

from dit_hf import DiTClassCondPipeline, DiTTransformer2DModel, make_scheduler
from dit_hf.optimization import quantize_blocks
from dit_hf.pipeline_dit_class_cond import input_dtype
from dit_hf.training.lora import add_lora, save_lora


def tiny_pipeline(scheduler="ddim", vae=None, id2label=None, recommended_call=None, **config):
    scheduler = make_scheduler(scheduler) if isinstance(scheduler, str) else scheduler
    pipe = DiTClassCondPipeline(tiny_transformer(**config), scheduler, vae, id2label, recommended_call)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, labels=1, **options):
    options = {"num_inference_steps": 2, "output_type": "latent"} | options
    return pipe(labels, generator=torch.Generator().manual_seed(0), **options).images


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
# The scheduler a pipeline is built with, the one it is given later, and what the message says.
OTHER_SCHEDULERS = {
    "flow sigmas alone": ("flow_euler", lambda: UniPCMultistepScheduler(use_flow_sigmas=True), "flow_prediction"),
    "flow prediction alone": (
        "flow_euler",
        lambda: DPMSolverMultistepScheduler(prediction_type="flow_prediction"),
        "use_flow_sigmas=True",
    ),
    "diffusion for flow": ("flow_euler", UniPCMultistepScheduler, "'epsilon', and this pipeline was built for 'vel"),
    "flow for diffusion": ("ddim", lambda: UniPCMultistepScheduler(**FLOW), "'velocity', and this pipeline was"),
    "other prediction": ("ddim", lambda: make_scheduler("ddim", prediction_type="v_prediction"), "'v_prediction'"),
    "other betas": ("ddim", lambda: make_scheduler("ddim", beta_schedule="scaled_linear"), "its betas"),
    "other length": ("ddim", lambda: make_scheduler("ddim", num_train_timesteps=500), "number of timesteps"),
    "other length of a flow": (
        "flow_euler",
        lambda: make_scheduler("flow_euler", num_train_timesteps=10),
        "timesteps",
    ),
    "no diffusion": ("ddim", IPNDMScheduler, "IPNDMScheduler does not sample the diffusion"),
    "another step": ("ddim", KarrasVeScheduler, "KarrasVeScheduler has no `step"),
    "clipped": ("ddim", lambda: DDIMScheduler(), "clip_sample=False"),
    "clipped DDPM": ("ddim", lambda: DDPMScheduler(), "clip_sample=False"),
    "thresholding": ("dpm++", lambda: make_scheduler("dpm++", thresholding=True), "thresholding=False"),
}


@pytest.mark.parametrize("case", OTHER_SCHEDULERS)
def test_a_scheduler_that_samples_something_else_is_refused(case):
    built_with, other, message = OTHER_SCHEDULERS[case]
    pipe = tiny_pipeline(built_with)
    pipe.scheduler = other()
    with pytest.raises(ValueError, match=message):
        sample(pipe)


def test_a_scheduler_given_while_loading_is_held_against_the_folders(tmp_path):
    tiny_pipeline("flow_euler").save_pretrained(tmp_path)
    pipe = DiTClassCondPipeline.from_pretrained(tmp_path, scheduler=make_scheduler("flow_unipc"))
    assert sample(pipe).isfinite().all()
    pipe = DiTClassCondPipeline.from_pretrained(tmp_path, scheduler=make_scheduler("ddim"))
    with pytest.raises(ValueError, match="this pipeline was built for 'velocity'"):
        sample(pipe)


def test_schedulers_of_the_same_kind_are_taken():
    pipe = tiny_pipeline("ddpm")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    sample(pipe)
    pipe.scheduler = make_scheduler("dpm++", algorithm_type="dpmsolver++")
    sample(pipe)
    pipe = tiny_pipeline("flow_euler")
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, **FLOW)
    sample(pipe)
    pixels = tiny_pipeline(DDIMScheduler(), in_channels=3)  # in [-1, 1], where clipping is right
    sample(pixels, output_type="np")


def test_a_half_flow_scheduler_is_refused_at_construction():
    with pytest.raises(ValueError, match="use_flow_sigmas=True and prediction_type='epsilon'"):
        tiny_pipeline(UniPCMultistepScheduler(use_flow_sigmas=True))


def test_heun_keeps_its_sigmas_when_a_call_fails(monkeypatch):
    pipe = tiny_pipeline(FlowMatchHeunDiscreteScheduler())
    before = pipe.scheduler.sigma_min
    with pytest.raises(TypeError):
        pipe._set_timesteps(4, None, None, device=object())
    assert pipe.scheduler.sigma_min == before


def test_the_vae_may_be_set_later():
    pipe = tiny_pipeline()
    with pytest.raises(ValueError, match="no VAE"):
        pipe(1)
    pipe.vae = tiny_vae()
    assert pipe.vae_scale_factor == 4
    assert pipe(1, height=64, width=32, num_inference_steps=1).images[0].size == (32, 64)


def test_a_vae_of_other_channels_is_refused():
    vae = AutoencoderKL(latent_channels=16, block_out_channels=(32,))
    with pytest.raises(ValueError, match="16 latent channels and the transformer 4"):
        tiny_pipeline(vae=vae)
    pipe = tiny_pipeline()
    pipe.vae = vae
    pipe.transformer.register_forward_pre_hook(lambda *args: pytest.fail("the transformer was called"))
    with pytest.raises(ValueError, match="16 latent channels and the transformer 4"):
        pipe(1)


def test_a_vae_that_overflows_is_decoded_in_float32(caplog):
    pipe = tiny_pipeline(vae=tiny_vae())
    with torch.no_grad():
        for name, layer in pipe.vae.decoder.named_modules():  # the same function with large values inside
            if name == "conv_in" or name.endswith("conv2"):
                layer.weight.mul_(4e4)
                layer.bias.mul_(4e4)
    expected = sample(pipe, output_type="np")
    pipe.vae.half()
    with caplog.at_level(logging.WARNING):
        images = sample(pipe, output_type="np")
    assert "overflows in torch.float16" in caplog.text and pipe.vae.dtype == torch.float16
    np.testing.assert_allclose(images, expected, atol=0.01)


class SamplingVAE(AutoencoderKL):
    """Its decoder adds noise of the generator, as a consistency decoder's."""

    def decode(self, z, return_dict=True, generator=None):
        self.noise = [*getattr(self, "noise", []), randn_tensor(z.shape, generator=generator)]
        return super().decode(z + self.noise[-1].to(z.dtype), return_dict=return_dict)


@pytest.mark.parametrize("per_image", [False, True])
def test_a_decoder_that_overflows_gets_the_same_noise_again(per_image):
    vae = SamplingVAE.from_config(tiny_vae().config)
    with torch.no_grad():
        for name, layer in vae.decoder.named_modules():
            if name == "conv_in" or name.endswith("conv2"):
                layer.weight.mul_(4e4)
                layer.bias.mul_(4e4)
    vae.half()
    pipe, generator = tiny_pipeline(vae=vae), torch.Generator().manual_seed(3)
    pipe.decode_latents(torch.randn(1, 4, 8, 8), "pt", [generator] if per_image else generator)
    first, second = vae.noise
    assert torch.equal(first, second)


def test_what_is_not_finite_is_not_returned():
    pipe = tiny_pipeline(vae=tiny_vae())
    with pytest.raises(ValueError, match=r"latents \[1\] are not finite"):
        sample(pipe, [1, 2], latents=torch.stack([torch.zeros(4, 8, 8), torch.full((4, 8, 8), float("nan"))]))
    with pytest.raises(ValueError, match="latents .* are not finite"):
        pipe.decode_latents(torch.full((1, 4, 8, 8), float("inf")))
    pixels = tiny_pipeline(in_channels=3)  # without a VAE
    with pytest.raises(ValueError, match="latents .* are not finite"):
        pixels.decode_latents(torch.full((1, 3, 8, 8), float("nan")))
    torch.nn.init.constant_(pipe.vae.decoder.conv_out.bias, float("inf"))
    with pytest.raises(ValueError, match=r"decoded images \[0\] are not finite"):
        sample(pipe, output_type="np")


def test_latents_are_decoded_as_the_call_decodes_them():
    vae = tiny_vae()
    vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0], shift_factor=0.5)
    pipe = tiny_pipeline(vae=vae)
    latents, images = sample(pipe, [1, 2]), sample(pipe, [1, 2], output_type="np")
    assert np.array_equal(pipe.decode_latents(latents, "np"), images)
    assert [image.size for image in pipe.decode_latents(latents)] == [(32, 32)] * 2
    with pytest.raises(ValueError, match="'latent'"):
        pipe.decode_latents(latents, "latent")


def test_values_of_a_wrong_kind_are_named():
    pipe = tiny_pipeline(vae=tiny_vae(), id2label={0: "a"})
    for call, message in (
        (lambda: pipe.get_label_ids(["a", None]), "`label` is"),
        (lambda: pipe.decode_latents(torch.zeros(1, 3, 8, 8)), r"`latents` is \(1, 3, 8, 8\)"),
        (lambda: pipe.decode_latents("x"), "`latents` is str"),
        (lambda: pipe(0, callback_on_step_end=3), "`callback_on_step_end` is 3"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_decoder_that_samples_gets_the_generator():
    blocks = ("DownEncoderBlock2D",) * 2
    vae = ConsistencyDecoderVAE(
        encoder_block_out_channels=(8, 8),
        encoder_down_block_types=blocks,
        encoder_layers_per_block=1,
        encoder_norm_num_groups=4,
        decoder_block_out_channels=(32, 64),
        decoder_down_block_types=("ResnetDownsampleBlock2D",) * 2,
        decoder_up_block_types=("ResnetUpsampleBlock2D",) * 2,
        decoder_layers_per_block=1,
    )
    pipe = tiny_pipeline("flow_euler", vae.eval(), learn_sigma=False)
    first, again = (sample(pipe, num_inference_steps=1, output_type="np") for _ in range(2))
    assert np.array_equal(first, again)


def test_from_pipe_shares_components():
    pipe = tiny_pipeline(vae=tiny_vae(), id2label={0: "cat"}, recommended_call={"guidance_scale": 2.0})
    again = DiTClassCondPipeline.from_pipe(pipe)
    assert again.transformer is pipe.transformer and again.vae is pipe.vae and again.id2label == {0: "cat"}
    assert again.resolve_call()["guidance_scale"] == 2.0
    assert torch.equal(sample(again), sample(pipe))
    assert DiTClassCondPipeline.from_pipe(pipe, vae=None).vae is None
    with pytest.raises(ValueError, match="built for 'epsilon'.*use_flow_sigmas=True"):
        sample(DiTClassCondPipeline.from_pipe(pipe, scheduler=make_scheduler("flow_euler")))
    assert DiTClassCondPipeline.from_pipe(tiny_pipeline(), dtype=torch.bfloat16).transformer.dtype == torch.bfloat16


def test_a_pipeline_carries_its_recommended_call(tmp_path):
    recommended = {"num_inference_steps": 3, "guidance_scale": 2.5, "guidance_interval": (0.0, 0.5)}
    pipe = tiny_pipeline(recommended_call=recommended)
    pipe.save_pretrained(tmp_path)
    again = DiTClassCondPipeline.from_pretrained(tmp_path)
    assert again.resolve_call() == recommended | {"guidance_channels": None}
    assert again.resolve_call(guidance_scale=1, num_inference_steps=None) == again.resolve_call() | {
        "guidance_scale": 1
    }
    again(1, output_type="latent")
    assert (again.num_timesteps, again.guidance_scale) == (3, 2.5)
    assert "`num_inference_steps=3`" in (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match="`recommended_call` has 'steps'"):
        tiny_pipeline(recommended_call={"steps": 4})
    again.register_to_config(recommended_call={"num_jump": 4})
    with pytest.raises(ValueError, match="`recommended_call` has 'num_jump'.*num_jumps"):
        again.resolve_call()
    again.register_to_config(recommended_call=recommended)
    with pytest.raises(ValueError, match="`num_jumps` is 0"):
        tiny_pipeline(recommended_call={"num_jumps": 0})
    for given, message in (
        ({"guidance": 3}, "'guidance' is not a setting"),
        ({"num_inference_steps": 0}, "is 0; it must"),
    ):
        with pytest.raises(ValueError, match=message):
            again.resolve_call(**given)


# ImageNet has the first four at 134, 638, 639 and 517.
NAMES = ["crane", "maillot", "maillot, tank suit", "crane", "flag, Japan", "Café"]


def test_labels_agree_with_what_the_call_finds():
    pipe = tiny_pipeline(id2label=dict(enumerate(NAMES)))
    assert pipe.labels == {"Café": 5, "Japan": 4, "flag": 4, "flag, Japan": 4, "maillot": 1} | {
        "maillot, tank suit": 2,
        "tank suit": 2,
    }
    assert all(pipe.get_label_ids(name) == [label] for name, label in pipe.labels.items())
    with pytest.raises(ValueError, match="'crane' is the name of classes 0, 3; pass the id"):
        pipe("crane")


def test_the_index_of_names_is_built_once_per_call():
    """Of 21,841 classes, as many as ImageNet-21k has: a hundred names cost about as much as one."""
    names = {key: f"class {key}, synonym {key}" for key in range(21_841)}
    pipe = tiny_pipeline(id2label=names, num_classes=len(names))
    seconds = []
    for wanted in (["class 21840"], ["class 21840", "SYNONYM 7"] * 50):
        started = time.perf_counter()
        assert pipe.get_label_ids(wanted)[0] == 21840
        seconds.append(time.perf_counter() - started)
    assert seconds[1] < 10 * seconds[0]
    assert len(pipe.labels) == 3 * 21_841


def test_names_must_be_strings():
    with pytest.raises(ValueError, match="`id2label` has 7 for class 1; names must be strings"):
        tiny_pipeline(id2label={0: "a", 1: 7})
    with pytest.raises(ValueError, match="`id2label` has a key that is not a class id"):
        tiny_pipeline(id2label={"x": "a"})
    assert tiny_pipeline(id2label={0: "a, "}).labels == {"a": 0, "a,": 0}


@pytest.mark.parametrize(
    "options",
    [
        {"height": np.int64(8)},
        {"num_inference_steps": np.arange(4, 9)[0]},
        {"guidance_scale": np.float32(3)},
        {"num_images_per_label": np.int32(2)},
        {"guidance_channels": np.int64(3)},
    ],
)
def test_numbers_of_numpy_are_numbers(options):
    assert sample(tiny_pipeline(), np.int64(3), **options).isfinite().all()


def adapted_pipeline(tmp_path):
    source = tiny_pipeline("flow_euler")
    add_lora(source.transformer, rank=2, alpha=2)
    for name, parameter in source.transformer.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_lora(source.transformer, tmp_path / "lora")
    pipe = tiny_pipeline("flow_euler")
    pipe.load_lora_weights(tmp_path / "lora", adapter_name="style")
    return pipe


def test_adapters_are_never_saved_with_the_weights(tmp_path):
    pipe = adapted_pipeline(tmp_path)
    adapted = sample(pipe)
    for change in (lambda: None, pipe.disable_lora, pipe.enable_lora, pipe.fuse_lora):
        change()
        for save in (pipe.save_pretrained, pipe.transformer.save_pretrained):
            with pytest.raises(ValueError, match="LoRA adapters: call `pipe.unload_lora_weights"):
                save(tmp_path / "saved")
            assert not (tmp_path / "saved").exists()
    pipe.unload_lora_weights()  # the fused weights stay
    pipe.save_pretrained(tmp_path / "saved")
    again = DiTClassCondPipeline.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(sample(again), adapted, atol=1e-4, rtol=1e-4)


def test_parts_changed_in_place_are_not_saved(tmp_path):
    pipe = tiny_pipeline(vae=tiny_vae())
    decoder = pipe.vae.decoder
    pipe.vae.decoder = torch.compile(decoder, backend="eager")
    with pytest.raises(ValueError, match="The vae was changed in place.*torch.compile"):
        pipe.save_pretrained(tmp_path / "saved")
    pipe.vae.decoder = decoder
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match="The transformer was changed in place.*unfuse_qkv_projections"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    pipe.transformer.unfuse_qkv_projections()
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(sample(DiTClassCondPipeline.from_pretrained(tmp_path / "saved")), sample(pipe))


def test_weights_quantized_in_place_are_not_saved(tmp_path):
    pipe = tiny_pipeline()
    quantize_blocks(pipe.transformer)
    for save in (pipe.save_pretrained, pipe.transformer.save_pretrained):
        with pytest.raises(ValueError, match="quantized in place"):
            save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_folder_of_another_model_is_named(tmp_path):
    other = SD3Transformer2DModel(sample_size=4, num_layers=1, attention_head_dim=8, num_attention_heads=1)
    other.save_pretrained(tmp_path / "transformer")
    tiny_pipeline().scheduler.save_pretrained(tmp_path / "scheduler")
    index = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="holds a SD3Transformer2DModel, not a DiTTransformer2DModel"):
        DiTTransformer2DModel.from_pretrained(tmp_path / "transformer")
    with pytest.raises(ValueError, match="its transformer is a SD3Transformer2DModel"):
        DiTClassCondPipeline.from_pretrained(tmp_path)


def test_adapters_that_fit_no_layer_are_refused(tmp_path):
    weights = {f"transformer_blocks.0.attn.to_q.lora_{part}.weight": torch.randn(4, 48) for part in "AB"}
    get_peft_model(tiny_transformer(), LoraConfig(r=4, target_modules=["to_q"])).save_pretrained(tmp_path)
    right = {f"transformer.{key}": value for key, value in weights.items()}
    sources = {
        "0 of the adapters' 4 keys.*'base_model.model": tmp_path,
        "0 of the adapters' 2 keys.*'transformer_blocks.0": weights,
        "0 of the adapters' 1 keys.*'lora_transformer_": {
            "lora_transformer_blocks_0.lora_down.weight": torch.zeros(1)
        },
        "2 of the adapters' 3 keys.*blocks.7": right | {"transformer.blocks.7.to_q.lora_A.weight": torch.zeros(4, 48)},
        "0 of the adapters' 0 keys": {},
    }
    for message, source in sources.items():
        pipe = tiny_pipeline()
        with pytest.raises(ValueError, match=message):
            pipe.load_lora_weights(source)
        assert not getattr(pipe.transformer, "peft_config", None)


def test_types_by_name_and_arguments_that_are_not_possible(tmp_path):
    tiny_pipeline(vae=tiny_vae()).save_pretrained(tmp_path)
    pipe = DiTClassCondPipeline.from_pretrained(tmp_path, dtype="bfloat16")
    assert pipe.transformer.dtype == pipe.vae.dtype == torch.bfloat16
    pipe = DiTClassCondPipeline.from_pretrained(tmp_path, dtype={"transformer": "bfloat16", "default": torch.float32})
    assert (pipe.transformer.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float32)
    model = DiTTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer", torch_dtype="float16")
    assert model.proj_out.weight.dtype == torch.float16
    with pytest.raises(ValueError, match="`dtype` is 'half4'"):
        DiTClassCondPipeline.from_pretrained(tmp_path, dtype="half4")
    for call in (
        DiTClassCondPipeline.from_bundled,
        lambda **options: DiTTransformer2DModel.from_pretrained(tmp_path / "transformer", **options),
    ):
        with pytest.raises(ValueError, match="`low_cpu_mem_usage=False` is not possible"):
            call(low_cpu_mem_usage=False)
    with pytest.raises(ValueError, match="`dtype` is torch.int8"):
        DiTClassCondPipeline.from_pretrained(tmp_path, dtype=torch.int8)


def test_the_bundled_name_is_a_pipeline_name(tmp_path, monkeypatch):
    assert DiTClassCondPipeline.from_pretrained("emoji64").transformer.dtype == torch.float32
    monkeypatch.chdir(tmp_path)
    tiny_pipeline().save_pretrained("emoji64")  # a folder of that name goes before
    assert DiTClassCondPipeline.from_pretrained("emoji64").transformer.config.num_layers == 2
    assert DiTClassCondPipeline.from_bundled("emoji64").transformer.config.num_layers > 2


def test_the_index_names_the_code_and_no_place(tmp_path):
    pipe = DiTClassCondPipeline.from_bundled()
    pipe.save_pretrained(tmp_path)
    files = [path for path in tmp_path.rglob("*.json") if "_name_or_path" in path.read_text()]
    assert files == []
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["transformer_dit", "DiTTransformer2DModel"]


@pytest.mark.parametrize(
    "step",
    [
        lambda self, noise_pred, t, latents: (latents - 0.1 * noise_pred,),
        lambda self, *args, **kwargs: DDIMScheduler.step(self, *args, **kwargs),
    ],
)
def test_a_scheduler_names_its_arguments_as_it_likes(step):
    pipe = tiny_pipeline("ddim")
    own = type("Own", (DDIMScheduler,), {"step": step})
    pipe.scheduler = own.from_config(pipe.scheduler.config)
    assert sample(pipe).isfinite().all()


@pytest.mark.parametrize("left", [1, 2])
def test_a_callback_may_drop_images(left):
    def drop(pipe, step, timestep, tensors):
        return {name: tensor[:left] for name, tensor in tensors.items()}

    options = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 2.0}
    names = ["latents", "class_labels"]
    images = tiny_pipeline()(
        [1, 2, 3], **options, callback_on_step_end=drop, callback_on_step_end_tensor_inputs=names
    ).images
    assert len(images) == left


def offload_models(pipe):
    """To another device than that of the weights, which this machine need not have."""
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.transformer._hf_hook.execution_device = torch.device("meta")


def offload_groups(pipe):
    pipe.vae.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    for module in pipe.vae.modules():
        if hasattr(module, "_diffusers_hook"):
            module._diffusers_hook.get_hook("group_offloading").config.onload_device = torch.device("meta")


PLACEMENTS = {
    "plain": lambda pipe: None,
    "bfloat16": lambda pipe: pipe.to(torch.bfloat16),
    "moved": lambda pipe: pipe.to("meta"),
    "in parts": lambda pipe: pipe.vae.to("meta"),
    "8-bit floats": lambda pipe: pipe.vae.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16),
    "model offload": offload_models,
    "sequential offload": lambda pipe: pipe.enable_sequential_cpu_offload(device="cpu"),
    "group offload": offload_groups,
    "kept in float32": lambda pipe: setattr(pipe.vae, "_keep_in_fp32_modules", ["encoder"]) or pipe.vae.half(),
}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_device_and_types_are_those_that_diffusers_finds(placement):
    pipe = tiny_pipeline(vae=tiny_vae())
    PLACEMENTS[placement](pipe)
    assert pipe._execution_device == DiffusionPipeline._execution_device.fget(pipe)
    for model in (pipe.transformer, pipe.vae):
        assert input_dtype(model) == model.dtype


def test_an_image_that_is_not_finite_is_named_and_frees_offloaded_models(monkeypatch):
    pipe, freed = tiny_pipeline(), []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(True))

    def spoil(pipe, step, timestep, tensors):
        tensors["latents"][1] = float("nan")

    with pytest.raises(ValueError, match=r"latents \[1\] are not finite"):
        pipe([1, 2, 3], num_inference_steps=2, output_type="latent", callback_on_step_end=spoil)
    assert freed == [True]


@pytest.mark.parametrize("key", ["1_0", " 2", "²", "1" * 10])
def test_keys_of_id2label_are_plain_numbers(key):
    with pytest.raises(ValueError, match="not a class id"):
        DiTClassCondPipeline(tiny_transformer(), make_scheduler("ddim"), id2label={key: "a"})
