from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from animediffusion.models.bundle import (
    AVERAGES,
    BundleConfig,
    SamplerDefaults,
    load_bundle,
    save_bundle,
    verify,
    with_metrics,
    with_sampler,
)
from animediffusion.models.training.ema import LONGEST, exponent, mix, pack, read_averages
from animediffusion.models.training.loop import OptimizerConfig, TrainState, averaged_weights, kept_averages
from animediffusion.platform.errors import BundleError

TIMES = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
OWN = SamplerDefaults(steps=2)
LENGTHS = (0.04, 0.08, 0.16)


def profile(length):
    """The weight of each time in an average of this length."""
    power = exponent(length)
    return (power + 1) * TIMES**power


def deviation(weight):
    """The standard deviation of a profile."""
    mean = (weight * TIMES).mean()
    return ((weight * (TIMES - mean) ** 2).mean() ** 0.5).item()


@pytest.mark.parametrize(("length", "expected"), [(0.05, 16.97), (0.10, 6.94)])
def test_the_exponents_are_those_of_the_paper(length, expected):
    assert exponent(length) == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("length", [0.001, 0.03, 0.15, LONGEST])
def test_a_length_is_the_standard_deviation_of_its_profile(length):
    weight = profile(length)
    assert weight.mean() == pytest.approx(1, rel=1e-3)
    assert deviation(weight) == pytest.approx(length, rel=1e-3)


@pytest.mark.parametrize("length", [0, -0.1, 0.3])
def test_a_length_that_no_average_has_raises_value_error(length):
    with pytest.raises(ValueError, match=r"above 0 and at most 0\.28"):
        OptimizerConfig(ema_lengths=(length,))
    with pytest.raises(ValueError, match="must differ"):
        OptimizerConfig(ema_lengths=(0.05, 0.05))


@pytest.mark.parametrize("kept", [LENGTHS, (0.16, 0.04)])
@pytest.mark.parametrize("length", [0.04, 0.05, 0.07, 0.1, 0.12, 0.159, 0.16])
def test_a_mix_has_the_desired_length_and_does_not_change_constant_weights(kept, length):
    parts = mix(kept, length)
    assert sum(parts) == pytest.approx(1)
    assert min(parts) >= -1e-9
    mixed = sum(part * profile(one) for part, one in zip(parts, kept, strict=True))
    assert deviation(mixed) == pytest.approx(length, rel=1e-3)


def test_a_mix_of_what_is_kept_is_that():
    assert mix((0.04, 0.08, 0.16), 0.08) == pytest.approx([0, 1, 0], abs=1e-9)
    assert mix((0.1,), 0.1) == [1]
    for length in (0.039, 0.17):
        with pytest.raises(ValueError, match=r"in 0\.04 to 0\.16"):
            mix((0.04, 0.08, 0.16), length)


def walk(new_denoiser, steps, **values):
    """A state after random steps, and its weights after each of them."""
    state = TrainState(new_denoiser(), OptimizerConfig(learning_rate=1e-2, **values), steps)
    generator, path = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        for parameter in state.parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        state.apply_gradients()
        path.append(state.parameters[0].detach().clone())
    return state, torch.stack(path)


def test_a_kept_average_weighs_each_step_by_its_profile(new_denoiser):
    state, path = walk(new_denoiser, 50, ema_lengths=(0.05, 0.2))
    steps = torch.arange(51, dtype=torch.float64) / 50
    for length, kept in state.kept.items():
        shares = (steps ** (exponent(length) + 1)).diff()  # the profile's integral over each step
        expected = torch.einsum("s,s...->...", shares, path.double())
        torch.testing.assert_close(kept[0].double(), expected, rtol=1e-4, atol=1e-6)


def test_a_length_mixed_after_the_run_is_nearly_that_kept_in_it(new_denoiser):
    state, _ = walk(new_denoiser, 100, ema_lengths=(*LENGTHS, 0.06, 0.12))
    kept = {length: torch.cat([p.flatten() for p in average]) for length, average in state.kept.items()}
    for length in (0.06, 0.12):
        mixed = sum(part * kept[one] for part, one in zip(mix(LENGTHS, length), LENGTHS, strict=True))
        nearest = min((kept[one] - kept[length]).norm() for one in LENGTHS)
        assert (mixed - kept[length]).norm() < 0.6 * nearest


