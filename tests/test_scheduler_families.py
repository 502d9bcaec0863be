"""Every sampler of diffusers against a denoiser that is known in closed form.

For data distributed as N(m, s²) in each value, the best prediction of noise or velocity is affine in the noisy value.
A sampler that is driven rightly turns unit noise into that distribution, up to its discretisation error; a wrong
starting scale, a forgotten input scaling or a wrong schedule gives another mean or spread.
"""

import copy

import pytest
import torch
from diffusers import (
    DDIMParallelScheduler,
    DDPMParallelScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    LTXEulerAncestralRFScheduler,
    PNDMScheduler,
    SASolverScheduler,
    TCDScheduler,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers import KarrasDiffusionSchedulers

from dit_hf import DiTClassCondPipeline, make_scheduler
from dit_hf.schedulers import RECIPES, TRAINING_DIFFUSION


MEAN, STD = 0.7, 0.5
# EDM's guess of s; were it right, the network inside the preconditioning would not depend on its input.
SIGMA_DATA = 0.8
# Exact samplers keep s to 1e-4. The tolerances leave room for
# - the start: noise is N(0, 1) where the diffusion ends at N(0.0063·m, …); that moves the mean by -m·s/157 = -0.0022,
#   for EDM's sigma_max of 80 by -0.0044;
# - the discretisation at the listed number of steps: O(1/N) for first-order samplers, which get more steps;
# - integer timesteps: flow matching's solvers floor t, which shows the model up to 1/1000 less noise (0.002 in s);
# - 32,768 values: ±0.003 in the mean and ±0.002 in s of stochastic samplers (given noise is standardised).
MEAN_TOLERANCE, STD_TOLERANCE = 0.008, 0.01

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


class GaussianDenoiser(ModelMixin, ConfigMixin, CacheMixin):
    """
    The optimal model of N(m, s²), as a function of the model's input and the timestep alone.

    Args:
        prediction (`str`):
            What it predicts and how it reads time: `"epsilon"`, `"sample"`, `"v"` at timesteps of the training
            diffusion, fractional ones too; `"v_continuous"` the same at ln(sigma)/4; `"flow"` noise − data at
            1000·sigma; `"edm"` the inner network of EDM's preconditioning at ln(sigma)/4.
        timesteps (`list[int]`): With `learn_sigma`, the steps whose exact variance the second half gives.
    """

    @register_to_config
    def __init__(
        self,
        prediction: str = "epsilon",
        timesteps: list[int] | None = None,
        learn_sigma: bool = False,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        num_classes: int = 10,
        class_dropout_prob: float = 0.0,
    ):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))  # the model's dtype and device
        self.alphas_cumprod = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)

    def sigma_of(self, timestep):
        """Noise to signal ratio at a timestep, between whole ones interpolated in the logarithm."""
        if self.config.prediction in ("edm", "v_continuous"):
            return torch.exp(4 * timestep)
        log_sigmas = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt().log()
        below = timestep.floor().long().clamp(0, 998)
        return torch.lerp(log_sigmas[below], log_sigmas[below + 1], timestep - below).exp()

    def variance_channels(self, timestep):
        """DDPM's interpolation coefficient, in [-1, 1] or beyond, at which the step's variance is the true one."""
        steps = self.config.timesteps
        following = steps.index(int(timestep)) + 1
        cumprod = self.alphas_cumprod[int(timestep)]
        cumprod_next = self.alphas_cumprod[steps[following]] if following < len(steps) else torch.tensor(1.0).double()
        beta = 1 - cumprod / cumprod_next
        smallest = (beta * (1 - cumprod_next) / (1 - cumprod)).clamp(min=1e-20)
        data_variance = STD**2 * (1 - cumprod) / (cumprod * STD**2 + 1 - cumprod)  # of x_0 given x_t
        true = smallest + cumprod_next * (beta / (1 - cumprod)) ** 2 * data_variance
        return 2 * (true / smallest).log() / (beta / smallest).log() - 1

    def forward(self, hidden_states, timestep, class_labels, return_dict=True):
        assert (timestep == timestep[0]).all() and timestep.shape == class_labels.shape == hidden_states.shape[:1]
        timestep, noisy = timestep[0].double(), hidden_states.double()
        prediction = self.config.prediction
        if prediction == "edm":
            sigma = self.sigma_of(timestep)
            noisy = noisy * (sigma**2 + SIGMA_DATA**2).sqrt()  # undoes c_in
            denoised = (STD**2 * noisy + sigma**2 * MEAN) / (STD**2 + sigma**2)
            skip = SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2)
            out = sigma * SIGMA_DATA / (sigma**2 + SIGMA_DATA**2).sqrt()
            return ((denoised - skip * noisy).div(out).to(hidden_states.dtype),)

        if prediction == "flow":
            noise_scale = timestep / 1000
            data_scale = 1 - noise_scale
        else:
            data_scale = (1 + self.sigma_of(timestep) ** 2) ** -0.5
            noise_scale = (1 - data_scale**2).sqrt()
        centred = (noisy - data_scale * MEAN) / (data_scale**2 * STD**2 + noise_scale**2)
        data, noise = MEAN + data_scale * STD**2 * centred, noise_scale * centred
        output = {
            "epsilon": noise,
            "sample": data,
            "flow": noise - data,
            "v": data_scale * noise - noise_scale * data,
            "v_continuous": data_scale * noise - noise_scale * data,
        }[prediction]
        if self.config.learn_sigma:
            output = torch.cat([output, torch.full_like(output, self.variance_channels(timestep).item())], dim=1)
        return (output.to(hidden_states.dtype),)


