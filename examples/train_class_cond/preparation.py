"""What `train_dit.py` and `precompute_latents.py` need before the first step; all bad input is found here."""

import inspect
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler

from dit_hf import DiTTransformer2DModel, make_scheduler
from dit_hf.data.autoencoders import vae_statistics
from dit_hf.data.fingerprints import cache_fingerprint, checksum
from dit_hf.data.images import label_names, load_image_dataset
from dit_hf.data.latents import DECODER, CachedLatents, EncodedImages, cache_latents, index_latents, read_index
from dit_hf.data.reader import ImageReader
from dit_hf.schedulers import trained_options, trained_prediction
from dit_hf.training.finetuning import class_names, freeze, load_for_classes, match_names
from dit_hf.training.lora import add_lora


DEFAULT_RESOLUTION = 64


@dataclass
class Data:
    """The model's classes and the data's ids among them, and the images, unless their latents are precomputed."""

    names: list[str]
    ids: torch.Tensor
    found: list[str]
    reader: ImageReader | None = None


def find_data(args):
    """The dataset that the flags name, checked as far as can be without reading its images."""
    if args.latents_dir:
        found = read_index(args.latents_dir)["classes"]
        return Data(*model_classes(args, found), found)
    dataset = load_image_dataset(args.dataset_name, args.split, args.train_data_dir, args.streaming)
    names = label_names(dataset, args.label_column)
    reader = ImageReader(dataset, names, args.resolution, args.image_column, args.label_column)
    return Data(*model_classes(args, names), names, reader)


def model_classes(args, names):
    """The model's class names, and for each of the data's classes its id there; adapters keep the base's classes."""
    if args.lora_rank is None:
        return names, torch.arange(len(names))
    known = class_names(args.pretrained_model_name_or_path)
    ids = match_names(names, known)
    if None in ids:
        raise ValueError(
            f"{args.pretrained_model_name_or_path} has no class {names[ids.index(None)]!r}, and adapters can't add one; "
            "leave out --lora_rank."
        )
    return [known[key] for key in sorted(known)], torch.tensor(ids)


def load_vae(args, device):
    """The VAE, frozen; that of the pretrained pipeline if no other is given."""
    if args.vae is None:
        vae = AutoencoderKL.from_pretrained(args.pretrained_model_name_or_path, subfolder="vae", dtype=torch.float32)
    else:
        vae = AutoencoderKL.from_pretrained(args.vae, dtype=torch.float32)
        check_statistics(args, vae)
    return vae.to(device).eval().requires_grad_(False)


def check_statistics(args, vae):
    """That a VAE given beside a pretrained pipeline normalises latents as the pipeline's own."""
    if args.pretrained_model_name_or_path is None:
        return
    try:
        own = AutoencoderKL.load_config(args.pretrained_model_name_or_path, subfolder="vae")
    except OSError:  # a model without VAE
        return
    defaults = inspect.signature(AutoencoderKL.__init__).parameters
    for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
        trained_with = own.get(name, defaults[name].default)
        if trained_with != vae.config[name]:
            raise ValueError(
                f"--vae {args.vae} normalises latents by {name} {vae.config[name]}, the weights were trained with "
                f"{trained_with}; leave out --vae."
            )


