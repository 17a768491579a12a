import weakref
from dataclasses import replace

import pytest
import torch

from animediffusion.models.bundle import SamplerDefaults
from animediffusion.models.colorize import sample_images
from animediffusion.models.diffusion.denoiser import Denoiser
from animediffusion.models.diffusion.path import PathConfig
from animediffusion.models.training.objective import (
    DenoisingConfig,
    DenoisingObjective,
    ObjectiveConfig,
    ReconstructionConfig,
    ReconstructionObjective,
    contrast_loss,
    structure_loss,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gradients(module, loss):
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def reconstruction(denoiser, steps=4, name="euler", **values):
    config = ReconstructionConfig(**values)
    return ReconstructionObjective(denoiser, config, SamplerDefaults(name=name, steps=steps), DenoisingConfig(), 0)


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_the_loss_of_phase_1_is_the_squared_error_of_what_the_network_should_return(
    new_denoiser, new_batch, prediction
):
    denoiser, batch = new_denoiser(prediction=prediction), new_batch(8)
    config = DenoisingConfig(time_mean=0.5, time_std=1.1, drop_reference=0.5)
    loss = DenoisingObjective(denoiser, config)(batch, seeded())
    generator = seeded()
    t = torch.sigmoid(0.5 + 1.1 * torch.randn(8, generator=generator))
    noise = torch.randn(8, 3, 16, 16, generator=generator)
    keep = torch.rand(8, generator=generator) >= 0.5
    x_t = (1 - t)[:, None, None, None] * batch.target + t[:, None, None, None] * noise
    condition = denoiser.encode(batch.sketch, batch.reference, keep)
    output = denoiser.network.denoise(x_t, t, condition)
    each = (output - (batch.target if prediction == "x0" else noise - batch.target)).square().mean((1, 2, 3))
    guess = (condition.guess - batch.target).square().mean()
    torch.testing.assert_close(loss.total, each.mean() + 0.5 * guess)
    assert 0 < int(keep.sum()) < 8
    assert float(loss.bins.sum()) == pytest.approx(each.sum().item(), rel=1e-4)
    expected = torch.zeros(8)
    for level in t:
        expected[int(level * 8)] += 1
    assert torch.equal(loss.counts, expected)


def test_min_snr_gives_almost_pure_noise_almost_no_weight(new_denoiser, new_batch):
    denoiser, batch = new_denoiser(), new_batch(8)

    def loss(weight, mean):
        config = DenoisingConfig(time_mean=mean, time_std=0.0, loss_weight=weight, guess_weight=0.0)
        return float(DenoisingObjective(denoiser, config)(batch, seeded()).total.detach())

    assert loss("min_snr", 5.0) < 1e-3 * loss("flat", 5.0)
    assert loss("min_snr", -5.0) == pytest.approx(5 * loss("flat", -5.0))
    with pytest.raises(ValueError, match="flat or min_snr"):
        DenoisingConfig(loss_weight="snr")


def test_uniform_times_reach_the_end_of_the_path_and_no_further(new_denoiser, new_batch):
    denoiser = new_denoiser(path="linear", prediction="eps")
    objective = DenoisingObjective(denoiser, DenoisingConfig(time_distribution="uniform"))
    times = denoiser.path.t_max * objective.draw_times(4000, torch.device("cpu"), seeded())
    assert 0 <= float(times.min()) < 0.01
    assert 0.98 < float(times.max()) <= 0.999
    assert torch.isfinite(objective(new_batch(), seeded()).total)


def test_the_smallest_time_can_be_set(new_denoiser, new_batch):
    objective = DenoisingObjective(new_denoiser(), DenoisingConfig(time_distribution="uniform", time_min=0.4))
    loss = objective(new_batch(64), seeded())
    assert loss.counts.tolist()[:3] == [0, 0, 0]
    assert (loss.counts[3:] > 0).all()


def test_huber_gives_far_off_pixels_less_weight(new_denoiser, new_batch):
    denoiser, batch = new_denoiser(), new_batch()
    far = batch._replace(target=batch.target + 100)
    losses = [
        DenoisingObjective(denoiser, DenoisingConfig(loss=name, guess_weight=0))(far, seeded()).total.item()
        for name in ("mse", "huber")
    ]
    # The output is near 0 and the target near 100: squared, and linear.
    assert losses[0] == pytest.approx(100**2, rel=0.05)
    assert losses[1] == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize(("share", "rows"), [(1.0, 4), (0.5, 2), (0.01, 1)])
def test_the_loss_of_phase_2_compares_what_deployment_would_sample_with_the_target(
    new_denoiser, new_batch, share, rows
):
    denoiser, batch = new_denoiser(), new_batch()
    weights = {"pixel_weight": 2.0, "structure_weight": 0.5, "denoising_weight": 0.25}
    objective = reconstruction(denoiser, **weights, denoising_rows=share)
    total = objective(batch, seeded(), 3).total
    generator = seeded()
    noise = torch.randn(4, 3, 16, 16, generator=generator)
    image = sample_images(denoiser, batch.sketch, batch.reference, noise, SamplerDefaults(steps=4))
    own = 2.0 * (image - batch.target).square().mean() + 0.5 * structure_loss(image, batch.target).mean()
    phase1 = objective.denoising(batch.rows(slice(rows)), generator).total
    torch.testing.assert_close(total, own + 0.25 * phase1)


def test_the_gradients_of_phase_2_are_those_of_its_two_parts(new_denoiser, new_batch):
    denoiser, batch = new_denoiser(), new_batch()
    objective = reconstruction(denoiser, steps=2, gradient_steps=1, pixel_weight=2.0, denoising_weight=0.25)
    found = gradients(denoiser, 3 * objective(batch, seeded(), 0).total)
    generator = seeded()
    image = objective.sample(batch, generator, 1)
    own = 2.0 * (image - batch.target).square().mean() + 0.2 * structure_loss(image, batch.target).mean()
    expected = gradients(denoiser, 3 * (own + 0.25 * objective.denoising(batch, generator).total))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_phase_2_keeps_one_pass_through_the_network_at_a_time(new_denoiser, new_batch):
    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor
            everything.add(self)

    everything, alive = weakref.WeakSet(), []
    objective = reconstruction(new_denoiser(), steps=3, gradient_steps=1)
    objective.denoising.register_forward_pre_hook(lambda *_: alive.append(len(everything)))
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        total = objective(new_batch(1), seeded(), 0).total
    assert alive == [0]
    assert len(everything) > 50
    total.backward()


def test_without_gradients_phase_2_is_a_number(new_denoiser, new_batch):
    with torch.no_grad():
        total = reconstruction(new_denoiser())(new_batch(1), seeded(), 0).total
    assert torch.isfinite(total)
    assert not total.requires_grad


def test_structure_is_blind_to_a_constant_and_sees_an_edge():
    target = torch.zeros(2, 3, 8, 8)
    image = target + torch.tensor([0.5, 0.0]).reshape(2, 1, 1, 1)
    image[1, :, :, 4:] = 1
    flat, edge = structure_loss(image, target).tolist()
    assert flat == 0
    assert edge == pytest.approx(1 / 7)


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("last", [1, 2])
def test_only_the_last_steps_of_the_sampler_are_differentiated(new_denoiser, new_batch, name, last):
    denoiser, batch = new_denoiser(), new_batch(1)
    objective = reconstruction(denoiser, steps=4, name=name)
    with_gradient, times = [], []

    def note(_module, arguments, _output):
        with_gradient.append(torch.is_grad_enabled())
        times.append(round(float(arguments[1]), 3))

    denoiser.register_forward_hook(note)
    image = objective.sample(batch, seeded(), last)
    # Steps begin at 1, 0.75, 0.5, 0.25; heun looks at the end of each step but the last, too.
    expected = {"heun": [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]}.get(name, [1.0, 0.75, 0.5, 0.25])
    differentiated = 2 * last - 1 if name == "heun" else last
    assert times == expected
    assert with_gradient == [False] * (len(expected) - differentiated) + [True] * differentiated
    assert image.requires_grad


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m"])
def test_checkpointing_changes_no_gradient(new_denoiser, new_batch, name):
    denoiser, batch = new_denoiser(), new_batch(2)
    objective = reconstruction(denoiser, steps=3, name=name)
    checked = gradients(denoiser, objective.sample(batch, seeded(), 3).square().mean())
    noise = torch.randn(2, 3, 16, 16, generator=seeded())
    plain_image = sample_images(denoiser, batch.sketch, batch.reference, noise, SamplerDefaults(name=name, steps=3))
    denoiser.zero_grad()
    plain_image.square().mean().backward()
    for key, parameter in denoiser.named_parameters():
        assert (key in checked) == (parameter.grad is not None)
        if key in checked:
            torch.testing.assert_close(checked[key], parameter.grad, rtol=1e-4, atol=1e-6)


def test_how_many_steps_are_differentiated_follows_from_seed_and_step(new_denoiser):
    one, two = (reconstruction(new_denoiser(), steps=4, gradient_steps=3) for _ in range(2))
    drawn = [one.num_gradient_steps(step) for step in range(60)]
    assert drawn == [two.num_gradient_steps(step) for step in range(60)]
    assert set(drawn) == {1, 2, 3}
    few = reconstruction(new_denoiser(), steps=1, gradient_steps=3)
    assert {few.num_gradient_steps(step) for step in range(10)} == {1}


@pytest.mark.parametrize("name", ["denoising", "reconstruction"])
def test_every_parameter_gets_a_gradient_in_every_step(new_denoiser, new_batch, name):
    denoiser, batch = new_denoiser(), new_batch(8)
    config = ObjectiveConfig(name=name, denoising=DenoisingConfig(drop_reference=0.5))
    objective = config.build(denoiser, SamplerDefaults(steps=2), 0)
    found = gradients(denoiser, objective(batch, seeded(), 0).total)
    assert set(found) == {name for name, _ in denoiser.named_parameters()}
    assert [key for key, gradient in found.items() if not torch.isfinite(gradient).all()] == []
    # A key's bias shifts all scores of a query alike: its gradient is zero by nature, so norms are not asked for.


def test_a_step_without_dropped_references_still_gives_the_null_a_gradient(new_denoiser, new_batch):
    denoiser = new_denoiser()
    objective = DenoisingObjective(denoiser, DenoisingConfig(drop_reference=0.0))
    found = gradients(denoiser, objective(new_batch(), seeded()).total)
    assert (found["network.null_reference"] == 0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DenoisingConfig(time_distribution="beta"), "logit_normal or uniform"),
        (lambda: DenoisingConfig(time_min=0.7), r"\[0, 0\.5\)"),
        (lambda: DenoisingConfig(loss="l1"), "mse or huber"),
        (lambda: DenoisingConfig(drop_reference=1.0), r"\[0, 1\)"),
        (lambda: ReconstructionConfig(gradient_steps=0), "at least 1"),
        (lambda: ReconstructionConfig(denoising_rows=0), r"\(0, 1\]"),
        (lambda: ObjectiveConfig(name="phase3"), "denoising or reconstruction"),
    ],
)
def test_impossible_objectives_raise_value_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_contrast_counts_detail_wherever_it_is_and_misses_what_was_blurred_away(new_batch):
    target = new_batch(4).target
    assert contrast_loss(target, target).abs().max() == 0
    assert (contrast_loss(target.roll(1, -1), target) < 0.5 * contrast_loss(target * 0.3, target)).all()
    flat = torch.full_like(target, 0.2)
    torch.testing.assert_close(contrast_loss(flat, -flat), torch.zeros(4))


def test_both_phases_train_hints_and_use_both_references(new_denoiser, new_batch):
    plain, batch, other = new_denoiser(), new_batch(), new_batch(seed=1)
    denoiser = Denoiser(replace(plain.network.config, hints=True), PathConfig(name="flow"))
    denoiser.start_from(plain.state_dict())
    hinted = batch._replace(second=other.reference, hints=torch.ones(4, 4, 16, 16))
    for objective in (DenoisingObjective(denoiser, DenoisingConfig()), reconstruction(denoiser)):
        loss = objective(hinted, seeded(), 0).total
        assert not torch.equal(loss, objective(batch, seeded(), 0).total)
        found = gradients(denoiser, loss)
        assert found["network.hint_input.weight"].any()
        assert found["network.matcher.hint_input.weight"].any()