def sample(scheduler, prediction="epsilon", steps=50, latents="standardised", learn_sigma=False, **kwargs):
    """Draws 8 × 4 × 32 × 32 values of N(m, s²) through the pipeline."""
    if latents == "standardised":
        latents = torch.randn(8, 4, 32, 32, generator=torch.Generator().manual_seed(0))
        latents = (latents - latents.mean()) / latents.std()
    timesteps = None
    if learn_sigma:
        scheduler.set_timesteps(steps)
        timesteps = scheduler.timesteps.tolist()
    pipe = DiTClassCondPipeline(GaussianDenoiser(prediction, timesteps, learn_sigma), scheduler)
    pipe.set_progress_bar_config(disable=True)
    output = pipe(
        [0] * 8,
        guidance_scale=1,
        num_inference_steps=steps,
        latents=latents,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
        **kwargs,
    )
    return output.images


def assert_distributed(values, mean_tolerance=MEAN_TOLERANCE, std_tolerance=STD_TOLERANCE):
    mean, std = values.mean().item(), values.std().item()
    print(f"mean {mean:.4f}, std {std:.4f}")
    assert abs(mean - MEAN) < mean_tolerance, f"mean {mean:.4f}, std {std:.4f}"
    assert abs(std - STD) < std_tolerance, f"mean {mean:.4f}, std {std:.4f}"


def diffusion(scheduler_class, **config):
    return scheduler_class(**TRAINING_DIFFUSION, **config)


