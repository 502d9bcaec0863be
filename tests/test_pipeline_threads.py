"""One pipeline, used from several threads: the same images as one call after another, and no mixture of them."""

import copy
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import FIXTURES, tiny_transformer, tiny_vae

import dit_hf
from dit_hf import DiTClassCondPipeline, DiTTransformer2DModel, make_scheduler, mix_classes
from dit_hf.optimization import use_modulation_table


CALLS = [
    {"class_labels": [label], "num_inference_steps": 3 + label, "guidance_scale": 1.0 + label / 2}
    for label in range(8)
]


def tiny_pipeline(scheduler="dpm++", vae=None):
    pipe = DiTClassCondPipeline(tiny_transformer(), make_scheduler(scheduler), vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, label=1, steps=4, **options):
    options = {"class_labels": [label], "num_inference_steps": steps, "output_type": "latent"} | options
    return pipe(generator=torch.Generator().manual_seed(options["class_labels"][0]), **options).images


def in_threads(jobs):
    """The results of functions that start together, each in a thread of its own; an error is raised here."""
    barrier = threading.Barrier(len(jobs))

    def start(job):
        barrier.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result(timeout=60) for future in [pool.submit(start, job) for job in jobs]]


def other_thread(job):
    thread = threading.Thread(target=job, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("kind", ["dpm++", "unipc", "flow_heun", "table"])
def test_eight_threads_give_the_images_of_one(kind):
    pipe = tiny_pipeline("dpm++" if kind == "table" else kind)
    if kind == "table":
        use_modulation_table(pipe)
    expected = [sample(pipe, **call) for call in CALLS]
    images = in_threads([lambda call=call: sample(pipe, **call) for call in CALLS])
    assert all(map(torch.equal, images, expected))


def test_pipelines_that_share_components_wait_for_each_other():
    pipes = [tiny_pipeline()]
    pipes += [DiTClassCondPipeline.from_pipe(pipes[0]) for _ in range(3)]
    assert len({id(pipe.scheduler) for pipe in pipes}) == 1
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    expected = [sample(pipes[0], **call) for call in CALLS[:4]]
    images = in_threads(
        [lambda pipe=pipe, call=call: sample(pipe, **call) for pipe, call in zip(pipes, CALLS[:4], strict=True)]
    )
    assert all(map(torch.equal, images, expected))


def test_what_changes_a_pipeline_waits_for_a_call():
    """Setting a scheduler, moving, optimizing and restoring, while another thread samples."""
    pipe = tiny_pipeline()
    expected = sample(pipe)
    for change in (
        lambda: setattr(pipe, "scheduler", make_scheduler("ddim")),
        lambda: pipe.to(torch.float64),
        lambda: dit_hf.optimize(pipe, "fastest"),
        lambda: dit_hf.restore(pipe),
    ):
        pipe.scheduler = make_scheduler("dpm++")
        pipe.to(torch.float32)
        started, images, order = threading.Event(), [], []

        def slow(pipe, step, timestep, tensors, started=started):
            started.set()
            time.sleep(0.02)

        def call(images=images, order=order, slow=slow):
            images.append(sample(pipe, callback_on_step_end=slow))
            order.append("call")

        thread = other_thread(call)
        started.wait(10)
        change()
        order.append("change")
        thread.join(10)
        assert order == ["call", "change"] and torch.equal(images[0], expected)
        dit_hf.restore(pipe)


def test_a_callback_does_not_call_its_pipeline():
    pipe, seen = tiny_pipeline(vae=tiny_vae()), []
    twin = DiTClassCondPipeline.from_pipe(pipe)

    def preview(pipe, step, timestep, tensors):
        seen.append(pipe.decode_latents(tensors["latents"], "pt"))  # this is allowed

    expected = sample(pipe)
    assert torch.equal(sample(pipe, callback_on_step_end=preview), expected) and len(seen) == 4
    for forbidden in (
        lambda *_: sample(pipe),
        lambda *_: sample(twin),
        lambda *_: dit_hf.optimize(pipe),
        lambda *_: dit_hf.restore(pipe),
    ):
        with pytest.raises(ValueError, match="in the middle of a call"):
            sample(pipe, callback_on_step_end=forbidden)
        assert torch.equal(sample(pipe), expected)  # nothing is left of it


def test_several_changes_and_a_call_as_one():
    """Every thread sets the scheduler that it wants."""
    pipe, names = tiny_pipeline(), ["dpm++", "ddim", "unipc", "ddpm"]

    def job(name):
        with pipe.exclusive():
            pipe.scheduler = make_scheduler(name)
            return sample(pipe)

    expected = [job(name) for name in names]
    assert all(map(torch.equal, in_threads([lambda name=name: job(name) for name in names]), expected))


def test_a_mixture_is_seen_by_its_own_thread_only():
    pipe = tiny_pipeline()
    plain = sample(pipe)
    with mix_classes(pipe.transformer, 5, 0.5):
        mixed = sample(pipe)
        assert torch.equal(in_threads([lambda: sample(pipe)])[0], plain)
        with mix_classes(pipe.transformer, 7, 0.5):
            assert not torch.equal(sample(pipe), mixed)
        assert torch.equal(sample(pipe), mixed)
    assert not torch.equal(mixed, plain) and torch.equal(sample(pipe), plain)


def test_a_mixture_stays_in_no_table():
    pipe = tiny_pipeline()
    use_modulation_table(pipe)
    with mix_classes(pipe.transformer, 5, 0.5):
        sample(pipe)
    inputs = {"hidden_states": torch.ones(1, 4, 8, 8), "timestep": pipe.scheduler.timesteps[:1].float()}
    inputs["class_labels"] = torch.tensor([1])
    with torch.no_grad():
        assert torch.equal(pipe.transformer(**inputs).sample, tiny_transformer()(**inputs).sample)


def test_pipelines_are_copied_and_pickled_as_before():
    pipe = tiny_pipeline()
    expected = sample(pipe)
    for other in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert torch.equal(sample(other), expected)


def test_pipelines_that_share_a_vae_do_not_block_each_other_for_good():
    vae = tiny_vae()
    first, second = tiny_pipeline(vae=vae), tiny_pipeline(vae=vae)
    latents, inside, waits = torch.ones(1, 4, 8, 8), threading.Event(), threading.Event()

    def nested():
        with first.exclusive():
            inside.set()
            waits.wait(10)
            time.sleep(0.05)
            return second.decode_latents(latents, "pt")

    def call():
        inside.wait(10)
        waits.set()
        return sample(second)

    decoded, sampled = in_threads([nested, call])
    assert torch.equal(decoded, first.decode_latents(latents, "pt")) and torch.equal(sampled, sample(first))


def test_pipelines_without_a_common_component_run_at_once():
    barrier = threading.Barrier(2)
    jobs = [
        lambda pipe=tiny_pipeline(): sample(pipe, callback_on_step_end=lambda *_: barrier.wait(10) and None)
        for _ in range(2)
    ]
    assert torch.equal(*in_threads(jobs))


def test_a_callback_calls_a_pipeline_that_shares_its_vae_only():
    vae = tiny_vae()
    pipe, other, images = tiny_pipeline(vae=vae), tiny_pipeline(vae=vae), []
    expected = sample(pipe)
    seen = sample(pipe, callback_on_step_end=lambda *_: images.append(sample(other, output_type="pt")) and None)
    assert torch.equal(seen, expected) and len(images) == 4


def test_adapters_wait_for_a_call():
    pipe, started, order = tiny_pipeline(), threading.Event(), []

    def slow(*_):
        started.set()
        time.sleep(0.02)

    thread = other_thread(lambda: (sample(pipe, callback_on_step_end=slow), order.append("call")))
    started.wait(10)
    pipe.unload_lora_weights()
    order.append("change")
    thread.join(10)
    assert order == ["call", "change"]


def test_a_torch_compiled_model_is_not_mixed():
    with pytest.raises(ValueError, match="is compiled"), mix_classes(torch.compile(tiny_transformer()), 1, 0.5):
        pass


def test_converting_leaves_the_models_of_other_threads_alone():
    def convert():
        for _ in range(5):
            DiTTransformer2DModel.from_single_file(FIXTURES / "dit_p2.pt", num_attention_heads=4)

    def build():
        assert not any(torch.nn.Linear(2, 2).weight.is_meta for _ in range(2000))

    in_threads([convert, build, convert, build])
    build()
