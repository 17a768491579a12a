from dataclasses import replace

import pytest
import torch

from animediffusion.models.diffusion.denoiser import Denoiser
from animediffusion.models.diffusion.path import PathConfig
from animediffusion.models.network.condition import cat_conditions, join_references, select
from animediffusion.models.network.unet import UNet, UNetConfig


def test_the_default_network_has_the_authors_52_3_million_parameters():
    with torch.device("meta"):
        network = UNet(UNetConfig())
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(52.30, abs=0.01)


def test_the_default_network_colors_an_image():
    network = UNet(UNetConfig(base_channels=32, head_channels=32)).eval()
    with torch.no_grad():
        condition = network.encode(torch.zeros(1, 1, 16, 24), torch.zeros(1, 3, 16, 24))
        output = network.denoise(torch.zeros(1, 3, 16, 24), torch.zeros(1), condition)
    assert output.shape == (1, 3, 16, 24)
    assert condition.tokens.shape == (1, 0, 0)


def test_a_condition_holds_tokens_of_the_reference_and_rows_can_be_picked(new_denoiser, new_batch):
    denoiser, batch = new_denoiser(), new_batch(3)
    condition = denoiser.encode(batch.sketch, batch.reference)
    assert condition.features.shape == (3, 32, 8, 8)
    assert condition.tokens.shape == (3, 16, 32)
    again = cat_conditions([select(condition, slice(0, 1)), select(condition, torch.tensor([1, 2]))])
    assert all(torch.equal(a, b) for a, b in zip(condition, again, strict=True))


def test_a_reference_can_be_encoded_once_for_many_sketches(new_denoiser, new_batch):
    denoiser, batch = new_denoiser(), new_batch(3)
    reference, keep = batch.reference[:1].expand(3, -1, -1, -1), torch.tensor([True, True, False])
    once = denoiser.encode_reference(batch.reference[:1].expand(2, -1, -1, -1), torch.tensor([True, False]))
    combined = denoiser.combine(batch.sketch, select(once, torch.tensor([0, 0, 1])))
    for part, expected in zip(combined, denoiser.encode(batch.sketch, reference, keep), strict=True):
        torch.testing.assert_close(part, expected)


def test_reference_and_sketch_and_time_all_matter(new_denoiser, new_batch):
    denoiser, a, b = new_denoiser(), new_batch(1), new_batch(1, seed=1)
    t = torch.tensor([0.5])
    with torch.no_grad():
        first = denoiser(a.target, t, denoiser.encode(a.sketch, a.reference))
        for sketch, reference, time in (
            (b.sketch, a.reference, t),
            (a.sketch, b.reference, t),
            (a.sketch, a.reference, t / 2),
        ):
            assert not torch.allclose(first, denoiser(a.target, time, denoiser.encode(sketch, reference)), atol=1e-4)


def test_a_dropped_reference_leaves_no_trace_and_trains_the_null(new_denoiser, new_batch):
    denoiser, a, b = new_denoiser(), new_batch(2), new_batch(2, seed=1)
    keep, t = torch.tensor([True, False]), torch.tensor([0.5, 0.5])
    outputs = [
        denoiser(a.target, t, denoiser.encode(a.sketch, reference, keep)) for reference in (a.reference, b.reference)
    ]
    assert not torch.allclose(outputs[0][0], outputs[1][0], atol=1e-4)
    torch.testing.assert_close(outputs[0][1], outputs[1][1])
    outputs[0][1].sum().backward()
    assert denoiser.network.null_reference.grad.abs().sum() > 0


def test_sides_that_do_not_fit_raise_value_error(new_denoiser):
    with pytest.raises(ValueError, match="multiples of 4, got 18x16"):
        new_denoiser().encode(torch.zeros(1, 1, 16, 18), torch.zeros(1, 3, 16, 18))