# name -> (scheduler, prediction, steps)
CASES = {
    "ddpm_fixed_small": (make_scheduler("ddpm", variance_type="fixed_small"), "epsilon", 500),
    "ddpm_fixed_large": (make_scheduler("ddpm", variance_type="fixed_large"), "epsilon", 200),
    "ddpm_parallel": (diffusion(DDPMParallelScheduler, clip_sample=False), "epsilon", 500),
    "ddim": (make_scheduler("ddim"), "epsilon", 200),
    "ddim_v": (make_scheduler("ddim", prediction_type="v_prediction"), "v", 200),
    "ddim_sample": (make_scheduler("ddim", prediction_type="sample"), "sample", 200),
    "ddim_trailing": (make_scheduler("ddim", timestep_spacing="trailing"), "epsilon", 200),
    "ddim_parallel": (diffusion(DDIMParallelScheduler, clip_sample=False), "epsilon", 200),
    "tcd": (diffusion(TCDScheduler, clip_sample=False, original_inference_steps=200), "epsilon", 200),
    "dpm++": (make_scheduler("dpm++"), "epsilon", 50),
    "dpm++_order_3": (make_scheduler("dpm++", solver_order=3), "epsilon", 100),
    "dpm++_karras": (make_scheduler("dpm++", use_karras_sigmas=True), "epsilon", 50),
    "dpm++_lu": (make_scheduler("dpm++", use_lu_lambdas=True), "epsilon", 50),
    "dpm++_exponential": (make_scheduler("dpm++", use_exponential_sigmas=True), "epsilon", 50),
    # Beta spacing spends its steps at high noise; 50 steps give a spread of 0.66.
    "dpm++_beta": (make_scheduler("dpm++", use_beta_sigmas=True), "epsilon", 1000),
    "dpm++_trailing": (make_scheduler("dpm++", timestep_spacing="trailing"), "epsilon", 50),
    "dpm++_sde": (make_scheduler("dpm++", algorithm_type="sde-dpmsolver++"), "epsilon", 200),
    "dpm++_singlestep": (make_scheduler("dpm++_singlestep"), "epsilon", 100),
    "dpm++_singlestep_karras": (make_scheduler("dpm++_singlestep", use_karras_sigmas=True), "epsilon", 100),
    # Slow to converge: 0.427 after 50 steps, 0.474 after 200.
    "dpm++_singlestep_sde": (make_scheduler("dpm++_singlestep", algorithm_type="sde-dpmsolver++"), "epsilon", 1000),
    "unipc": (make_scheduler("unipc"), "epsilon", 50),
    "unipc_karras": (make_scheduler("unipc", use_karras_sigmas=True), "epsilon", 50),
    "deis": (diffusion(DEISMultistepScheduler), "epsilon", 50),
    "deis_karras": (diffusion(DEISMultistepScheduler, use_karras_sigmas=True), "epsilon", 50),
    "sasolver": (diffusion(SASolverScheduler), "epsilon", 50),
    "euler": (diffusion(EulerDiscreteScheduler), "epsilon", 200),
    "euler_leading": (diffusion(EulerDiscreteScheduler, timestep_spacing="leading"), "epsilon", 200),
    "euler_trailing": (diffusion(EulerDiscreteScheduler, timestep_spacing="trailing"), "epsilon", 200),
    "euler_karras": (diffusion(EulerDiscreteScheduler, use_karras_sigmas=True), "epsilon", 200),
    "euler_continuous_v": (
        diffusion(
            EulerDiscreteScheduler,
            timestep_type="continuous",
            prediction_type="v_prediction",
            use_karras_sigmas=True,
        ),
        "v_continuous",
        200,
    ),
    "euler_ancestral": (diffusion(EulerAncestralDiscreteScheduler), "epsilon", 500),
    "heun": (diffusion(HeunDiscreteScheduler), "epsilon", 50),
    "heun_karras": (diffusion(HeunDiscreteScheduler, use_karras_sigmas=True), "epsilon", 50),
    "lms": (diffusion(LMSDiscreteScheduler), "epsilon", 50),
    "lms_karras": (diffusion(LMSDiscreteScheduler, use_karras_sigmas=True), "epsilon", 50),
    "kdpm2": (diffusion(KDPM2DiscreteScheduler), "epsilon", 50),
    "kdpm2_karras": (diffusion(KDPM2DiscreteScheduler, use_karras_sigmas=True), "epsilon", 50),
    "kdpm2_ancestral": (diffusion(KDPM2AncestralDiscreteScheduler), "epsilon", 200),
    "pndm": (diffusion(PNDMScheduler), "epsilon", 50),
    "pndm_plms": (diffusion(PNDMScheduler, skip_prk_steps=True), "epsilon", 50),
    "edm_euler": (EDMEulerScheduler(sigma_data=SIGMA_DATA), "edm", 200),
    "edm_euler_exponential": (EDMEulerScheduler(sigma_data=SIGMA_DATA, sigma_schedule="exponential"), "edm", 200),
    "edm_dpm++": (EDMDPMSolverMultistepScheduler(sigma_data=SIGMA_DATA), "edm", 50),
    "edm_dpm++_sde": (
        EDMDPMSolverMultistepScheduler(sigma_data=SIGMA_DATA, algorithm_type="sde-dpmsolver++"),
        "edm",
        200,
    ),
    "flow_euler": (make_scheduler("flow_euler"), "flow", 200),
    "flow_euler_shift": (make_scheduler("flow_euler", shift=3.0), "flow", 200),
    "flow_euler_karras": (make_scheduler("flow_euler", use_karras_sigmas=True), "flow", 200),
    "flow_heun": (make_scheduler("flow_heun"), "flow", 50),
    "flow_heun_shift": (make_scheduler("flow_heun", shift=3.0), "flow", 50),
    "flow_dpm++": (make_scheduler("flow_dpm++"), "flow", 50),
    "flow_dpm++_shift": (make_scheduler("flow_dpm++", flow_shift=3.0), "flow", 50),
    "flow_dpm++_sde": (make_scheduler("flow_dpm++", algorithm_type="sde-dpmsolver++"), "flow", 200),
    "flow_dpm++_singlestep": (DPMSolverSinglestepScheduler(**FLOW), "flow", 50),
    "flow_unipc": (make_scheduler("flow_unipc"), "flow", 50),
    # The floor makes the first two of 1000 timesteps equal: a look-up of the first finds the wrong one.
    "flow_unipc_1000": (make_scheduler("flow_unipc"), "flow", 1000),
    # DEIS and SA-Solver end at the last sigma, 1/N, not at 0.
    "flow_deis": (DEISMultistepScheduler(**FLOW), "flow", 200),
    "flow_sasolver": (SASolverScheduler(**FLOW), "flow", 200),
    "flow_euler_ancestral": (LTXEulerAncestralRFScheduler(), "flow", 200),
    "flow_map": (make_scheduler("flow_map"), "flow", 200),
    "flow_sde": (make_scheduler("flow_sde", last_step_size=1e-3), "flow", 200),
    "flow_ddt": (make_scheduler("flow_ddt"), "flow", 200),
    "flow_rae": (make_scheduler("flow_rae"), "flow", 200),
}
LEFT_OUT = {
    "DPMSolverSDEScheduler": "needs torchsde, which is not installed",
    "FlowMatchLCMScheduler": "is for models of the mean velocity to the data: tests/test_flow_maps.py",
}


