"""Samplers against diffusers' schedulers, plain NumPy, and problems whose solution is known."""

import importlib
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from animediffusion.models.diffusion.path import PathConfig, build_path
from animediffusion.models.diffusion.sampler import (
    SAMPLERS,
    build_sampler,
    cat_states,
    sample,
    sample_times,
    select_states,
)

PATHS = ("linear", "cosine", "flow")
SHAPE = (2, 3, 4, 4)
BETAS = {"num_train_timesteps": 1000, "beta_start": 1e-6, "beta_end": 1e-2, "beta_schedule": "linear"}


def noise_like_network(x, t):
    """Any smooth function of x and t, in the place of a network that predicts noise (t in 0..1)."""
    return torch.tanh(0.8 * x + t) + 0.1 * x


@pytest.fixture
def diffusers():
    """The package, imported here because its import takes 4 s, which each of the tests' processes would spend."""
    return importlib.import_module("diffusers")


def seeded_noise(shape=SHAPE, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear_times():
    """0.9, 0.8, ..., 0: entries 900, 800, ..., 0 of the table."""
    return torch.arange(9, -1, -1, dtype=torch.float64) / 10


def from_noise(path, predict):
    """The x_0 estimate that a noise predictor amounts to."""

    def denoise(x, t):
        t = t.reshape(-1, 1, 1, 1)
        return (x - path.sigma(t) * predict(x, t)) / path.alpha(t)

    return denoise


def scheduled(scheduler, noise, predict):
    x = noise
    for timestep in scheduler.timesteps:
        x = scheduler.step(predict(x, float(timestep) / 1000), timestep, x).prev_sample
    return x


def test_euler_on_the_linear_path_is_diffusers_ddim(diffusers):
    scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, timestep_spacing="leading")
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == list(range(900, -1, -100))
    path = build_path(PathConfig(name="linear"))
    ours = sample(build_sampler("euler", path), from_noise(path, noise_like_network), seeded_noise(), linear_times())
    # Their last step goes from entry 0 to entry 0 and changes nothing.
    theirs = scheduled(scheduler, seeded_noise(), noise_like_network)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_dpmpp_2m_on_the_linear_path_is_diffusers_multistep_dpm_solver(diffusers):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **BETAS,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        lower_order_final=True,
        final_sigmas_type="sigma_min",
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(9)
    assert scheduler.timesteps.tolist() == list(range(900, 0, -100))
    path = build_path(PathConfig(name="linear"))
    ours = sample(build_sampler("dpmpp_2m", path), from_noise(path, noise_like_network), seeded_noise(), linear_times())
    theirs = scheduled(scheduler, seeded_noise(), noise_like_network)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.3])
def test_euler_on_the_flow_path_is_diffusers_flow_matching(diffusers, shift):
    steps = 6
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
    x = seeded_noise().float()
    for timestep in scheduler.timesteps:
        x = scheduler.step(noise_like_network(x, float(timestep) / 1000), timestep, x).prev_sample
    path = build_path(PathConfig(name="flow", shift=shift))

    def denoise(x_t, t):
        sigma = path.sigma(t).reshape(-1, 1, 1, 1)
        return x_t - sigma * noise_like_network(x_t, sigma)

    ours = sample(build_sampler("euler", path), denoise, seeded_noise().float(), sample_times(path, steps))
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-5)


def test_a_shift_of_the_sampling_times_is_that_of_the_path():
    path = build_path(PathConfig(name="flow"))
    shifted = build_path(PathConfig(name="flow", shift=2.0))
    torch.testing.assert_close(sample_times(path, 5, shift=2.0), shifted.sigma(sample_times(shifted, 5)))


