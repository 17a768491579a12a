import numpy as np
import pytest
import torch

from animediffusion.models.authors.warp import draw_points, warp_diagonal

SIDE = 32
BEFORE, AFTER = torch.tensor([[0.35, 0.6]]), torch.tensor([[0.5, 0.42]])


def ramps():
    """An image whose red is the column and whose green is the row, in pixels; its black is far below."""
    line = torch.linspace(0, 0.5, SIDE)
    return torch.stack([line.expand(SIDE, SIDE), line[:, None].expand(SIDE, SIDE), torch.zeros(SIDE, SIDE)])[None]


def test_pixels_are_read_where_a_thin_plate_spline_says():
    from scipy.interpolate import RBFInterpolator  # takes half a second, which each of the tests' processes would spend

    corners = [[0, 0], [1, 0], [1, 1], [0, 1]]
    centers = np.array([*corners, [0.5, 0.5], [0.42, 0.42]])
    source = np.array([*corners, [0.35, 0.35], [0.6, 0.6]])
    line = np.linspace(0, 1, SIDE)
    grid = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)
    read = RBFInterpolator(centers, source, kernel="thin_plate_spline", degree=1)(grid) * SIDE
    found = warp_diagonal(ramps(), BEFORE, AFTER)[0, :2].reshape(2, -1).T.double().numpy() * (SIDE - 1) / 0.5
    inside = ((read > 2) & (read < SIDE - 3)).all(1)
    assert inside.sum() > 300
    np.testing.assert_allclose(found[inside], read[inside], atol=0.1)


def test_points_that_stay_leave_the_image_but_for_a_pixel():
    image = ramps()
    moved = warp_diagonal(image, BEFORE, BEFORE)
    pixel = 0.5 / (SIDE - 1)
    assert float((moved - image)[..., 2:-2, 2:-2].abs().max()) < 1.2 * pixel
    assert (moved[..., -1] == -1).all()


def test_what_is_read_outside_is_black():
    moved = warp_diagonal(torch.ones(1, 3, SIDE, SIDE), torch.tensor([[0.3, 0.35]]), torch.tensor([[0.55, 0.6]]))
    assert float(moved.min()) == -1
    assert float(moved.max()) == 1


def test_points_lie_where_the_authors_draw_them_and_never_meet():
    before, after = draw_points(20_000, torch.Generator().manual_seed(0), torch.device("cpu"))
    away = after - before
    assert (float(before.min()), float(before.max())) == (0.3, 0.7)
    assert float(away.abs().max()) == pytest.approx(0.25)
    assert torch.equal((100 * before).round() / 100, before)
    assert (after[:, 0] != after[:, 1]).all()
    assert float(before.mean()) == pytest.approx(0.5, abs=0.005)
    assert float(away.mean()) == pytest.approx(0.0, abs=0.005)


def test_each_row_has_its_own_warp_and_a_seed_repeats_it():
    images = torch.rand(1, 3, SIDE, SIDE).expand(3, -1, -1, -1)
    drawn = (draw_points(3, torch.Generator().manual_seed(4), images.device) for _ in range(2))
    first, second = (warp_diagonal(images, *points) for points in drawn)
    assert torch.equal(first, second)
    assert not torch.allclose(first[0], first[1], atol=0.05)
    assert first.dtype == torch.float32
    assert float(first.min()) >= -1
    assert float(first.max()) <= 1