@pytest.mark.parametrize(
    ("values", "multiple"),
    [
        ({}, 8),
        ({"patch_size": 4, "channel_multipliers": (1, 2)}, 8),
        ({"channel_multipliers": (4,), "reference_channels": 32}, 4),
        ({"channel_multipliers": (4,), "reference_channels": 0}, 1),
        ({"patch_size": 3, "channel_multipliers": (4,), "reference_channels": 32}, 12),
    ],
)
def test_sides_are_multiples_of_patches_and_levels_and_reference_tokens(values, multiple):
    assert UNetConfig(**values).size_multiple == multiple


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base_channels": 33}, "multiple of 32, got 33"),
        ({"base_channels": 0}, "at least 1, got 0"),
        ({"head_channels": 0}, "at least 1, got 0"),
        ({"head_channels": 100}, "must divide 512"),
        ({"patch_size": 0}, "at least 1"),
        ({"num_res_blocks": 0}, "at least 1"),
        ({"io_kernel_size": 2}, "odd, got 2"),
        ({"reference_channels": 16}, "multiple of 32, got 16"),
        ({"channel_multipliers": ()}, "positive"),
        ({"attention_levels": (4,)}, "below 4"),
    ],
)
def test_impossible_sizes_raise_value_error(values, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig(**values)


def hinted(network, weights=None):
    """The network of the fixtures with inputs for hints, optionally with the weights of one without."""
    torch.manual_seed(0)
    made = Denoiser(replace(network, hints=True), PathConfig(name="flow"))
    if weights is not None:
        made.start_from(weights)
    return made


def test_a_network_with_hints_starts_as_the_one_without(network, new_denoiser, new_batch):
    plain, batch = new_denoiser(), new_batch()
    denoiser = hinted(network, plain.state_dict())
    hints = torch.ones(4, 4, 16, 16)
    for one in (None, hints):
        for part, expected in zip(
            denoiser.encode(batch.sketch, batch.reference, hints=one),
            plain.encode(batch.sketch, batch.reference),
            strict=True,
        ):
            assert torch.equal(part, expected)


def test_inputs_for_hints_leave_the_random_initial_weights_alone(network):
    torch.manual_seed(0)
    plain = Denoiser(network, PathConfig(name="flow")).state_dict()
    assert all(torch.equal(tensor, hinted(network).state_dict()[name]) for name, tensor in plain.items())


def test_other_missing_weights_are_not_ignored(network, new_denoiser):
    weights = dict(new_denoiser().state_dict())
    del weights["network.input.bias"]
    with pytest.raises(RuntimeError, match=r"network\.input\.bias"):
        hinted(network, weights)


def test_trained_hints_reach_features_and_matcher_and_every_weight_gets_a_gradient(network, new_batch):
    denoiser, batch = hinted(network), new_batch()
    condition = denoiser.encode(batch.sketch, batch.reference)
    (condition.features.sum() + condition.guess.sum()).backward()
    found = {name: p.grad for name, p in denoiser.named_parameters() if "hint_input" in name}
    assert sorted(found) == ["network.hint_input.weight", "network.matcher.hint_input.weight"]
    assert all(gradient is not None for gradient in found.values())
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if "hint_input" in name:
                parameter.fill_(0.1)
    changed = denoiser.encode(batch.sketch, batch.reference, hints=torch.ones(4, 4, 16, 16))
    assert not torch.equal(condition.features, changed.features)
    assert not torch.equal(condition.guess, changed.guess)


def test_a_network_without_hints_ignores_them(new_denoiser, new_batch):
    denoiser, batch = new_denoiser(), new_batch()
    hints = torch.ones(4, 4, 16, 16)
    with_hints = denoiser.encode(batch.sketch, batch.reference, hints=hints)
    assert torch.equal(with_hints.features, denoiser.encode(batch.sketch, batch.reference).features)


def test_several_references_are_one_with_the_tokens_of_all_and_the_picture_of_the_first(new_denoiser, new_batch):
    denoiser, a, b = new_denoiser(), new_batch(), new_batch(seed=1)
    keep = torch.ones(4, dtype=torch.bool)
    one, two = (denoiser.encode_reference(batch.reference, keep) for batch in (a, b))
    joined = join_references([one, two])
    assert torch.equal(joined.picture, a.reference)
    assert torch.equal(joined.tokens, torch.cat([one.tokens, two.tokens], 1))
    torch.testing.assert_close(joined.palette, (one.palette + two.palette) / 2)
    condition = denoiser.encode(a.sketch, [a.reference, b.reference])
    assert torch.equal(condition.features, denoiser.combine(a.sketch, joined).features)
    assert not torch.equal(condition.features, denoiser.encode(a.sketch, a.reference).features)


def test_the_matcher_finds_the_same_in_a_reference_that_is_given_twice(new_denoiser, new_batch):
    denoiser, batch = new_denoiser(), new_batch()
    once, twice = (denoiser.encode(batch.sketch, [batch.reference] * count) for count in (1, 2))
    torch.testing.assert_close(once.features, twice.features, rtol=1e-4, atol=1e-5)