def vae_factor(vae):
    """Pixels a side of one latent value."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def image_resolution(args, vae):
    """Pixels a side: what the latents or the pretrained weights are of; where there are neither, what is asked for."""
    if args.latents_dir:
        source, size = args.latents_dir, CachedLatents(args.latents_dir).shape[-1]
    elif args.pretrained_model_name_or_path:
        source = args.pretrained_model_name_or_path
        size = DiTTransformer2DModel.load_config(source, subfolder="transformer")["sample_size"]
    else:
        return args.resolution or DEFAULT_RESOLUTION
    if args.resolution not in (None, size * vae_factor(vae)):
        raise ValueError(f"{source} is of {size * vae_factor(vae)} pixels; leave out --resolution {args.resolution}.")
    return size * vae_factor(vae)


def latent_size(vae, resolution):
    """Side of the latents of images of this resolution."""
    factor = vae_factor(vae)
    if resolution < factor or resolution % factor:
        raise ValueError(f"--resolution {resolution} is not divisible by {factor}, the VAE's factor.")
    return resolution // factor


def build_transformer(args, vae, names):
    """A model for the dataset's classes and the VAE's latents, fresh or from given weights, with adapters if asked."""
    config = {
        "sample_size": latent_size(vae, args.resolution),
        "in_channels": vae.config.latent_channels,
        "num_classes": len(names),
        "class_dropout_prob": args.class_dropout_prob,
        "learn_sigma": args.objective == "epsilon",
    }
    if args.pretrained_model_name_or_path:
        check_objective(args)
        model = load_base(args, names)
        for name in ("sample_size", "in_channels"):
            if model.config[name] != config[name]:
                raise ValueError(
                    f"{args.pretrained_model_name_or_path} has {name}={model.config[name]}, where the data and the VAE "
                    f"need {config[name]}."
                )
        if args.lora_rank is not None:
            add_lora(model, args.lora_rank, args.lora_alpha or args.lora_rank)
        freeze(model, args.freeze)
        return model
    if args.preset:
        return DiTTransformer2DModel.from_preset(args.preset, **config)
    given = json.loads(args.transformer_config.read_text())
    if clash := sorted(config.keys() & given.keys()):
        raise ValueError(f"--transformer_config sets {', '.join(clash)}, which data, VAE and flags decide here.")
    try:
        return DiTTransformer2DModel(**(config | given))
    except TypeError as error:
        raise ValueError(f"--transformer_config {args.transformer_config}: {error}") from error


def load_base(args, names):
    """Given weights, with a label table for the dataset's classes; adapters are for the base's own table."""
    if args.lora_rank is None:
        return load_for_classes(args.pretrained_model_name_or_path, names, args.class_dropout_prob)
    model = DiTTransformer2DModel.from_pretrained(
        args.pretrained_model_name_or_path, subfolder="transformer", dtype=torch.float32
    )
    if args.class_dropout_prob > 0 and model.config.class_dropout_prob == 0:
        raise ValueError(
            f"{args.pretrained_model_name_or_path} has no null class, and adapters can't add one; pass "
            "--class_dropout_prob 0."
        )
    return model


def trained_scheduler(args, name, **overrides):
    """A sampler of what is trained here: given weights keep their pipeline's diffusion, or the shift of its flow."""
    base = args.pretrained_model_name_or_path
    kept = trained_options(name, scheduler_config(base)) if base else {}
    return make_scheduler(name, **(kept | overrides))


@cache
def scheduler_config(pretrained_model_name_or_path):
    """Of a pipeline's scheduler, whichever it is."""
    return DDPMScheduler.load_config(pretrained_model_name_or_path, subfolder="scheduler")


def check_objective(args):
    """That given weights go on learning what their pipeline's scheduler takes them for."""
    prediction = trained_prediction(scheduler_config(args.pretrained_model_name_or_path))
    if prediction not in ("epsilon", "velocity"):
        raise ValueError(f"{args.pretrained_model_name_or_path} predicts {prediction}, which is not trained here.")
    if prediction != args.objective:
        raise ValueError(
            f"{args.pretrained_model_name_or_path} predicts {prediction}, which --objective {args.objective} would "
            f"spoil; pass --objective {prediction} (or a --recipe that has it)."
        )


