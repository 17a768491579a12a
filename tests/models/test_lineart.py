import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from animediffusion.models.lineart import XDoGConfig, blur, xdog


def smooth_image(seed=0, size=40):
    """[3, S, S] in [-1, 1] with soft areas, so that both sides of the threshold appear."""
    noise = np.random.default_rng(seed).standard_normal((3, size, size))
    areas = np.stack([gaussian_filter(channel, 3) for channel in noise])
    return np.clip(areas / np.abs(areas).max() * 1.3, -1, 1)


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


def test_blurs_without_width_are_refused():
    with pytest.raises(ValueError, match="above 0"):
        XDoGConfig(sigma=(0.0, 0.5))
