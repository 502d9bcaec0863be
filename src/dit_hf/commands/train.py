"""Trains a class-conditional DiT on the latents, or a JiT on the pixels, of an image dataset; writes a pipeline."""

import json
import sys
from contextlib import closing, nullcontext
from dataclasses import fields
from signal import Signals

import torch
from accelerate.utils import DistributedType, set_seed
from diffusers.utils import logging

from ..command_line import run
from ..data.autoencoders import Pixels, latent_channels, vae_statistics
from ..data.fingerprints import fingerprint_of
from ..data.latents import EncodedImages, latent_shape, read_index
from ..data.shards import known_fingerprint
from ..files import check_apart, check_folder
from ..hub import BackgroundUploads, publish_folder
from ..models import DiTTransformer2DModel
from ..pipeline import DiTClassCondPipeline
from ..training.alignment import AlignmentHead, check_alignment, check_depth, load_encoder
from ..training.batches import SeededBatches, check_batch
from ..training.checkpointing import check_resumable
from ..training.config import TrainingConfig
from ..training.data import checksums, latent_size, open_latents, write_latents
from ..training.finetuning import record_guidance
from ..training.model import (
    DEFAULT_RESOLUTION,
    check_architecture,
    check_prediction,
    classes_of_adapters,
    image_resolution,
    load_vae,
    new_transformer,
    preset_resolution,
    pretrained_transformer,
    recommended_call,
    sampling_scheduler,
    trained_class,
    training_scheduler,
    transformer_config,
)
from ..training.objectives import OBJECTIVES, choose_objective
from ..training.optimizer import build_optimizer
from ..training.plan import training_plan
from ..training.result import check_hub, logged_metrics, save_pipeline, training_facts
from ..training.running import local_share, lock_folder, run_on_main, start_accelerator
from ..training.settings import check_resume, run_settings
from ..training.speed import check_speed
from ..training.teacher import check_autoencoder, check_teacher
from ..training.trainer import Trainer
from ..training.validation import HeldOutMetrics, Validation, check_sampling
from .latents import image_data
from .train_flags import parse_args


logger = logging.get_logger(__name__)

# Above this, the derivative with respect to time is too noisy for MeanFlow.
MAX_TIMESTEP_SCALE = 0.01
# Flags that make a run what it is, beside the fields of `TrainingConfig`, the transformer, the objective and the data.
COMPARED = ("lora_rank", "lora_alpha", "freeze", "alignment_encoder", "alignment_depth", "cache_latents")
# And those that decide which images there are, if there are images. The fingerprint tells only that they have changed.
DATA = ("split", "holdout", "resolution", "image_column", "label_column")


def training_config(args, num_processes: int) -> TrainingConfig:
    """The settings of the trainer; the batch is that of all processes."""
    if args.train_batch_size is not None:
        args.total_batch_size = args.train_batch_size * args.gradient_accumulation_steps * num_processes
    check_batch(args.total_batch_size, num_processes, args.gradient_accumulation_steps)
    return TrainingConfig(**{entry.name: getattr(args, entry.name) for entry in fields(TrainingConfig)})


def check_output(args) -> None:
    """Checks that the output folder can be written, and lies in nothing that is read."""
    check_folder(args.output_dir, "--output_dir")
    if args.latents_dir is not None:
        check_apart(args.output_dir, args.latents_dir, "--output_dir")