def open_latents(args, accelerator, vae, data, encoder):
    """Where training reads from: a cache, made first if need be, or the images themselves."""
    if not args.cache_latents and not args.latents_dir:
        return EncodedImages(vae, data.reader, encoder)
    folder = args.latents_dir
    if folder is None:
        folder = args.output_dir / "latents"
        make_cache(args, accelerator, vae, data, encoder, folder)
    latents = CachedLatents(folder)
    made_by = checksums(vae, encoder)
    for flag, name in (("--vae", "vae"), ("--alignment_encoder", "encoder")):
        if made_by[name] is not None and latents.index.get(name) not in (None, made_by[name]):
            raise ValueError(f"{folder} was made with another {name} than {flag}; make it anew with this one.")
    size, channels = latent_size(vae, args.resolution), vae.config.latent_channels
    if latents.shape != (channels, size, size):
        raise ValueError(
            f"{folder} holds latents {latents.shape}; the VAE makes {(channels, size, size)} of the images."
        )
    if args.pretrained_model_name_or_path:
        latents.statistics = vae_statistics(vae)  # those that the weights were trained with
        return latents
    # Raw posteriors are cached and these statistics normalise them, so the VAE's own scale must not count as well.
    mean, std = latents.statistics
    vae.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=1.0, shift_factor=None)
    return latents


def checksums(vae, encoder):
    """What latents and features are made by."""
    return {"vae": checksum(vae, DECODER), "encoder": None if encoder is None else checksum(encoder)}


def make_cache(args, accelerator, vae, data, encoder, folder):
    """Every process writes its shards, then the main one the index."""
    source = args.dataset_name or args.train_data_dir
    settings = {"split": args.split, "resolution": args.resolution, "classes": data.reader.names}
    settings |= {"columns": [args.image_column, args.label_column], "shard_size": args.shard_size}
    made_by = checksums(vae, encoder)
    fingerprint = cache_fingerprint(data.reader.dataset, source, **settings, **made_by)
    is_there = (folder / "index.json").exists() and read_index(folder)["fingerprint"] == fingerprint
    accelerator.wait_for_everyone()  # before the main process takes an index away
    if is_there:
        return
    rank, size = accelerator.process_index, accelerator.num_processes
    num_shards = cache_latents(vae, data.reader, folder, fingerprint, rank, size, encoder, shard_size=args.shard_size)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        index_latents(folder, fingerprint, data.reader.names, num_shards, made_by)
    accelerator.wait_for_everyone()


def validation_images(args, data):
    """Held-out images `(N, 3, H, W)` and their labels `(N,)`, as many as asked, spread over the split."""
    dataset = load_image_dataset(args.dataset_name, args.validation_split, args.train_data_dir)
    if label_names(dataset, args.label_column) != data.reader.names:
        raise ValueError(f"Split {args.validation_split!r} has other classes than {args.split!r}.")
    count = min(args.validation_images, len(dataset))
    dataset = dataset.select(torch.linspace(0, len(dataset) - 1, count).long().tolist())
    reader = ImageReader(dataset, data.reader.names, args.resolution, args.image_column, args.label_column)
    images, labels = reader.stack()
    return images, data.ids[torch.tensor(labels)]


def positive(text):
    """An argument that counts something."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def add_data_arguments(parser):
    """Flags of the data and the VAE, the same in both scripts."""
    data = parser.add_argument_group("data")
    data.add_argument("--dataset_name", help="Hub id or local dataset for `datasets.load_dataset`.")
    data.add_argument("--train_data_dir", type=Path, help="Folder of class folders, WebDataset or Parquet shards.")
    data.add_argument("--streaming", action="store_true", help="Read images while they are encoded; keep no copy.")
    data.add_argument("--split", default="train", help="Split to train on.")
    data.add_argument("--image_column", default="image", help="Column with images.")
    data.add_argument("--label_column", default="label", help="Column with class ids or names.")
    data.add_argument(
        "--resolution",
        type=positive,
        help=f"Pixels a side; {DEFAULT_RESOLUTION}, or those of given latents or weights.",
    )
    data.add_argument("--vae", help="Folder or Hub id of an AutoencoderKL; by default the pretrained pipeline's.")
    data.add_argument("--shard_size", type=positive, default=2048, help="Images in one file of the cache of latents.")
    data.add_argument(
        "--alignment_encoder",
        default="efficientnet-lite0",
        help="Frozen encoder for --proj_coeff: efficientnet-lite0, or a vision model of transformers.",
    )
