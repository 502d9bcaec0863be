"""Training losses: the paper's (epsilon MSE + variational bound) and velocity flow matching.

Shapes: `B` batch, `C` channels, `H W` latent size. Every loss has one value per sample, `(B,)`.

Sources: Improved DDPM (Nichol & Dhariwal, https://arxiv.org/abs/2102.09672) for the bound and the learned variance,
DDPM (Ho et al., https://arxiv.org/abs/2006.11239) for the decoder's likelihood.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F


NATS_PER_BIT = math.log(2.0)
# Pixels are 8-bit values in [-1, 1]: two neighbours are 2/255 apart.
HALF_BIN = 1.0 / 255.0


def diffusion_loss(
    model_output: torch.Tensor, x_start: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor, scheduler
) -> dict[str, torch.Tensor]:
    """
    The loss DiT is trained with: epsilon's squared error, plus the bound's term for a learned variance.

    Args:
        model_output (`torch.Tensor` of shape `(B, C, H, W)`, or `(B, 2C, H, W)` with a learned variance):
            What the model predicted at `timestep`.
        x_start (`torch.Tensor` of shape `(B, C, H, W)`): Clean latents.
        noise (`torch.Tensor` of shape `(B, C, H, W)`): The noise that was added.
        timestep (`torch.Tensor` of shape `(B,)`, int64): Training timesteps, 0 … T-1.
        scheduler: A diffusers scheduler with `betas`, e.g. `make_scheduler("ddpm")`.

    Returns:
        `dict`: `mse` and `loss`, `(B,)` each; with a learned variance also `vb`, in bits, the mean over values. `loss`
        is their sum; the bound's gradient reaches the variance channels only.

    Raises:
        ValueError: if the channels of the output are neither those of `x_start` nor twice as many.
    """
    channels = x_start.shape[1]
    epsilon = _prediction(model_output, channels)
    terms = {"mse": _mean_over_values((noise - epsilon).square())}
    terms["loss"] = terms["mse"]
    if model_output.shape[1] == 2 * channels:
        variance_values = model_output[:, channels:]
        terms["vb"] = _variational_bound(epsilon.detach(), variance_values, x_start, noise, timestep, scheduler)
        terms["loss"] = terms["mse"] + terms["vb"]
    return terms


def velocity_loss(model_output: torch.Tensor, x_start: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    Flow matching in diffusers' convention: x = (1 - sigma)·data + sigma·noise, and the target is noise - data.

    Args:
        model_output (`torch.Tensor` of shape `(B, C, H, W)`, or `(B, 2C, H, W)`):
            The predicted velocity; what a head has beside, as SiT's has, is not trained.
        x_start (`torch.Tensor` of shape `(B, C, H, W)`): Clean latents.
        noise (`torch.Tensor` of shape `(B, C, H, W)`): The noise that was mixed in.

    Returns:
        `dict`: `mse` and `loss`, equal, `(B,)` each, and `cosine`, one minus the cosine between the channels of the
        prediction and of the target, the mean over positions (LightningDiT's direction loss).

    Raises:
        ValueError: if the channels of the output are neither those of `x_start` nor twice as many.

    Example:

        >>> import torch
        >>> from dit_hf.training.losses import velocity_loss
        >>> x_start, noise = torch.randn(2, 16, 4, 8, 8)  # latents of zero mean and unit variance
        >>> losses = velocity_loss(noise - x_start, x_start, noise)  # of a model that predicts the target exactly
        >>> losses["loss"].max().item()
        0.0
    """
    target, velocity = noise - x_start, _prediction(model_output, x_start.shape[1])
    mse = _mean_over_values((velocity - target).square())
    cosine = 1 - _mean_over_values(F.cosine_similarity(velocity, target, dim=1))
    return {"mse": mse, "loss": mse, "cosine": cosine}


def min_snr_weight(timestep: torch.Tensor, scheduler, gamma: float = 5.0) -> torch.Tensor:
    """
    Min-SNR weight of epsilon's squared error (https://arxiv.org/abs/2303.09556): min(SNR, gamma) / SNR, which weights
    timesteps with little noise down.

    Args:
        timestep (`torch.Tensor` of shape `(B,)`, int64): Training timesteps, 0 … T-1.
        scheduler: A diffusers scheduler with `alphas_cumprod`.
        gamma (`float`, defaults to 5.0): The bound.

    Returns:
        `torch.Tensor` of shape `(B,)`
    """
    signal = scheduler.alphas_cumprod.to(timestep.device)[timestep]
    ratio = signal / (1 - signal)
    return ratio.clamp(max=gamma) / ratio


