import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.signal import convolve2d

from animediffusion.pipelines.evaluation.metrics import (
    ImageScores,
    detail,
    edge_f1,
    haarpsi,
    psnr,
    score,
    sharpness,
    ssim,
    trivial_results,
)
from animediffusion.pipelines.synthetic.dataset import make_row


def images(seed=0, size=32, count=2):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def faces():
    """Four drawn faces at 64 px and their line art, [4, 64, 64, 3] each."""
    rows = [make_row(0, index, 64) for index in range(4)]
    return np.stack([row.target for row in rows]), np.stack([row.sketch[..., None].repeat(3, -1) for row in rows])


def blurred(truth, sigma):
    return gaussian_filter(truth, (0, sigma, sigma, 0))


def noisy(truth, amount):
    noise = np.random.default_rng(0).normal(0, amount, truth.shape)
    return np.clip(truth + noise, 0, 255).astype(np.uint8)


def test_psnr_is_the_formula_at_255_for_each_image():
    truth = np.full((2, 8, 8, 3), 100, np.uint8)
    result = truth + np.array([1, 10], np.uint8).reshape(2, 1, 1, 1)
    np.testing.assert_allclose(psnr(result, truth), [20 * np.log10(255), 20 * np.log10(25.5)])


def test_equal_images_have_the_best_of_every_number():
    assert score(images(), images()) == ImageScores(psnr=100.0, ssim=1.0, ms_ssim=None, ciede2000=0.0)


@pytest.mark.parametrize("size", [8, 32, 64])
@pytest.mark.parametrize("amount", [2, 40])
def test_ssim_is_that_of_torchmetrics(size, amount):
    # Imported here because it takes seconds, which each of the tests' processes would spend.
    from torchmetrics.functional.image import structural_similarity_index_measure

    truth = blurred(images(size=size), 2)
    result = noisy(truth, amount)
    pair = [torch.from_numpy(one).permute(0, 3, 1, 2) / 255 for one in (result, truth)]
    theirs = structural_similarity_index_measure(*pair, data_range=1.0, reduction="none")
    np.testing.assert_allclose(ssim(result, truth), theirs, rtol=0, atol=2e-5)