def test_heun_is_the_plain_formula():
    path = build_path(PathConfig(name="cosine"))
    t = np.linspace(1, 0, 6)
    x = seeded_noise().numpy()

    def alpha(t):
        return np.cos(t * np.pi / 2)

    def sigma(t):
        return np.sin(t * np.pi / 2)

    def estimate(x, t):
        return np.tanh(x + t)

    def slope(x, x_0, t):
        eps = (x - alpha(t) * x_0) / sigma(t)
        return np.pi / 2 * (alpha(t) * eps - sigma(t) * x_0)

    for now, after in itertools.pairwise(t):
        x_0 = estimate(x, now)
        trial = alpha(after) * x_0 + sigma(after) / sigma(now) * (x - alpha(now) * x_0)
        if after > 0:
            x = x + (after - now) / 2 * (slope(x, x_0, now) + slope(trial, estimate(trial, after), after))
        else:
            x = trial
    ours = sample(
        build_sampler("heun", path),
        lambda x_t, t: torch.tanh(x_t + t.reshape(-1, 1, 1, 1)),
        seeded_noise(),
        torch.from_numpy(t),
    )
    np.testing.assert_allclose(ours.numpy(), x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("path_name", PATHS)
@given(steps=st.integers(1, 40), shift=st.floats(0.3, 4))
def test_a_perfect_denoiser_leads_to_its_image(name, path_name, steps, shift):
    path = build_path(PathConfig(name=path_name))
    target = torch.linspace(-1, 1, 48).reshape(1, 3, 4, 4)
    image = sample(
        build_sampler(name, path),
        lambda x, _t: target.expand_as(x),
        seeded_noise().float(),
        sample_times(path, steps, shift=shift),
    )
    # The published linear path stops a thousandth of noise before the image.
    tolerance = 8e-3 if path_name == "linear" else 1e-5
    torch.testing.assert_close(image, target.expand_as(image), rtol=0, atol=tolerance)


def gaussian_toy(path, mean=0.4, deviation=0.3):
    """Denoiser and exact flow between two times where every pixel of an image is N(mean, deviation^2)."""

    def denoise(x, t):
        t = t.reshape(-1, 1, 1, 1)
        alpha, sigma = path.alpha(t), path.sigma(t)
        gain = alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2)
        return mean + gain * (x - alpha * mean)

    def standard(x, t):
        return (x - path.alpha(t) * mean) / spread_of(t)

    def spread_of(t):
        return (path.alpha(t) ** 2 * deviation**2 + path.sigma(t) ** 2).sqrt()

    return denoise, lambda x, begin, end: path.alpha(end) * mean + spread_of(end) * standard(x, begin)


def toy_error(name, path, times):
    denoise, flow = gaussian_toy(path)
    noise = seeded_noise((1, 3, 8, 8))
    image = sample(build_sampler(name, path), denoise, noise, times)
    return float((image - flow(noise, times[0], times[-1])).abs().max())


@pytest.mark.parametrize("path_name", ["flow", "cosine"])
def test_euler_is_first_order_and_the_others_second(path_name):
    path = build_path(PathConfig(name=path_name))

    def even(steps):
        return sample_times(path, steps).double()

    def even_in_log_snr(steps):
        """The solver's own variable, away from both ends, where it is infinite."""
        ratio = torch.logspace(1, -1, steps + 1, base=4, dtype=torch.float64)
        return ratio / (1 + ratio) if path_name == "flow" else ratio.atan() * 2 / torch.pi

    def gain(name, times):
        return toy_error(name, path, times(40)) / toy_error(name, path, times(80))

    assert gain("euler", even) == pytest.approx(2, abs=0.2)
    assert gain("heun", even) == pytest.approx(4, abs=0.6)
    assert gain("dpmpp_2m", even_in_log_snr) == pytest.approx(4, abs=0.6)


@pytest.mark.parametrize("path_name", ["flow", "cosine"])
@pytest.mark.parametrize("steps", [5, 10, 20])
def test_dpmpp_2m_is_closer_than_euler_with_the_same_number_of_evaluations(path_name, steps):
    path = build_path(PathConfig(name=path_name))
    times = sample_times(path, steps).double()
    assert toy_error("dpmpp_2m", path, times) < 0.95 * toy_error("euler", path, times)


