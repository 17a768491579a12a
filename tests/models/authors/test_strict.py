"""The strict mode against the authors' equations, written once more in NumPy with index arithmetic of their own."""

import numpy as np
import pytest
import torch

from animediffusion.models.augmentation.augment import AugmentConfig
from animediffusion.models.authors import strict as authors
from animediffusion.models.authors.strict import fix_forward, gammas, noise_predictor, strict_loss, strict_sample
from animediffusion.models.bundle import SamplerDefaults
from animediffusion.models.diffusion.denoiser import Denoiser
from animediffusion.models.diffusion.path import PathConfig
from animediffusion.models.training.loop import OptimizerConfig, TrainState, fit
from animediffusion.models.training.objective import DenoisingConfig, ObjectiveConfig, StrictObjective

ALPHA_BAR = np.cumprod(1 - np.linspace(1e-6, 1e-2, 1000))
SHAPE = (2, 3, 4, 4)


@pytest.fixture(scope="module")
def noise():
    """Standard normal arrays: the start, and one for each of the 10 steps."""
    return np.random.default_rng(0).standard_normal((11, *SHAPE))


def predict(x, n):
    """A smooth stand-in for the network that depends on the time, and on whether there is one."""
    level = 0.4 if n is None else float(n[0]) / 1000
    return 0.8 * torch.tanh((1 + level) * x) + 0.1 * level


def predict_in_numpy(x, n):
    level = 0.4 if n is None else n / 1000
    return 0.8 * np.tanh((1 + level) * x) + 0.1 * level


def tensors(arrays):
    return torch.from_numpy(np.asarray(arrays))


def table():
    return torch.from_numpy(ALPHA_BAR)


def test_the_table_is_the_papers_in_float32():
    found = gammas(PathConfig(name="linear"))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), ALPHA_BAR, rtol=1e-4)


def test_the_loss_is_the_squared_error_of_the_noise_summed_over_pixels(noise):
    image, eps, n = np.tanh(noise[1]), noise[0], np.array([3, 870])
    share = ALPHA_BAR[n].reshape(-1, 1, 1, 1)
    noisy = np.sqrt(share) * image + np.sqrt(1 - share) * eps
    expected = [((noisy[i] * (2 + n[i]) - eps[i]) ** 2).sum() for i in range(2)]
    network = lambda x, times: x * (2 + times.reshape(-1, 1, 1, 1))  # noqa: E731
    found = strict_loss(network, table(), tensors(image), tensors(eps), torch.from_numpy(n))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_sampler_is_ddim_with_a_clamped_image_and_the_noise_as_predicted(noise, eta):
    x = noise[0]
    for i, n in enumerate(range(901, 0, -100)):
        now, after = ALPHA_BAR[n], ALPHA_BAR[max(n - 100, 0)]
        eps = predict_in_numpy(x, n)
        image = np.clip((x - np.sqrt(1 - now) * eps) / np.sqrt(now), -1, 1)
        sigma = eta * np.sqrt((1 - after) / (1 - now)) * np.sqrt(1 - now / after)
        x = np.sqrt(after) * image + np.sqrt(1 - after - sigma**2) * eps + sigma * noise[1 + i]
    found = strict_sample(predict, table(), tensors(noise[0]), list(tensors(noise[1:])), eta)
    np.testing.assert_allclose(found.numpy(), x, rtol=1e-10)


def test_phase_2_starts_from_the_truth_and_loses_the_time_after_the_first_step(noise):
    image = np.tanh(noise[1])
    x = np.sqrt(ALPHA_BAR[1]) * image + np.sqrt(1 - ALPHA_BAR[1]) * noise[0]
    for n in range(1, 802, 100):
        eps = predict_in_numpy(x, None)
        guess = np.clip((x - np.sqrt(1 - ALPHA_BAR[n]) * eps) / np.sqrt(ALPHA_BAR[n]), -1, 1)
        x = np.sqrt(ALPHA_BAR[n + 100]) * guess + np.sqrt(1 - ALPHA_BAR[n + 100]) * eps
    found = fix_forward(predict, table(), tensors(image), tensors(noise[0]))
    np.testing.assert_allclose(found.numpy(), x, rtol=1e-10)


def test_each_step_needs_its_noise(noise):
    with pytest.raises(ValueError, match="zip"):
        strict_sample(predict, table(), tensors(noise[0]), list(tensors(noise[1:5])))