@pytest.mark.parametrize("name", CASES)
def test_distribution(name):
    assert_distributed(sample(*copy.deepcopy(CASES[name])))


FROM_NOISE_ONLY = {"lms", "lms_karras", "pndm", "pndm_plms", "sasolver", "flow_sasolver", "flow_euler_ancestral"}


@pytest.mark.parametrize("name", CASES)
def test_images_with_half_of_the_steps_keep_their_distribution(name):
    """Images of N(m, s²), given the noise of the step that a strength begins at: another amount changes the spread."""
    images = MEAN + STD * torch.randn(8, 4, 32, 32, generator=torch.Generator().manual_seed(2))
    options = {"image": images, "strength": 0.5}
    if name in FROM_NOISE_ONLY:
        with pytest.raises(ValueError, match="begins with pure noise only"):
            sample(*copy.deepcopy(CASES[name]), **options)
        return
    output = sample(*copy.deepcopy(CASES[name]), **options)
    assert_distributed(output, mean_tolerance=0.012, std_tolerance=0.014)
    kept = torch.corrcoef(torch.stack([images.flatten(), output.flatten()]))[0, 1]
    assert kept < 0.98


def test_all_families_are_covered():
    covered = {type(scheduler).__name__ for scheduler, _, _ in CASES.values()} | {"DDPMScheduler"}
    assert {member.name for member in KarrasDiffusionSchedulers} == (
        covered & {member.name for member in KarrasDiffusionSchedulers}
    ) | {"DPMSolverSDEScheduler"}
    assert {scheduler_class.__name__ for scheduler_class, _ in RECIPES.values()} <= covered | set(LEFT_OUT)


@pytest.mark.parametrize("steps", [4, 10, 50])
def test_learned_variance_makes_ddpm_exact(steps):
    """With the true variance of each step ancestral sampling of a Gaussian is exact; fixed_small gives 0.15 … 0.44."""
    assert_distributed(sample(make_scheduler("ddpm"), steps=steps, learn_sigma=True))


def test_fixed_variance_ignores_learned_channels():
    fixed = make_scheduler("ddpm", variance_type="fixed_small")
    assert torch.equal(sample(fixed, steps=10, learn_sigma=True), sample(fixed, steps=10))


@pytest.mark.parametrize(
    "scheduler_class",
    [DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler, SASolverScheduler, DDIMParallelScheduler],
)
def test_solver_made_from_a_learned_variance_ddpm(scheduler_class):
    """`X.from_config(pipe.scheduler.config)` hands `variance_type` on, for which some keep three channels only."""
    scheduler = scheduler_class.from_config(make_scheduler("ddpm").config)
    plain = scheduler_class.from_config(make_scheduler("ddpm", variance_type="fixed_small").config, variance_type=None)
    assert torch.equal(sample(scheduler, steps=10), sample(plain, steps=10))
    assert torch.equal(sample(scheduler, steps=10, learn_sigma=True), sample(plain, steps=10))
    assert scheduler.config.variance_type == "learned_range"  # for whoever goes back to DDPM


@pytest.mark.parametrize("name", ["euler", "heun", "edm_dpm++", "flow_heun", "dpm++"])
def test_noise_that_the_pipeline_draws(name):
    """Drawn noise is scaled as given noise is; its own spread adds ±0.002 to s and ±0.003 to the mean."""
    assert_distributed(sample(*copy.deepcopy(CASES[name]), latents=None), mean_tolerance=0.012, std_tolerance=0.014)