@pytest.mark.parametrize("name", SAMPLERS)
def test_rows_of_different_lengths_in_one_batch_end_as_they_would_alone(name):
    path = build_path(PathConfig(name="flow"))
    sampler = build_sampler(name, path)
    noise = seeded_noise((3, 3, 4, 4)).float()
    times = [sample_times(path, steps, shift=shift) for steps, shift in ((1, 1.0), (4, 1.0), (7, 2.0))]

    def denoise(x, t):
        return torch.tanh(x + t.reshape(-1, 1, 1, 1))

    alone = [sample(sampler, denoise, noise[i : i + 1], times[i]) for i in range(3)]
    state = cat_states([sampler.start(noise[i : i + 1], times[i]) for i in range(3)])
    turns = 0
    while not sampler.done(state).all():
        state = sampler.advance(state, denoise(*sampler.query(state)))
        turns += 1
    assert turns == sampler.num_evaluations(7)
    torch.testing.assert_close(state.x, torch.cat(alone), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_finished_row_stays_whatever_the_network_says(name):
    path = build_path(PathConfig(name="flow"))
    sampler = build_sampler(name, path)
    short = sampler.start(seeded_noise((1, 3, 4, 4)).float(), sample_times(path, 1))
    long = sampler.start(seeded_noise((1, 3, 4, 4), 1).float(), sample_times(path, 5))
    state = sampler.advance(cat_states([short, long]), torch.zeros(2, 3, 4, 4))
    assert sampler.done(state).tolist() == [True, False]
    later = sampler.advance(state, torch.full((2, 3, 4, 4), float("nan")))
    for before, after in zip(select_states(state, slice(0, 1)), select_states(later, slice(0, 1)), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("name", SAMPLERS)
@given(steps=st.integers(1, 12))
def test_the_stated_number_of_evaluations_is_the_number_of_calls(name, steps):
    path = build_path(PathConfig(name="flow"))
    sampler = build_sampler(name, path)
    calls = []

    def denoise(x, t):
        calls.append(float(t[0]))
        return torch.zeros_like(x)

    state = sampler.start(torch.zeros(1, 3, 2, 2), sample_times(path, steps))
    while not sampler.done(state).all():
        state = sampler.advance(state, denoise(*sampler.query(state)))
    assert len(calls) == sampler.num_evaluations(steps)
    assert min(calls) > 0
    sample(sampler, denoise, torch.zeros(1, 3, 2, 2), sample_times(path, steps))
    assert len(calls) == 2 * sampler.num_evaluations(steps)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("path_name", PATHS)
def test_gradients_through_all_steps_are_finite(name, path_name):
    path = build_path(PathConfig(name=path_name))
    scale = torch.tensor(0.7, requires_grad=True)
    image = sample(
        build_sampler(name, path), lambda x, _t: torch.tanh(scale * x), seeded_noise().float(), sample_times(path, 4)
    )
    image.square().mean().backward()
    assert torch.isfinite(scale.grad)
    assert scale.grad != 0


def test_an_unknown_sampler_and_zero_steps_raise_value_error():
    path = build_path(PathConfig())
    with pytest.raises(ValueError, match="euler, heun, dpmpp_2m, got 'ddpm'"):
        build_sampler("ddpm", path)
    with pytest.raises(ValueError, match="at least 1"):
        sample_times(path, 0)


def edm_denoise(y, sigma):
    """D(y; sigma) of a model that knows the images to be normal with mean 0.2 and spread 0.5."""
    return (0.25 * y + sigma**2 * 0.2) / (sigma**2 + 0.25)


def sample_as_edm(name, steps):
    """The sampler on SSIMBaD's path, with that model: x is EDM's y / (1 + sigma)."""
    path = build_path(PathConfig(name="flow", shift=0.3, sigma_max=80.0))

    def denoise(x, t):
        sigma = (path.sigma(t) / path.alpha(t)).reshape(-1, 1, 1, 1)
        return edm_denoise(x * (1 + sigma), sigma)

    return sample(build_sampler(name, path), denoise, seeded_noise(), sample_times(path, steps).double())


def test_euler_on_ssimbads_path_takes_edms_euler_steps_evenly_in_phi():
    phi = np.linspace(80 / 80.3, 0, 6)
    sigmas = 0.3 * phi / (1 - phi)
    y = 80 * seeded_noise().numpy()
    for now, after in itertools.pairwise(sigmas):
        y = y + (after - now) * (y - edm_denoise(y, now)) / now  # Karras et al. 2022, Algorithm 1
    np.testing.assert_allclose(sample_as_edm("euler", 5).numpy(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_starts_at_sigma_80_and_finds_the_solution(name):
    # The exact flow maps y at sigma to the image: both are normal, so places in units of their spread stay.
    noise = seeded_noise()
    place = (80 * noise - 0.2) / (80**2 + 0.25) ** 0.5
    torch.testing.assert_close(sample_as_edm(name, 200), 0.2 + 0.5 * place, rtol=0, atol=0.02)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_evaluation_times_are_those_at_which_the_network_is_asked(name, steps):
    path, asked = build_path(PathConfig(name="flow")), []
    sampler, times = build_sampler(name, path), sample_times(path, steps, shift=2.0)

    def denoise(x, t):
        asked.append(t[0])
        return noise_like_network(x, t[0])

    sample(sampler, denoise, seeded_noise().float(), times)
    assert torch.equal(torch.stack(asked), sampler.evaluation_times(times))
    assert len(asked) == sampler.num_evaluations(steps)