def test_a_run_without_kept_averages_saves_none(new_denoiser, tmp_path):
    state, _ = walk(new_denoiser, 2)
    state.save(tmp_path)
    assert not any(name.startswith("average_") for name in load_file(tmp_path / "state.safetensors"))
    with pytest.raises(ValueError, match=r"no average of length 0\.04"):
        TrainState(new_denoiser(), OptimizerConfig(ema_lengths=LENGTHS), 2).restore(tmp_path)


@pytest.fixture
def folder(new_denoiser, network, tmp_path):
    """A bundle as a run writes it."""
    state, _ = walk(new_denoiser, 5, ema_lengths=LENGTHS)
    state.save(tmp_path / "state")
    config = BundleConfig(network=network, image_size=16, sampler=OWN, provenance={"run": "first"})
    denoiser = config.build()
    denoiser.load_state_dict(averaged_weights(tmp_path / "state"))
    kept = kept_averages(tmp_path / "state", state.config.ema_lengths)
    save_bundle(tmp_path / "bundle", denoiser, config, {"psnr": 20.5}, "# card\n", averages=pack(kept))
    for length, average in state.kept.items():
        assert all(torch.equal(kept[length][name], value) for name, value in zip(state.names, average, strict=True))
    return tmp_path / "bundle"


def weights(folder):
    return load_file(folder / "model.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_bundle_of_another_average_knows_the_others_still(folder, tmp_path):
    bundle = load_bundle(folder)
    averages = read_averages(bundle)
    assert (averages.range, averages.length) == ((0.04, 0.16), None)
    other, sampler = tmp_path / "other", SamplerDefaults(steps=3)
    sha256 = averages.save(bundle, other, 0.07, sampler)
    again = load_bundle(other)
    assert again.sha256 == sha256 != bundle.sha256
    assert again.config == replace(bundle.config, sampler=sampler, provenance={"run": "first", "ema_length": 0.07})
    assert (again.metrics, (other / "card.md").read_text()) == ({}, "# card\n")
    assert equal(weights(other), averages.weights(0.07))
    assert not equal(weights(other), weights(folder))
    found = read_averages(again)
    assert (found.length, found.sha256()) == (0.07, averages.sha256())

    back = tmp_path / "back"
    found.save(again, back, None, OWN)
    assert load_bundle(back).sha256 == bundle.sha256
    assert (back / AVERAGES).read_bytes() == (folder / AVERAGES).read_bytes()


def test_a_bundle_is_given_other_weights_and_its_own_again(folder):
    bundle = load_bundle(folder)
    averages = read_averages(bundle)
    assert equal(averages.use(bundle, 0.08).denoiser.state_dict(), averages.kept[0.08])
    assert read_averages(bundle).sha256() == averages.sha256()
    assert equal(averages.use(bundle, None).denoiser.state_dict(), weights(folder))


def test_what_only_colors_needs_no_averages(folder, tmp_path):
    sha256 = load_bundle(folder).sha256
    (folder / AVERAGES).unlink()
    bundle = load_bundle(folder)
    averages = read_averages(bundle)
    assert (bundle.sha256, averages.range, averages.length) == (sha256, None, None)
    assert equal(averages.weights(None), weights(folder))


def test_averages_are_sealed_like_the_rest_and_go_along_with_a_copy(folder, tmp_path):
    with_sampler(folder, tmp_path / "copy", SamplerDefaults(steps=3))
    assert read_averages(load_bundle(tmp_path / "copy")).sha256() == read_averages(load_bundle(folder)).sha256()
    data = bytearray((folder / AVERAGES).read_bytes())
    data[-1] ^= 1
    (folder / AVERAGES).write_bytes(data)
    with pytest.raises(BundleError, match=r"averages\.safetensors was changed"):
        verify(folder)


@pytest.mark.parametrize("tensors", [{"0.05/other": torch.zeros(2)}, {"long/x": torch.zeros(2)}])
def test_averages_of_another_model_raise_bundle_error(folder, tensors):
    save_file(tensors, folder / AVERAGES)
    with_metrics(folder, {})  # seals the folder as it is now
    with pytest.raises(BundleError, match=r"averages\.safetensors does not fit the model"):
        read_averages(load_bundle(folder))
