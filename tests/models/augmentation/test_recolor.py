import colorsys
from itertools import permutations

import numpy as np
import pytest
import torch

from animediffusion.models.augmentation.recolor import (
    NUM_ORDERS,
    apply_gamma,
    apply_matrix,
    apply_regions,
    cluster_space,
    find_regions,
    hue_matrix,
    order_matrix,
)

FLAT = torch.tensor([[0.9, 0.2, 0.2], [0.2, 0.8, 0.3], [0.2, 0.3, 0.9], [0.95, 0.9, 0.85]])


def few_colors(size=16):
    """[1, 3, S, S] in [-1, 1]: four flat quarters."""
    half = size // 2
    index = torch.arange(4).reshape(2, 2).repeat_interleave(half, 0).repeat_interleave(half, 1)
    return FLAT[index].permute(2, 0, 1)[None] * 2 - 1


def noise(rows=3, size=12):
    return torch.rand(rows, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def column(value):
    return torch.full((1,), value)


def test_a_hue_rotation_of_120_degrees_permutes_the_channels():
    turned = apply_matrix(few_colors(), hue_matrix(column(2 * torch.pi / 3), column(1.0), column(1.0)))
    torch.testing.assert_close(turned, few_colors()[:, [2, 0, 1]], rtol=0, atol=1e-5)


def test_a_hue_rotation_agrees_with_colorsys():
    matrix = hue_matrix(column(np.pi), column(1.0), column(1.0))
    color = torch.tensor([0.6, 0.45, 0.45])
    hue = colorsys.rgb_to_hsv(*(matrix[0] @ color).tolist())[0]
    assert hue == pytest.approx(0.5, abs=1e-5)


def test_saturation_zero_is_gray_and_gain_is_brightness():
    gray = apply_matrix(noise(1), hue_matrix(column(0.3), column(0.0), column(0.5)))
    expected = (noise(1) + 1).mean(1, keepdim=True) / 2 * 0.5 * 2 - 1
    torch.testing.assert_close(gray, expected.expand_as(gray))


@pytest.mark.parametrize("order", range(NUM_ORDERS))
def test_an_order_of_channels_is_one_of_the_six(order):
    changed = apply_matrix(noise(1), order_matrix(torch.tensor([order])))
    torch.testing.assert_close(changed, noise(1)[:, list(list(permutations(range(3)))[order])])


def test_gamma_is_numpys_power_per_channel():
    gamma = torch.tensor([[0.5, 1.0, 2.0]]).expand(3, -1)
    expected = ((noise().numpy() + 1) / 2) ** np.array([0.5, 1.0, 2.0]).reshape(1, 3, 1, 1)
    np.testing.assert_allclose((apply_gamma(noise(), gamma).numpy() + 1) / 2, expected, atol=1e-6)


def test_regions_of_flat_areas_are_their_colors():
    centers = find_regions(few_colors(), 4)
    distance = torch.cdist(cluster_space(FLAT)[None], centers)[0]
    assert distance.argmin(1).unique().numel() == 4
    assert distance.amin(1).max() < 1e-4


def test_each_region_is_changed_by_its_own_map():
    centers = find_regions(few_colors(), 4)
    gains = torch.tensor([0.25, 0.5, 0.75, 1.0])
    matrices = (gains[:, None, None] * torch.eye(3))[None]
    nearest = torch.cdist(cluster_space(FLAT)[None], centers)[0].argmin(1)
    expected = (
        few_colors().add(1).mul(gains[nearest].reshape(1, 1, 2, 2).repeat_interleave(8, 2).repeat_interleave(8, 3))
    )
    torch.testing.assert_close(apply_regions(few_colors(), centers, matrices), expected - 1, rtol=0, atol=1e-3)


def test_regions_are_changed_by_color_alone():
    matrices = hue_matrix(torch.linspace(-3, 3, 15), torch.ones(15), torch.ones(15)).reshape(3, 5, 3, 3)
    centers = find_regions(noise(), 5)
    mixed = torch.randperm(144, generator=torch.Generator().manual_seed(1))
    changed = apply_regions(noise(), centers, matrices).flatten(2)[..., mixed]
    torch.testing.assert_close(apply_regions(noise().flatten(2)[..., mixed, None], centers, matrices)[..., 0], changed)


def test_maps_that_change_nothing_leave_the_image():
    unchanged = torch.eye(3).expand(3, 5, 3, 3)
    torch.testing.assert_close(apply_regions(noise(), find_regions(noise(), 5), unchanged), noise())


def test_a_flat_picture_has_regions_too():
    centers = find_regions(torch.zeros(2, 3, 8, 8), 5)
    assert torch.isfinite(centers).all()
