import itertools

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from animediffusion.models.augmentation.lineart import STYLES, Pens, XDoGConfig, blur, line_art, xdog


def smooth_image(seed=0, size=40):
    """[3, S, S] in [-1, 1] with soft areas, so that both sides of the threshold appear."""
    noise = np.random.default_rng(seed).standard_normal((3, size, size))
    areas = np.stack([gaussian_filter(channel, 3) for channel in noise])
    return np.clip(areas / np.abs(areas).max() * 1.3, -1, 1)


def pens(*styles, sigma=0.4, k=3.5, p=10.0, width=0.65):
    """One row per style, all with the same constants."""
    constants = [torch.full((len(styles),), value) for value in (sigma, k, p, width)]
    return Pens(torch.tensor([STYLES.index(style) for style in styles]), *constants)


def drawn(style, image, **constants):
    """[H, W] in 0..1, 1 is paper."""
    return (line_art(image[None], pens(style, **constants))[0, 0] + 1) / 2


def areas(size=64):
    """[3, S, S]: a bright disk with a dark ring in it, on gray, as after a resize."""
    line = torch.linspace(-1, 1, size)
    radius = (line[:, None] ** 2 + line**2).sqrt()
    image = torch.where(radius < 0.7, 0.6, -0.1)
    image = torch.where((radius - 0.4).abs() < 0.05, -0.8, image)
    return blur(image.expand(1, 3, -1, -1).contiguous(), torch.tensor([0.6]))[0]


def scipy_blur(image, sigma, radius):
    return gaussian_filter(image, sigma, mode="mirror", radius=radius)


def test_blur_is_scipys_gaussian_filter_with_three_sigmas():
    image = smooth_image()[0]
    ours = blur(torch.from_numpy(image)[None, None], torch.tensor([1.2], dtype=torch.float64))
    # truncate=3 rounds 3 sigma = 3.6 up to 4, as we always do.
    np.testing.assert_allclose(ours[0, 0].numpy(), gaussian_filter(image, 1.2, mode="mirror", truncate=3), atol=1e-12)


def test_each_row_is_blurred_by_its_own_sigma():
    images = torch.from_numpy(np.stack([smooth_image(i) for i in range(2)]))
    sigmas = torch.tensor([0.5, 1.5], dtype=torch.float64)
    both = blur(images, sigmas)
    for row in range(2):
        expected = [scipy_blur(channel, float(sigmas[row]), 5) for channel in images[row].numpy()]
        np.testing.assert_allclose(both[row].numpy(), np.stack(expected), atol=1e-12)


@pytest.mark.parametrize("phi", [1e9, 5.0])
def test_line_art_is_the_papers_formula(phi):
    image, sigma, config = smooth_image(), 0.9, XDoGConfig(phi=phi, epsilon=0.2)
    gray = np.tensordot([0.299, 0.587, 0.114], (image + 1) / 2, 1)
    small, large = scipy_blur(gray, sigma, 3), scipy_blur(gray, config.k * sigma, 10)
    response = gray * ((1 + config.p) * small - config.p * large)
    expected = np.where(response >= config.epsilon, 1, 1 + np.tanh(phi * (response - config.epsilon)))
    ours = xdog(torch.from_numpy(image)[None], torch.tensor([sigma], dtype=torch.float64), config)
    clear = np.abs(response - config.epsilon) > 1e-6
    np.testing.assert_allclose(ours[0, 0].numpy()[clear], (2 * expected - 1)[clear], atol=1e-6)
    assert float(ours.min()) < 0 < float(ours.max()) == 1


def test_a_flat_picture_has_no_lines_and_an_edge_has_one():
    flat = torch.zeros(1, 3, 16, 16)
    edge = flat.clone()
    edge[..., 8:] = 1
    sigma = torch.tensor([0.4])
    assert (xdog(flat, sigma) == 1).all()
    assert (xdog(edge, sigma)[0, 0, :, 7] == -1).all()
    assert (xdog(edge, sigma)[0, 0, :, :4] == 1).all()


def test_blurs_without_width_raise_value_error():
    with pytest.raises(ValueError, match="above 0"):
        XDoGConfig(sigma=(0.0, 0.5))


def test_the_plain_style_is_xdog():
    images = torch.from_numpy(np.stack([smooth_image(i) for i in range(3)])).float()
    sigma, config = torch.tensor([0.3, 0.4, 0.5]), XDoGConfig(k=3.0, p=12.0, epsilon=0.2)
    plain = pens("xdog", "xdog", "xdog", k=3.0, p=12.0)._replace(sigma=sigma)
    assert torch.equal(line_art(images, plain, config), xdog(images, sigma, config))


def test_each_row_is_drawn_in_its_own_style():
    # In double precision and without symmetry: two pixels of the same height are one line or two by the last bit.
    image = torch.from_numpy(smooth_image())
    together = (line_art(image.expand(len(STYLES), -1, -1, -1), pens(*STYLES))[:, 0] + 1) / 2
    alone = torch.stack([drawn(style, image) for style in STYLES])
    torch.testing.assert_close(together, alone)
    assert all((one - other).abs().max() > 0.5 for one, other in itertools.combinations(alone, 2))


@pytest.mark.parametrize("style", STYLES)
def test_every_style_leaves_paper_white_and_draws_an_edge(style):
    flat = torch.zeros(3, 32, 32)
    edge = flat.clone()
    edge[..., 16:] = 1
    assert (drawn(style, flat) > 0.999).all()
    lines = drawn(style, edge)
    assert lines[:, 13:19].amin(1).max() < 0.7
    assert (lines[:, :8] > 0.999).all()
    assert lines.min() > -1e-6
    assert lines.max() < 1 + 1e-6  # a blur of paper alone adds up to one but for rounding


@pytest.mark.parametrize("size", [64, 256])
def test_thin_lines_lie_within_the_black_ones_and_those_within_the_thick_ones(size):
    thin, black, thick = (drawn(style, areas(size)) < 0.5 for style in ("thin", "binarized", "thick"))
    assert (thin <= black).all()
    assert (black <= thick).all()
    assert thin.sum() < 0.8 * black.sum() < 0.8 * thick.sum()


def test_a_line_of_two_pixels_has_one_when_thin_and_three_when_thick():
    stripe = torch.full((3, 64, 64), 0.8)
    stripe[..., 30:32] = torch.linspace(-0.7, -0.5, 64)[:, None]  # fading: no rounding makes a ridge across the line
    widths = [int((drawn(style, stripe)[32] < 0.5).sum()) for style in ("thin", "binarized", "thick")]
    assert widths == [1, 2, 3]


def test_dark_areas_are_filled_by_xdog_and_left_empty_by_black_lines():
    dark = torch.full((3, 64, 64), 0.8)
    dark[:, 16:48, 16:48] = -0.995
    assert drawn("xdog", dark)[32, 32] == 0
    assert drawn("binarized", dark)[32, 32] == 1


def test_blurred_lines_are_scipys_blur_of_xdog():
    expected = gaussian_filter(drawn("xdog", areas()).numpy(), 0.65, mode="mirror", radius=2)
    np.testing.assert_allclose(drawn("blurred", areas(), width=0.65).numpy(), expected, atol=1e-5)


def test_a_pencil_draws_a_strong_edge_darker_than_a_weak_one():
    weak, strong = torch.full((3, 32, 32), 0.5), torch.full((3, 32, 32), 0.5)
    weak[..., 16:], strong[..., 16:] = 0.4, 0.0
    darkest = [float(drawn("pencil", image).min()) for image in (weak, strong)]
    assert 1 > darkest[0] > darkest[1] > 0