def adaptive_loss(squared_error: torch.Tensor, eps: float, power: float) -> torch.Tensor:
    """
    A squared error over its own size, which evens out the gradients of samples (Consistency Models Made Easy,
    https://arxiv.org/abs/2406.14548; MeanFlow eq. 22): e / (e + eps)^power, the denominator without gradient.

    Args:
        squared_error (`torch.Tensor` of shape `(B,)`): e.
        eps (`float`): Keeps small errors from being overrated.
        power (`float`): 0 is the squared error itself, 0.5 nearly its root, 1 makes every loss nearly 1.

    Returns:
        `torch.Tensor` of shape `(B,)`
    """
    return squared_error * (squared_error.detach() + eps).pow(-power)


def with_value(loss: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """
    Replaces the value of a loss, for the log, and keeps its gradient.

    Args:
        loss (`torch.Tensor`): Has the gradient.
        value (`torch.Tensor` of the same shape): Is shown.

    Returns:
        `torch.Tensor`
    """
    return value.detach() + (loss - loss.detach())


def _prediction(model_output, channels):
    """The half of the output that is no variance."""
    if model_output.shape[1] not in (channels, 2 * channels):
        raise ValueError(
            f"`model_output` has {model_output.shape[1]} channels; {channels} or, with a learned variance, "
            f"{2 * channels} fit an `x_start` of {channels}."
        )
    return model_output[:, :channels]


def _mean_over_values(values):
    return values.flatten(1).mean(dim=1)


@lru_cache(maxsize=8)
def _bound_tables(betas, device):
    """
    What the bound needs of a schedule, by timestep, copied to a device once, as a GPU would wait for each copy. It is
    computed in double precision, as its smallest differences vanish in single; on the CPU, as not every device has it.
    """
    betas = torch.tensor(betas, dtype=torch.float64)
    alphas_cumprod = (1.0 - betas).cumprod(0)
    previous_cumprod = torch.cat([torch.ones_like(alphas_cumprod[:1]), alphas_cumprod[:-1]])
    posterior_variance = betas * (1.0 - previous_cumprod) / (1.0 - alphas_cumprod)  # Improved DDPM eq. 10
    tables = {
        "signal": alphas_cumprod.sqrt(),
        "noise": (1.0 - alphas_cumprod).sqrt(),
        "inverse_signal": (1.0 / alphas_cumprod).sqrt(),
        "inverse_noise": (1.0 / alphas_cumprod - 1.0).sqrt(),
        "start_weight": betas * previous_cumprod.sqrt() / (1.0 - alphas_cumprod),  # Improved DDPM eq. 11
        "noisy_weight": (1.0 - previous_cumprod) * (1.0 - betas).sqrt() / (1.0 - alphas_cumprod),
        # The first posterior variance is 0; its logarithm is taken from the second.
        "posterior_log_variance": torch.cat([posterior_variance[1:2], posterior_variance[1:]]).log(),
        "log_betas": betas.log(),
    }
    return {name: values.float().to(device) for name, values in tables.items()}


def _variational_bound(epsilon, variance_values, x_start, noise, timestep, scheduler):
    """KL of the true posterior to the model's, at t = 0 the likelihood of the decoder, in bits (Improved DDPM §2)."""
    tables = _bound_tables(tuple(scheduler.betas.tolist()), x_start.device)

    def at(name):
        return tables[name][timestep][:, None, None, None]

    noisy = at("signal") * x_start + at("noise") * noise
    predicted_start = at("inverse_signal") * noisy - at("inverse_noise") * epsilon
    true_mean = at("start_weight") * x_start + at("noisy_weight") * noisy
    model_mean = at("start_weight") * predicted_start + at("noisy_weight") * noisy

    true_log_variance = at("posterior_log_variance")
    fraction = (variance_values + 1.0) / 2.0
    model_log_variance = fraction * at("log_betas") + (1.0 - fraction) * true_log_variance  # Improved DDPM eq. 15

    kl = 0.5 * (
        model_log_variance
        - true_log_variance
        + (true_log_variance - model_log_variance).exp()
        + (true_mean - model_mean).square() * (-model_log_variance).exp()
        - 1.0
    )
    likelihood = -_decoder_log_likelihood(x_start, model_mean, 0.5 * model_log_variance)
    return torch.where(timestep == 0, _mean_over_values(likelihood), _mean_over_values(kl)) / NATS_PER_BIT


def _decoder_log_likelihood(values, mean, log_std):
    """Log probability of the 8-bit bin each value lies in, under a Gaussian (DDPM eq. 13)."""
    inverse_std = (-log_std).exp()
    below_upper = _normal_cdf((values - mean + HALF_BIN) * inverse_std)
    below_lower = _normal_cdf((values - mean - HALF_BIN) * inverse_std)
    # The outermost bins reach to infinity.
    probability = torch.where(
        values < -0.999, below_upper, torch.where(values > 0.999, 1.0 - below_lower, below_upper - below_lower)
    )
    return probability.clamp(min=1e-12).log()


def _normal_cdf(values):
    """The tanh approximation of the Gaussian's distribution function that ADM's code, and so DiT's, uses."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (values + 0.044715 * values.pow(3))))
