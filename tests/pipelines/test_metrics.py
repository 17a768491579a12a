import numpy as np
import pytest
from skimage.metrics import structural_similarity

from animediffusion.pipelines.metrics import psnr, score, trivial_results


def images(seed=0, size=32, count=2):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def test_psnr_is_the_formula_at_255_for_each_image():
    truth = np.full((2, 8, 8, 3), 100, np.uint8)
    result = truth + np.array([1, 10], np.uint8).reshape(2, 1, 1, 1)
    np.testing.assert_allclose(psnr(result, truth), [20 * np.log10(255), 20 * np.log10(25.5)])


def test_equal_images_have_the_best_of_every_number():
    assert score(images(), images()) == {"psnr": 100.0, "ssim": 1.0, "ms_ssim": None, "ciede2000": 0.0}


def test_ssim_is_scikit_images_with_the_papers_window():
    truth = images(count=3)
    noise = np.random.default_rng(1).integers(-40, 41, truth.shape)
    result = np.clip(truth.astype(int) + noise, 0, 255).astype(np.uint8)
    theirs = [
        structural_similarity(
            a, b, channel_axis=-1, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for a, b in zip(result, truth, strict=True)
    ]
    assert score(result, truth)["ssim"] == pytest.approx(np.mean(theirs), abs=2e-3)


def test_a_difference_in_lightness_alone_is_that_many_ciede2000():
    black, white = np.zeros((1, 16, 16, 3), np.uint8), np.full((1, 16, 16, 3), 255, np.uint8)
    assert score(black, white)["ciede2000"] == pytest.approx(100, abs=0.1)


@pytest.mark.parametrize(("size", "there"), [(161, False), (175, False), (176, True)])
def test_the_multiscale_number_needs_five_scales_of_the_window(size, there):
    large = images(size=size, count=1)
    assert score(large, large)["ms_ssim"] == (1.0 if there else None)


def test_results_and_truths_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="results are"):
        score(images(count=1), images(count=2))


def test_trivial_results_are_the_reference_its_mean_under_the_lines_and_the_lines():
    sketch = np.full((1, 4, 4, 3), 255, np.uint8)
    sketch[:, 0] = 0
    reference = np.zeros((1, 4, 4, 3), np.uint8)
    reference[..., 0] = 200
    trivial = trivial_results(sketch, reference)
    assert set(trivial) == {"copy_reference", "mean_color", "sketch"}
    assert np.array_equal(trivial["copy_reference"], reference)
    assert np.array_equal(trivial["sketch"], sketch)
    assert trivial["mean_color"][0, 0, 0].tolist() == [0, 0, 0]
    assert trivial["mean_color"][0, 1, 0].tolist() == [200, 0, 0]