class Training:
    """One run of the command: the parts that the flags name, built and checked before anything is written."""

    def __init__(self, args, config, accelerator):
        self.args, self.config, self.accelerator = args, config, accelerator
        set_seed(args.seed)
        pretrained = args.pretrained_model_name_or_path
        teacher = args.pretrained_teacher_model or pretrained
        sources = [source for source in dict.fromkeys((pretrained, teacher)) if source is not None]
        for source in sources:
            check_architecture(source)
        self.model_class = trained_class(args.preset, args.transformer_config, pretrained)
        args.objective = choose_objective(args.objective, self.model_class.__name__)
        row = OBJECTIVES[args.objective]
        if row.needs_pretrained and pretrained is None:
            raise ValueError(
                f"--objective {args.objective} needs --pretrained_model_name_or_path, the weights to start from."
            )
        if pretrained is not None:
            check_prediction(pretrained, row.kind)
        self.vae = load_vae(args.vae, pretrained, self.model_class)
        if not isinstance(self.vae, Pixels):  # these have nothing to compute
            self.vae.to(accelerator.device)
        else:
            if args.streaming:
                raise ValueError("--streaming keeps latents, and this model is trained on pixels; omit it.")
            args.cache_latents = False  # they would take more room than the images
        args.resolution = self.resolution()
        self.data = self.reader = None
        if args.latents_dir is None:
            self.data = image_data(args)
            self.reader = self.data.reader()
        self.data_classes = read_index(args.latents_dir)["classes"] if self.reader is None else self.reader.names
        self.names, self.class_ids = self.data_classes, torch.arange(len(self.data_classes))
        if args.lora_rank is not None:
            self.names, self.class_ids = classes_of_adapters(pretrained, self.data_classes)
        if row.needs_pretrained:
            check_teacher(teacher, self.names, args.class_dropout_prob, self.model_class)
        if args.pretrained_teacher_model is not None:
            check_autoencoder(teacher, self.vae)
        self.transformer = self.build_transformer()
        learn_sigma = self.transformer.config.get("learn_sigma", False)
        trained = training_scheduler(row.kind, learn_sigma, teacher)
        own = None if row.needs_pretrained else pretrained  # the sampler of what is distilled is another
        self.scheduler = sampling_scheduler(trained, own, args.time_shift)
        flags = {flag: getattr(args, flag) for flag in row.flags}
        self.objective = row.build(trained, self.build_teacher() or self.transformer, **flags)
        record_guidance(self.transformer, self.objective.guidance_in_weights)
        self.check_objective()

    def resolution(self):
        """Pixels per side: what the latents or the pretrained weights are of, or else what is asked for."""
        args = self.args
        source, size = args.pretrained_model_name_or_path, None
        if args.latents_dir is not None:
            source, size = args.latents_dir, latent_shape(args.latents_dir)[-1]
        elif source is not None:
            size = transformer_config(source).get("sample_size")
        default = preset_resolution(args.preset) if isinstance(self.vae, Pixels) else DEFAULT_RESOLUTION
        return image_resolution(args.resolution, self.vae, source, size, default)

    @property
    def latents_config(self):
        """What the transformer's config must have for the latents."""
        return {"sample_size": latent_size(self.vae, self.args.resolution), "in_channels": latent_channels(self.vae)}

    def build_transformer(self):
        """A model for the dataset's classes and the VAE's latents, new or from given weights."""
        args = self.args
        size, kind = self.latents_config, OBJECTIVES[args.objective].kind
        if args.pretrained_model_name_or_path is not None:
            options = (args.class_dropout_prob, args.lora_rank, args.lora_alpha, args.freeze, kind.num_jumps > 0)
            return pretrained_transformer(args.pretrained_model_name_or_path, self.names, *options, **size)
        classes = {"num_classes": len(self.names), "class_dropout_prob": args.class_dropout_prob}
        if self.model_class is DiTTransformer2DModel:  # the others predict no variance
            classes |= {"learn_sigma": kind.learn_sigma, **kind.transformer_config}
        return new_transformer(args.preset, args.transformer_config, **size, **classes)

    def build_teacher(self):
        """The model to distil with the dataset's classes, if it is not the pretrained one."""
        args = self.args
        if args.pretrained_teacher_model is None:
            return None
        dropout = args.class_dropout_prob
        return pretrained_transformer(args.pretrained_teacher_model, self.names, dropout, **self.latents_config)

    def check_objective(self):
        """Refuses or warns of what the objective does not go well with."""
        check_alignment(self.objective, self.args.proj_coeff)
        if self.objective.forward_mode and self.args.float8:
            raise ValueError(f"--float8 can't be differentiated as --objective {self.args.objective} needs; omit it.")
        if self.objective.forward_mode and self.transformer.config.timestep_scale > MAX_TIMESTEP_SCALE:
            logger.warning(
                f"The model multiplies its times by {1000 * self.transformer.config.timestep_scale:g}, and with "
                "them the derivative by time: MeanFlow's targets will be noisy. Use --objective soflow."
            )
        if (
            self.args.mixed_precision != "no"
            and self.args.objective == "soflow"
            and self.args.solution_steps[1] < 0.05
        ):
            logger.warning(
                f"{self.args.mixed_precision} rounds what soflow divides by a distance that falls to "
                f"{self.args.solution_steps[1]}: late in the training its targets are mostly noise. Pass "
                "--solution_steps 0.1 0.05, or omit --mixed_precision."
            )

    def read(self):
        """All that the run reads before it writes, and whether it may resume."""
        args, accelerator = self.args, self.accelerator
        self.held_out = self.encoder = self.latents = None
        if args.validation_split:
            counts = (args.validation_split, self.data_classes, self.class_ids, args.validation_images)
            self.held_out = HeldOutMetrics(*self.data.held_out(*counts), args.validation_metrics)
        if self.reader is not None and not args.streaming:
            SeededBatches(len(self.reader.dataset), args.total_batch_size)  # too large a batch, before the work
        if args.proj_coeff:
            self.encoder = load_encoder(args.alignment_encoder).to(accelerator.device)
        keep = args.pretrained_model_name_or_path is not None
        if args.latents_dir is not None:
            self.latents = self.open(args.latents_dir)
            if args.proj_coeff and self.latents.feature_dim is None:
                raise ValueError(f"{args.latents_dir} holds no features; precompute it with --features.")
            SeededBatches(len(self.latents.labels), args.total_batch_size)
        elif not args.cache_latents:
            self.latents = EncodedImages(self.vae, self.reader, self.encoder)
        check_speed(self.transformer, self.config, accelerator.device, accelerator.mixed_precision)
        if args.proj_coeff:
            check_depth(self.transformer, args.alignment_depth)
        self.facts = {name: getattr(args, name) for name in COMPARED}
        if self.reader is not None:
            self.facts |= {name: getattr(args, name) for name in DATA}
            made_by = checksums(self.vae, self.encoder)
            settings = self.data.settings(self.reader, args.shard_size, **made_by)
            cache = args.output_dir / "latents"
            self.facts["latents"] = (
                known_fingerprint(cache, settings)[0] if args.cache_latents else fingerprint_of(settings)
            )
        else:
            self.facts["latents"] = self.latents.index["fingerprint"]
        if keep or not args.cache_latents:
            self.facts["statistics"] = vae_statistics(self.vae)
        build_optimizer(self.config, self.transformer)  # its library may be missing
        check_sampling(self.pipeline(self.transformer), **self.sampling)
        if args.push_to_hub and accelerator.is_main_process:
            check_hub(args.hub_model_id)
        settings = run_settings(self.config, self.transformer, self.objective, accelerator, self.facts)
        if checkpoint := check_resume(self.config, settings):
            run_on_main(accelerator, lambda: check_resumable(checkpoint))  # before the images are encoded

    def open(self, folder):
        """A cache of latents, whose checksums the processes of this machine share."""
        keep = self.args.pretrained_model_name_or_path is not None
        share = local_share(self.accelerator)
        return open_latents(folder, self.vae, self.args.resolution, self.encoder, keep, share)

    @property
    def sampling(self):
        """The settings of the calls that sample during training."""
        steps = self.args.validation_inference_steps or self.objective.num_jumps or 25
        return {"guidance_scale": self.args.guidance_scale if self.is_guided else 1.0, "num_inference_steps": steps}

    @property
    def is_guided(self):
        """Whether samples are made with guidance."""
        return self.args.class_dropout_prob > 0 and not self.objective.guidance_in_weights

    def pipeline(self, transformer):
        """The pipeline that is sampled during training and saved at its end."""
        # A model whose jumps alone are guided keeps the recommended guidance of its velocity.
        guided = self.args.class_dropout_prob > 0 and self.objective.guidance_in_weights is not True
        call = recommended_call(self.args.pretrained_model_name_or_path, guided, self.objective.num_jumps)
        vae = None if isinstance(self.vae, Pixels) else self.vae
        pipe = DiTClassCondPipeline(transformer, self.scheduler, vae, dict(enumerate(self.names)), call)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def print_facts(self):
        """The resolved settings and what is trained."""
        self.accelerator.print(json.dumps(vars(self.args), indent=2, default=str))
        self.accelerator.print(
            f"{self.transformer.num_parameters() / 1e6:.2f} M parameters, "
            f"{self.transformer.num_parameters(only_trainable=True) / 1e6:.2f} M of them trained, "
            f"{len(self.names)} classes, {self.accelerator.num_processes} processes"
        )
        if self.reader is not None:
            self.accelerator.print(self.reader.describe())

    def print_plan(self):
        """What the run would take."""
        plan = training_plan(self.transformer, self.objective, self.config, self.accelerator)
        self.accelerator.print(json.dumps(plan, indent=2))

    def trainer(self):
        """The trainer with its data; encodes the images first if they are to be cached."""
        args, accelerator = self.args, self.accelerator
        if self.latents is None:
            folder = args.output_dir / "latents"
            write_latents(accelerator, self.vae, self.data, self.reader, folder, self.encoder, args.shard_size)
            self.latents = self.open(folder)
        latents, alignment = self.latents, None
        if args.proj_coeff:
            alignment = AlignmentHead(self.transformer, args.alignment_depth, latents.feature_dim)
        counts = zip(
            self.data_classes, latents.labels.bincount(minlength=len(self.data_classes)).tolist(), strict=True
        )
        accelerator.print(f"{len(latents.labels)} images: {', '.join(f'{name} {count}' for name, count in counts)}")
        parts = (self.config, self.transformer, latents, self.objective)
        options = {"accelerator": accelerator, "class_ids": self.class_ids, "alignment": alignment}
        return Trainer(*parts, **options, facts=self.facts, notes=vars(args))

    def run(self) -> int:
        """From the first step, or a checkpoint, to the published model; returns the signal that stopped it, or 0."""
        args, main = self.args, self.accelerator.is_main_process
        trainer = self.trainer()
        uploads = BackgroundUploads(args.hub_model_id) if args.push_to_hub and main else None
        # Whatever ends the training, what is queued is sent.
        with closing(uploads) if uploads is not None else nullcontext():
            validation = Validation(
                self.pipeline(trainer.transformer),
                args.output_dir,
                args.seed,
                args.validation_classes,
                args.validation_images_per_class,
                self.held_out,
                uploads,
                main,
                **self.sampling,
            )
            step = trainer.train(
                validation, must_fall=args.pretrained_model_name_or_path is None and args.learning_rate > 0
            )
        if trainer.stopped_by:
            name = Signals(trainer.stopped_by).name
            self.accelerator.print(f"Stopped at step {step} by {name}; run the same command again to resume.")
        else:
            self.save(trainer, self.choose_step(trainer, step))
        return trainer.stopped_by

    def choose_step(self, trainer, last):
        """The step whose weights are saved: the last, or the best, which is loaded."""
        best = trainer.best.step()
        if best is None:
            return last
        if self.accelerator.is_main_process:
            print(trainer.best.describe(best))
        if self.args.load_best_model_at_end:
            return trainer.load_best_model()
        if best != last:
            self.accelerator.print("To save its weights, run the same command with --load_best_model_at_end.")
        return last

    def save(self, trainer, step):
        """The pipeline folder with its card and, if asked for, its copy on the Hub; or the adapters."""
        args = self.args
        with trainer.averaged_transformer() as transformer:
            if not self.accelerator.is_main_process:
                return
            if args.lora_rank is not None:
                from ..training.lora import save_lora  # needs peft

                print(f"Adapters: {save_lora(transformer, args.output_dir)}")
                return
            pipe, metrics = self.pipeline(transformer), logged_metrics(args.output_dir, step)
            best = None if step == args.max_train_steps else step
            facts = training_facts(trainer.settings, trainer.guard.skipped, args.license, metrics, best)
            folder = save_pipeline(pipe, args.output_dir, facts, step)
            print(f"Pipeline: {folder}")
        if args.push_to_hub:
            print(f"Published: {publish_folder(folder, args.hub_model_id, pipe, facts)}")


