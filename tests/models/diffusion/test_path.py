import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from animediffusion.models.diffusion.path import PathConfig, build_path

NAMES = ("linear", "cosine", "flow")


def test_the_linear_path_is_the_square_root_of_the_cumulated_product_of_the_papers_betas():
    path = build_path(PathConfig(name="linear"))
    alpha_bar = np.cumprod(1 - np.linspace(1e-6, 1e-2, 1000))
    t = torch.arange(1000, dtype=torch.float64) / 1000
    np.testing.assert_allclose(path.alpha(t).numpy(), np.sqrt(alpha_bar), rtol=1e-12)
    np.testing.assert_allclose(path.sigma(t).numpy(), np.sqrt(1 - alpha_bar), rtol=1e-9)
    assert path.t_max == 0.999
    assert 0.08 < float(path.alpha(torch.tensor(path.t_max))) < 0.09


def test_a_shorter_linear_table_ends_as_noisy_as_the_papers():
    ends = [
        float(path.alpha(torch.tensor(path.t_max, dtype=torch.float64)))
        for path in (build_path(PathConfig(name="linear", num_train_timesteps=n)) for n in (100, 1000))
    ]
    assert ends[0] == pytest.approx(ends[1], abs=0.01)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@given(t=st.floats(0, 0.999))
def test_image_and_noise_shares_keep_the_variance(name, t):
    path, t = build_path(PathConfig(name=name)), torch.tensor(t, dtype=torch.float64)
    assert float(path.alpha(t) ** 2 + path.sigma(t) ** 2) == pytest.approx(1)


@given(t=st.floats(0, 1), shift=st.floats(0.05, 20))
def test_image_and_noise_shares_of_the_flow_path_add_up_to_one(t, shift):
    path, t = build_path(PathConfig(name="flow", shift=shift)), torch.tensor(t, dtype=torch.float64)
    assert float(path.alpha(t) + path.sigma(t)) == pytest.approx(1)


@pytest.mark.parametrize("name", NAMES)
def test_the_velocity_is_the_derivative_of_both_shares(name):
    path = build_path(PathConfig(name=name, **({"shift": 2.5} if name == "flow" else {})))
    # Half way between two entries of the table, where the linear path is differentiable.
    t = (torch.arange(1, 990, 7, dtype=torch.float64) + 0.5) / 1000
    h = 1e-6
    for share, slope in zip((path.alpha, path.sigma), path.velocity(t), strict=True):
        finite = (share(t + h) - share(t - h)) / (2 * h)
        np.testing.assert_allclose(slope.numpy(), finite.numpy(), rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_every_path_goes_from_the_image_to_noise(name):
    path = build_path(PathConfig(name=name))
    t = torch.linspace(0, path.t_max, 50, dtype=torch.float64)
    ratio = path.sigma(t) / path.alpha(t).clamp(min=1e-12)
    assert (ratio.diff() > 0).all()
    assert float(path.sigma(t[:1])) < 2e-3


def test_a_shift_of_0_3_visits_the_noise_levels_of_ssimbads_phi():
    path = build_path(PathConfig(name="flow", shift=0.3))
    t = torch.linspace(0, 0.99, 30, dtype=torch.float64)
    # phi maps their sigma = 0.3 * sigma_flow / alpha_flow to the uniform time.
    sigma = path.sigma(t) / path.alpha(t)
    np.testing.assert_allclose((sigma / (sigma + 0.3)).numpy(), t.numpy(), atol=1e-12)


def test_a_path_up_to_sigma_80_ends_there_and_starts_as_edm_does():
    path = build_path(PathConfig(name="flow", shift=0.3, sigma_max=80.0))
    end = torch.tensor(path.t_max, dtype=torch.float64)
    assert float(path.sigma(end) / path.alpha(end)) == pytest.approx(80)
    assert path.t_max == pytest.approx(80 / 80.3)
    # EDM's x = 80 eps is this path's x times 1 + sigma.
    assert float(81 * path.start(torch.tensor(1.0, dtype=torch.float64))) == pytest.approx(80)


def test_the_other_paths_start_in_noise_as_it_is():
    noise = torch.randn(2, 3, 4, 4)
    for name in NAMES:
        assert torch.equal(build_path(PathConfig(name=name)).start(noise), noise)


def test_a_stretched_table_ends_in_pure_noise_and_begins_as_before():
    plain, stretched = (build_path(PathConfig(name="linear", zero_terminal=value)) for value in (False, True))
    t = torch.arange(1000, dtype=torch.float64) / 1000
    before, after = plain.alpha(t), stretched.alpha(t)
    assert float(after[-1]) == 0
    assert float(after[0]) == pytest.approx(float(before[0]), abs=1e-12)
    # Lin et al. 2024: one straight line maps the old shares to the new.
    slope = (after[0] - after[-1]) / (before[0] - before[-1])
    np.testing.assert_allclose(after.numpy(), (slope * (before - before[-1])).numpy(), atol=1e-12)
    assert all(torch.isfinite(part).all() for part in stretched.velocity(t))


def test_noise_is_added_with_each_rows_own_time():
    path = build_path(PathConfig(name="flow"))
    image, noise = torch.full((3, 3, 2, 2), 1.0), torch.full((3, 3, 2, 2), -1.0)
    mixed = path.add_noise(image, noise, torch.tensor([0.0, 0.25, 1.0]))
    assert mixed[:, 0, 0, 0].tolist() == [1.0, 0.5, -1.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "circle"}, "linear, cosine or flow"),
        ({"shift": 0.0}, "above 0"),
        ({"num_train_timesteps": 1}, "at least 2"),
        ({"num_train_timesteps": 5}, "within"),
        ({"beta_start": 0.02}, "within"),
        ({"sigma_max": 0.0}, "sigma_max must be above 0"),
        ({"name": "cosine", "sigma_max": 80.0}, "on path flow, got 80.0 on 'cosine'"),
        ({"zero_terminal": True}, "zero_terminal is for path linear, got 'flow'"),
    ],
)
def test_an_impossible_path_raises_value_error(values, message):
    with pytest.raises(ValueError, match=message):
        PathConfig(**values)


def test_the_table_is_copied_to_a_device_once_and_serves_training_after_sampling():
    path, t = build_path(PathConfig(name="linear")), torch.full((2,), 0.3)
    with torch.inference_mode():
        sampled = path.alpha(t)
    path.table = torch.zeros_like(path.table)  # From now on, only the copy has the entries.
    scale = torch.ones(2, requires_grad=True)
    (path.alpha(t) * scale).sum().backward()
    assert torch.equal(scale.grad, sampled)