@pytest.fixture
def strict_denoiser(new_denoiser):
    return new_denoiser(path="linear", prediction="eps")


def test_the_network_sees_their_whole_numbers_exactly(strict_denoiser, new_batch):
    seen = []
    strict_denoiser.network.time_embedding.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    batch = new_batch(1)
    ask = noise_predictor(strict_denoiser, strict_denoiser.encode(batch.sketch, batch.reference))
    numbers = torch.tensor([997])
    with torch.no_grad():
        ask(batch.target, numbers)
        without = ask(batch.target, None)
        at_zero = ask(batch.target, torch.tensor([0]))
    half = seen[0].shape[1] // 2
    angles = 997 * np.exp(-np.log(1000) * np.arange(half) / half)
    np.testing.assert_allclose(seen[0][0].numpy(), np.concatenate([np.cos(angles), np.sin(angles)]), atol=1e-4)
    assert len(seen) == 2
    assert not torch.allclose(without, at_zero, atol=1e-4)


def test_phase_1_sums_what_the_loss_gives_each_row(strict_denoiser, new_batch):
    batch = new_batch(3)
    loss = ObjectiveConfig(strict=True).build(strict_denoiser, SamplerDefaults(), 0)(batch, seeded())
    generator = seeded()
    eps = torch.randn(batch.target.shape, generator=generator)
    n = torch.randint(1000, (3,), generator=generator)
    ask = noise_predictor(strict_denoiser, strict_denoiser.encode(batch.sketch, batch.reference))
    each = strict_loss(ask, gammas(PathConfig(name="linear")), batch.target, eps, n)
    torch.testing.assert_close(loss.total, each.sum())
    assert float(loss.counts.sum()) == 3


def test_phase_2_differentiates_all_ten_steps(strict_denoiser, new_batch):
    calls = []
    strict_denoiser.network.bottom.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    objective = ObjectiveConfig(name="reconstruction", strict=True).build(strict_denoiser, SamplerDefaults(), 0)
    objective(new_batch(1), seeded()).total.backward()
    assert calls == [False] * 9 + [True] * 10
    gradient = strict_denoiser.network.input.weight.grad
    assert float(gradient.abs().sum()) > 0


def test_the_strict_phases_train_in_the_one_loop(strict_denoiser, new_rows):
    augment = AugmentConfig(cross_reference=0, rewarp=1, flip=0, recolor=0, soften=0)
    plain = OptimizerConfig(max_grad_norm=None, ema_decay=0.0, precision="fp32", cosine_after_warmup=True)
    state = TrainState(strict_denoiser, plain, 10)
    before = [parameter.clone() for parameter in state.parameters]
    for reconstruction in (False, True):
        objective = StrictObjective(strict_denoiser, reconstruction=reconstruction)
        rows = [new_rows(2, seed=seed) for seed in range(2)]
        fit(state, objective, rows, state.step + 2, lambda _step: None, augment=augment, seed=0)
    assert state.step == 4
    assert any(not torch.equal(a, b) for a, b in zip(before, state.parameters, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(state.average, state.parameters, strict=True))


@pytest.mark.parametrize(
    ("path", "prediction", "message"),
    [
        ({"name": "flow"}, "x0", "prediction 'eps', got 'x0'"),
        (
            {
                "name": "cosine",
            },
            "v",
            "prediction 'eps', got 'v'",
        ),
        ({"name": "flow", "sigma_max": 10.0}, "eps", "path 'linear' with 1000"),
        ({"name": "linear", "num_train_timesteps": 100}, "eps", "path 'linear' with 1000"),
    ],
)
def test_strict_mode_is_for_the_authors_path_and_prediction(network, path, prediction, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(strict=True).build(Denoiser(network, PathConfig(**path), prediction), SamplerDefaults(), 0)


def test_settings_that_strict_mode_would_ignore_raise_value_error():
    with pytest.raises(ValueError, match="strict objective has no settings"):
        ObjectiveConfig(strict=True, denoising=DenoisingConfig(drop_reference=0.2))


def test_the_last_step_ends_at_the_first_entry_not_at_the_image():
    assert authors.sampling_steps()[0] == (1, 0)
    assert authors.sampling_steps()[-1] == (901, 801)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)
