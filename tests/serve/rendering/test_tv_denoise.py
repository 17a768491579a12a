import numpy as np
import pytest
from skimage.restoration import denoise_tv_chambolle

from animediffusion.serve.rendering.tv_denoise import without_grain


@pytest.fixture
def image():
    """Squares of one color each, with grain."""
    random = np.random.default_rng(0)
    squares = np.kron(random.random((8, 8, 3)), np.ones((8, 8, 1)))
    return (squares + 0.02 * random.standard_normal(squares.shape)).clip(0, 1).astype(np.float32)


@pytest.mark.parametrize("strength", [0.02, 0.1])
def test_it_is_what_scikit_image_makes(image, strength):
    expected = denoise_tv_chambolle(image, weight=strength, channel_axis=2)
    found = without_grain(image, strength)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert np.abs(found - image).mean() > 0.01


def test_a_flat_picture_stays(image):
    flat = np.full_like(image, 0.3)
    np.testing.assert_array_equal(without_grain(flat, 0.02), flat)