@pytest.mark.parametrize("steps", [1, 4, 7, 50])
def test_flow_matching_schedule(steps):
    expected = torch.cat([torch.linspace(1, 1 / steps, steps), torch.zeros(1)])
    euler, heun = make_scheduler("flow_euler"), make_scheduler("flow_heun")
    sample(euler, "flow", steps)
    sample(heun, "flow", steps)
    torch.testing.assert_close(euler.sigmas, expected)
    torch.testing.assert_close(euler.timesteps, 1000 * expected[:-1])
    torch.testing.assert_close(heun.sigmas[[0, *range(1, 2 * steps, 2)]], expected)  # the inner ones occur twice
    assert heun.sigma_min == make_scheduler("flow_heun").sigma_min
    shifted = make_scheduler("flow_euler", shift=3.0), make_scheduler("flow_heun", shift=3.0)
    for scheduler in shifted:
        sample(scheduler, "flow", steps)
    torch.testing.assert_close(shifted[0].sigmas, 3 * expected / (1 + 2 * expected))
    torch.testing.assert_close(shifted[1].sigmas.unique(), shifted[0].sigmas.flip(0))
    # The solvers that integrate flow matching start at 0.999 and floor the timestep.
    for name in ("flow_dpm++", "flow_unipc"):
        solver = make_scheduler(name)
        solver.set_timesteps(steps)
        assert (solver.sigmas - expected).abs().max() <= 1.1e-3
        assert (solver.timesteps - 1000 * solver.sigmas[:-1]).abs().max() < 1


def test_flow_euler_is_the_euler_method():
    """Four steps by hand, to the last digit: no tolerance hides a shifted schedule."""
    latents = torch.randn(8, 4, 32, 32, generator=torch.Generator().manual_seed(3))
    model, expected = GaussianDenoiser("flow"), latents.clone()
    for time in (1.0, 0.75, 0.5, 0.25):
        velocity = model(expected, torch.full((8,), 1000 * time), torch.zeros(8))[0]
        expected = expected - 0.25 * velocity
    torch.testing.assert_close(sample(make_scheduler("flow_euler"), "flow", 4, latents), expected)


@pytest.mark.parametrize(
    ("scheduler", "prediction", "argument", "schedule"),
    [
        (make_scheduler("flow_euler"), "flow", "sigmas", [1.0, 0.6, 0.3, 0.1]),
        (make_scheduler("flow_unipc"), "flow", "sigmas", [1.0, 0.6, 0.3, 0.1]),
        (diffusion(EulerDiscreteScheduler), "epsilon", "sigmas", [157.0, 10.0, 1.0, 0.1, 0.0]),
        (diffusion(EulerDiscreteScheduler), "epsilon", "timesteps", [999, 700, 300, 50]),
        (make_scheduler("flow_euler"), "flow", "timesteps", [1000, 600, 300, 100]),
        (diffusion(HeunDiscreteScheduler), "epsilon", "timesteps", [999, 700, 300, 50]),
        (make_scheduler("ddpm", variance_type="fixed_small"), "epsilon", "timesteps", [999, 700, 300, 0]),
        (make_scheduler("dpm++"), "epsilon", "timesteps", [999, 700, 300, 50]),
        (make_scheduler("dpm++_singlestep"), "epsilon", "timesteps", [999, 700, 300, 50]),
    ],
    ids=lambda value: type(value).__name__.removesuffix("DiscreteScheduler") if hasattr(value, "step") else None,
)
def test_custom_schedule(scheduler, prediction, argument, schedule):
    values = sample(scheduler, prediction, steps=50, **{argument: schedule})  # the schedule decides, not the 50
    own = scheduler.timesteps.unique().flip(0).float() if argument == "timesteps" else scheduler.sigmas
    torch.testing.assert_close(own[: len(schedule)], torch.tensor(schedule).float(), atol=1e-3, rtol=1e-4)
    assert len(scheduler.timesteps.unique()) == 4
    assert torch.isfinite(values).all() and abs(values.mean() - MEAN) < 0.1


def test_eta_reaches_ddim():
    """Stochastic DDIM adds noise in each step, and at eta = 1 is DDPM with the small variance."""
    ddim = make_scheduler("ddim")
    values = [sample(ddim, steps=200, eta=eta) for eta in (0.0, 0.5, 1.0)]
    assert not torch.allclose(values[0], values[1]) and not torch.allclose(values[1], values[2])
    ddpm = make_scheduler("ddpm", variance_type="fixed_small", timestep_spacing="leading")
    torch.testing.assert_close(values[2], sample(ddpm, steps=200), atol=1e-3, rtol=1e-3)