def test_ssim_is_scikit_images_with_the_papers_window():
    # Imported here because it takes a second, which each of the tests' processes would spend.
    from skimage.metrics import structural_similarity

    truth = images(count=3)
    noise = np.random.default_rng(1).integers(-40, 41, truth.shape)
    result = np.clip(truth.astype(int) + noise, 0, 255).astype(np.uint8)
    theirs = [
        structural_similarity(
            a, b, channel_axis=-1, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for a, b in zip(result, truth, strict=True)
    ]
    assert score(result, truth).ssim == pytest.approx(np.mean(theirs), abs=2e-3)


def test_a_difference_in_lightness_alone_is_that_many_ciede2000():
    black, white = np.zeros((1, 16, 16, 3), np.uint8), np.full((1, 16, 16, 3), 255, np.uint8)
    assert score(black, white).ciede2000 == pytest.approx(100, abs=0.1)


@pytest.mark.parametrize(("size", "there"), [(161, False), (175, False), (176, True)])
def test_the_multiscale_number_needs_five_scales_of_the_window(size, there):
    large = images(size=size, count=1)
    assert score(large, large).ms_ssim == (1.0 if there else None)


def test_results_and_truths_of_different_shapes_raise_value_error():
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


def haarpsi_of_the_paper(result, truth):
    """One pair, with scipy's convolution; the rotations give Matlab's place of an even kernel's middle."""

    def convolve(image, kernel):
        return np.rot90(convolve2d(np.rot90(image, 2), np.rot90(kernel, 2), mode="same"), 2)

    def channels(image):
        yiq = image @ np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]]).T
        return [convolve(yiq[..., i], np.ones((2, 2)) / 4)[::2, ::2] for i in range(3)]

    def haar(y, scale, across):
        kernel = np.ones((2**scale, 2**scale)) / 2**scale
        kernel[: 2**scale // 2] = -kernel[: 2**scale // 2]
        return np.abs(convolve(y, kernel.T if across else kernel))

    def similar(a, b):
        return (2 * a * b + 30) / (a**2 + b**2 + 30)

    one, other = channels(result), channels(truth)
    similarities, weights = [], []
    for across in (False, True):
        similarities.append(sum(similar(haar(one[0], s, across), haar(other[0], s, across)) for s in (1, 2)) / 2)
        weights.append(np.maximum(haar(one[0], 3, across), haar(other[0], 3, across)))
    smooth = [[np.abs(convolve(x, np.ones((2, 2)) / 4)) for x in picture[1:]] for picture in (one, other)]
    similarities.append((similar(smooth[0][0], smooth[1][0]) + similar(smooth[0][1], smooth[1][1])) / 2)
    weights.append((weights[0] + weights[1]) / 2)
    seen = 1 / (1 + np.exp(-4.2 * np.array(similarities)))
    pooled = (seen * weights).sum() / np.sum(weights)
    return (np.log(pooled / (1 - pooled)) / 4.2) ** 2


def test_haarpsi_is_the_papers_formula(faces):
    truth = faces[0]
    for result in (blurred(truth, 1), noisy(truth, 20), truth[:, :, ::-1].copy()):
        expected = [haarpsi_of_the_paper(a, b) for a, b in zip(result, truth, strict=True)]
        np.testing.assert_allclose(haarpsi(result, truth), expected, rtol=1e-6)


def test_haarpsi_of_equal_images_is_one_even_where_they_are_flat(faces):
    flat = np.full((1, 32, 32, 3), 90, np.uint8)
    np.testing.assert_allclose(haarpsi(faces[0], faces[0]), 1)
    np.testing.assert_allclose(haarpsi(flat, flat), 1)


@pytest.mark.parametrize("damage", [lambda x, i: blurred(x, 0.5 * i), lambda x, i: noisy(x, 8 * i)])
def test_haarpsi_falls_with_damage(faces, damage):
    values = np.stack([haarpsi(damage(faces[0], amount), faces[0]) for amount in (1, 2, 3, 4)])
    assert (np.diff(values, axis=0) < 0).all()


def test_haarpsi_sees_colors(faces):
    assert (haarpsi(faces[0][..., [2, 0, 1]], faces[0]) < 0.9).all()


def test_sharpness_is_below_one_if_blurred_and_above_if_noisy(faces):
    truth = faces[0]
    np.testing.assert_allclose(sharpness(truth, truth), 1)
    assert (sharpness(blurred(truth, 1), truth) < 0.3).all()
    assert (sharpness(noisy(truth, 15), truth) > 1.1).all()


def test_twice_the_detail_is_four_times_the_sharpness():
    dots = np.zeros((1, 32, 32, 3), np.uint8)
    dots[:, ::4, ::4] = 100
    np.testing.assert_allclose(sharpness(2 * dots, dots), 4, rtol=1e-4)


def test_the_lines_of_a_drawing_are_found_in_its_truth_and_not_in_a_blurred_one(faces):
    truth, sketch = faces
    assert (edge_f1(truth, sketch) > 0.75).all()
    assert (edge_f1(blurred(truth, 3), sketch) < 0.5).all()
    assert edge_f1(np.full_like(truth, 200), sketch).max() == 0


@pytest.mark.parametrize(("size", "reach"), [(64, 1), (256, 2)])
def test_a_line_may_be_off_by_a_little(size, reach):
    picture = np.full((1, size, size, 3), 255, np.uint8)
    picture[:, :, size // 2] = 0
    shifted = [np.roll(picture, shift, 2) for shift in (0, reach, reach + 6)]
    values = [float(edge_f1(result, picture)[0]) for result in shifted]
    assert values[0] > 0.5
    assert values[2] == 0
    assert values[1] > 0


def test_detail_gathers_the_means(faces):
    truth, sketch = faces
    found = detail(blurred(truth, 1), truth, sketch)
    assert list(found) == ["haarpsi", "sharpness", "edge_f1"]
    assert found["haarpsi"] == pytest.approx(haarpsi(blurred(truth, 1), truth).mean(), abs=1e-4)
