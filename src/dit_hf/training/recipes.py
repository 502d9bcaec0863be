"""The training settings of the papers, as flags of the command `train`; a flag beside a recipe replaces its value."""

# DiT §4 (https://arxiv.org/abs/2212.09748): ADM's diffusion, constant learning rate, no weight decay.
DIT = {
    "objective": "epsilon",
    "total_batch_size": 256,
    "max_train_steps": 400_000,
    "learning_rate": 1e-4,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "adam_beta2": 0.999,
    "weight_decay": 0.0,
    "ema_decay": 0.9999,
    "class_dropout_prob": 0.1,
    "flip_probability": 0.5,
    "max_grad_norm": float("inf"),
}
RECIPES = {
    "dit": DIT,
    # SiT §4 (https://arxiv.org/abs/2401.08740): DiT's, with the linear path's velocity and uniform time.
    "sit": DIT | {"objective": "velocity", "time_sampling": "uniform"},
    # LightningDiT (https://arxiv.org/abs/2501.01423): logit-normal time, direction loss, larger batch and rate.
    "lightningdit": DIT
    | {
        "objective": "velocity",
        "time_sampling": "logit_normal",
        "cosine_loss": True,
        "total_batch_size": 1024,
        "max_train_steps": 80_000,
        "learning_rate": 2e-4,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
    },
    # JiT, its ImageNet settings for all sizes (https://arxiv.org/abs/2511.13720): 600 epochs, 5 of them warm-up.
    "jit": DIT
    | {
        "objective": "clamped_velocity",
        "total_batch_size": 1024,
        "max_train_steps": 750_000,
        "learning_rate": 2e-4,
        "lr_scheduler": "constant_with_warmup",
        "lr_warmup_steps": 6250,
        "adam_beta2": 0.95,
    },
    # MeanFlow (https://arxiv.org/abs/2505.13447): 240 epochs, guidance of its B/2 (ω 1, κ 0.5).
    "meanflow": DIT
    | {
        "objective": "meanflow",
        "max_train_steps": 1_200_000,
        "adam_beta2": 0.95,
        "target_guidance_scale": 2.0,
        "target_guidance_mix": 0.5,
    },
    # SoFlow (https://arxiv.org/abs/2512.15657): 240 epochs, no mirror images.
    "soflow": DIT
    | {
        "objective": "soflow",
        "max_train_steps": 1_200_000,
        "adam_beta2": 0.99,
        "flip_probability": 0.0,
        "target_guidance_scale": 3.0,
        "target_guidance_mix": 0.25,
        "target_guidance_end": 0.8,
    },
    # Ours, for small models (docs/few_steps.md): trajectories of the pretrained model and velocities, half of each.
    "distillation": {
        "objective": "distillation",
        "flow_matching_ratio": 0.5,
        "total_batch_size": 24,
        "max_train_steps": 2400,
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 50,
        "adam_beta2": 0.99,
        "ema_decay": 0.999,
        "ema_warmup": True,
        "balance_classes": True,
    },
    # Ours (docs/log.md, the faster recipe): on emoji64 it reaches in 500 steps the distance that the paper's recipe
    # has after 5,000. The learning rate matters most, and is for models of a few million parameters.
    "fast": {
        "time_sampling": "logit_normal",
        "learning_rate": 4e-3,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 50,
        "adam_beta2": 0.99,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "ema_decay": 0.999,
        "ema_warmup": True,  # as it was measured
        "class_dropout_prob": 0.1,
        "flip_probability": 0.5,
        "balance_classes": True,
    },
}
