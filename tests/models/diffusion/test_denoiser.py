import pytest
import torch

from animediffusion.models.diffusion.denoiser import Denoiser
from animediffusion.models.diffusion.path import PathConfig


@pytest.mark.parametrize(
    ("path", "prediction"),
    [("linear", "eps"), *((path, p) for path in ("linear", "cosine", "flow") for p in ("x0", "v", "edm"))],
)
def test_what_the_network_should_return_gives_back_the_image(network, path, prediction):
    denoiser = Denoiser(network, PathConfig(name=path), prediction)
    generator = torch.Generator().manual_seed(0)
    image, noise = (torch.randn(5, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([0.05, 0.2, 0.5, 0.8, 0.95], dtype=torch.float64)
    x_t = denoiser.path.add_noise(image, noise, t)
    output = denoiser.training_target(image, noise, t)
    torch.testing.assert_close(denoiser.to_x0(output, x_t, t), image, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("path", "prediction"), [("linear", "eps"), *((p, q) for p in ("linear", "cosine", "flow") for q in ("x0", "v"))]
)
def test_min_snr_weighs_the_error_of_an_output_as_that_of_the_image_it_means(network, path, prediction):
    denoiser = Denoiser(network, PathConfig(name=path), prediction)
    generator = torch.Generator().manual_seed(0)
    x_t, output, error = (torch.randn(4, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    t = torch.tensor([0.05, 0.3, 0.7, 0.9], dtype=torch.float64)
    off = denoiser.to_x0(output + error, x_t, t) - denoiser.to_x0(output, x_t, t)
    snr = (denoiser.path.alpha(t) / denoiser.path.sigma(t)).square()
    assert float(snr.min()) < 5 < float(snr.max())
    found = denoiser.snr_weight(t, 5.0) * error.square().mean((1, 2, 3))
    torch.testing.assert_close(found, snr.clamp(max=5.0) * off.square().mean((1, 2, 3)))


@pytest.mark.parametrize("sigma", [0.002, 0.1, 0.5, 3.0, 80.0])
def test_edm_is_the_preconditioning_of_karras_et_al(network, sigma):
    denoiser = Denoiser(network, PathConfig(name="flow", shift=0.3, sigma_max=80.0), "edm")
    asked = []

    def network_output(x, t, _condition):
        asked.append((x, t))
        return torch.sin(3 * x)

    denoiser.network.denoise = network_output
    generator = torch.Generator().manual_seed(0)
    image, noise = (torch.randn(1, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    # Table 1, for the noise level sigma and the input y = image + sigma noise.
    y, both = image + sigma * noise, sigma**2 + 0.5**2
    c_skip, c_out, c_in = 0.5**2 / both, sigma * 0.5 / both**0.5, 1 / both**0.5
    phi = sigma / (sigma + 0.3)
    found = denoiser(y / (1 + sigma), torch.tensor([phi], dtype=torch.float64), None)
    [(asked_x, asked_t)] = asked
    torch.testing.assert_close(asked_x, c_in * y, rtol=1e-9, atol=1e-9)
    assert float(asked_t) == pytest.approx(phi)
    expected = c_skip * y + c_out * torch.sin(3 * c_in * y)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_loss_of_edm_compares_images_and_that_of_the_others_outputs(network, new_batch):
    batch, t = new_batch(2), torch.tensor([0.2, 0.8])
    noise = torch.randn(batch.target.shape, generator=torch.Generator().manual_seed(0))
    for prediction in ("x0", "v", "edm"):
        denoiser = Denoiser(network, PathConfig(shift=0.3), prediction)
        condition = denoiser.encode(batch.sketch, batch.reference)
        says, should_say = denoiser.loss_pair(batch.target, noise, t, condition)
        x_t = denoiser.path.add_noise(batch.target, noise, t)
        if prediction == "edm":
            torch.testing.assert_close(says, denoiser(x_t, t, condition))
            assert torch.equal(should_say, batch.target)
        else:
            torch.testing.assert_close(says, denoiser.network.denoise(x_t, t, condition))
            torch.testing.assert_close(should_say, denoiser.training_target(batch.target, noise, t))


def test_the_velocity_of_the_flow_path_is_noise_minus_image(network):
    denoiser = Denoiser(network, PathConfig(name="flow"), "v")
    image, noise = torch.rand(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    target = denoiser.training_target(image, noise, torch.tensor([0.3, 0.9]))
    torch.testing.assert_close(target, noise - image)


def test_predicting_noise_on_a_path_that_ends_in_pure_noise_raises_value_error_with_the_way_out(network):
    with pytest.raises(ValueError, match=r"'eps' cannot start on path 'flow': alpha\(t_max\) is 0.000.*use x0 or v"):
        Denoiser(network, PathConfig(name="flow"), "eps")


def test_an_unknown_prediction_raises_value_error(network):
    with pytest.raises(ValueError, match="eps, x0, v or edm"):
        Denoiser(network, PathConfig(), "score")


def test_a_clamping_denoiser_stays_in_the_range_of_images(network):
    denoiser = Denoiser(network, PathConfig(name="linear"), "eps", clamp=True)
    x_0 = denoiser.to_x0(torch.full((1, 3, 4, 4), 9.0), torch.zeros(1, 3, 4, 4), torch.tensor([0.9]))
    assert (x_0 == -1).all()


def test_the_estimate_is_float32_under_autocast(new_denoiser, new_batch):
    denoiser, batch = new_denoiser(), new_batch(2)
    with torch.autocast("cpu", torch.bfloat16):
        x_0 = denoiser(batch.target, torch.tensor([0.2, 0.7]), denoiser.encode(batch.sketch, batch.reference))
    assert x_0.dtype == torch.float32
    assert x_0.shape == batch.target.shape