def main() -> None:
    """Trains as the command line says; a signal that stopped it gives the exit code, 128 + its number."""
    args = parse_args()
    check_output(args)
    accelerator = start_accelerator(
        mixed_precision=args.mixed_precision, log_with=args.report_to, project_dir=args.output_dir / "logs"
    )
    args.mixed_precision = accelerator.mixed_precision
    if args.report_to and not accelerator.log_with:
        raise ValueError(f"--report_to {args.report_to} needs its package: `pip install {args.report_to}`.")
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if sharded and (args.proj_coeff or args.adversarial_weight or args.lora_rank is not None or args.dry_run):
        raise ValueError(
            "--proj_coeff, --adversarial_weight, --lora_rank and --dry_run work with DDP, not with sharded weights; "
            "use ddp.yaml, or omit them."
        )
    training = Training(args, training_config(args, accelerator.num_processes), accelerator)
    training.print_facts()
    if args.dry_run:
        training.print_plan()
        return
    training.read()
    with lock_folder(args.output_dir) if accelerator.is_main_process else nullcontext():
        if args.report_to:
            simple = {name: value for name, value in vars(args).items() if isinstance(value, int | float | str)}
            accelerator.init_trackers("dit_hf", config=simple)
        stopped_by = training.run()
        accelerator.end_training()
    if stopped_by:
        sys.exit(128 + stopped_by)


if __name__ == "__main__":
    run(main)
