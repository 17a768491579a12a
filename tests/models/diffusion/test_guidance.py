import pytest
import torch

from animediffusion.models.bundle import SamplerDefaults
from animediffusion.models.colorize import network_rows, sample_images
from animediffusion.models.diffusion.guidance import guided
from animediffusion.models.diffusion.sampler import sample_times

T = torch.tensor([0.3, 0.8])


@pytest.fixture
def parts(new_denoiser, new_batch):
    denoiser, batch = new_denoiser().requires_grad_(False), new_batch(2)
    condition = denoiser.encode(batch.sketch, batch.reference)
    null = denoiser.encode(batch.sketch, batch.reference, torch.tensor([False, False]))
    return denoiser, batch.target, condition, null


def counted(denoiser):
    """Rows of each call of the network from now on."""
    rows = []
    denoiser.register_forward_hook(lambda _module, arguments, _output: rows.append(len(arguments[0])))
    return rows


def test_a_scale_of_1_evaluates_each_image_once_per_step(parts, new_batch):
    denoiser, batch = parts[0], new_batch(2)
    rows = counted(denoiser)
    sample_images(denoiser, batch.sketch, batch.reference, batch.target, SamplerDefaults(steps=3, guidance_scale=1.0))
    assert rows == [2, 2, 2]


def test_another_scale_evaluates_each_image_twice_in_one_call(parts, new_batch):
    denoiser, batch = parts[0], new_batch(2)
    rows = counted(denoiser)
    sample_images(denoiser, batch.sketch, batch.reference, batch.target, SamplerDefaults(steps=3, guidance_scale=1.5))
    assert rows == [4, 4, 4]


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_guidance_goes_from_without_reference_toward_with_it(parts, scale):
    denoiser, x, condition, null = parts
    without, given = denoiser(x, T, null), denoiser(x, T, condition)
    mixed = guided(denoiser, condition, null, scale)(x, T)
    torch.testing.assert_close(mixed, (1 - scale) * without + scale * given, rtol=1e-4, atol=1e-5)


def test_a_scale_of_0_ignores_the_reference(parts, new_batch):
    denoiser, a, b = parts[0], new_batch(2), new_batch(2, seed=1)
    settings = SamplerDefaults(steps=2, guidance_scale=0.0)
    images = [sample_images(denoiser, a.sketch, reference, a.target, settings) for reference in (a[2], b[2])]
    torch.testing.assert_close(*images, rtol=1e-4, atol=1e-5)


def test_outside_the_interval_an_image_is_only_conditioned(parts):
    denoiser, x, condition, null = parts
    mixed = guided(denoiser, condition, null, 4.0, interval=(0.5, 1.0))(x, T)
    plain, strong = denoiser(x, T, condition), guided(denoiser, condition, null, 4.0)(x, T)
    torch.testing.assert_close(mixed[0], plain[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1], strong[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "scale", "interval", "expected"),
    [
        ("euler", 2.0, (0.0, 1.0), [4, 4, 4, 4]),  # at 1, 0.75, 0.5, 0.25
        ("euler", 2.0, (0.5, 0.8), [2, 4, 4, 2]),
        ("heun", 2.0, (0.7, 1.0), [4, 4, 4, 2, 2, 2, 2]),  # at 1, 0.75 | 0.75, 0.5 | 0.5, 0.25 | 0.25
        ("dpmpp_2m", 1.0, (0.5, 0.8), [2, 2, 2, 2]),
    ],
)
def test_an_image_costs_two_rows_only_where_it_is_guided(parts, new_batch, name, scale, interval, expected):
    denoiser, batch = parts[0], new_batch(2)
    settings = SamplerDefaults(name=name, steps=4, guidance_scale=scale, guidance_interval=interval)
    rows = counted(denoiser)
    sample_images(denoiser, batch.sketch, batch.reference, batch.target, settings)
    assert rows == expected
    assert network_rows(denoiser.path, settings) == sum(rows) / 2


def test_the_defaults_interval_is_honored(parts, new_batch):
    denoiser, batch = parts[0], new_batch(2)
    images = [
        sample_images(denoiser, batch.sketch, batch.reference, batch.target, SamplerDefaults(guidance_scale=s, **more))
        for s, more in ((4.0, {"guidance_interval": (0.0, 0.0)}), (1.0, {}), (4.0, {}))
    ]
    torch.testing.assert_close(images[0], images[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(images[0], images[2], atol=1e-2)


def test_guidance_without_a_null_condition_raises_value_error(parts):
    with pytest.raises(ValueError, match="scale 2"):
        guided(parts[0], parts[2], None, 2.0)


def test_times_of_a_model_start_at_its_noisiest_and_end_in_the_image(parts):
    times = sample_times(parts[0].path, 4)
    assert times.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
