from dataclasses import replace

import pytest
import torch
from optuna import create_study
from optuna.samplers import RandomSampler, TPESampler

from animediffusion.models.bundle import SamplerDefaults
from animediffusion.models.diffusion.path import FlowPath
from animediffusion.models.diffusion.sampler import build_sampler, sample, sample_times
from animediffusion.pipelines.tuning.sampler_space import SamplerSpace, to_point

PATH = FlowPath()
PLAIN = SamplerDefaults(steps=4)
SPACE = SamplerSpace(PATH, PLAIN)


def images(settings):
    """What a sampler makes of one noise with an estimate that depends on place and time."""
    times = sample_times(PATH, settings.steps, shift=settings.shift)
    noise = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return sample(build_sampler(settings.name, PATH), lambda x, t: torch.tanh(x) * (1 + t), noise, times)


@pytest.mark.parametrize(
    ("settings", "simplest"),
    [
        (replace(PLAIN, name="heun", steps=1, shift=3.0), SamplerDefaults(steps=1)),
        (replace(PLAIN, name="dpmpp_2m", steps=1), SamplerDefaults(steps=1)),
        (replace(PLAIN, name="dpmpp_2m", steps=2, shift=2.0), SamplerDefaults(steps=2, shift=2.0)),
        (replace(PLAIN, name="heun", steps=2), SamplerDefaults(name="heun", steps=2)),
        (replace(PLAIN, name="dpmpp_2m", steps=3), SamplerDefaults(name="dpmpp_2m", steps=3)),
    ],
)
def test_settings_that_give_the_same_images_are_one_point(settings, simplest):
    assert SPACE.simplest(settings) == simplest
    torch.testing.assert_close(images(settings), images(simplest))


@pytest.mark.parametrize(
    ("scale", "interval", "expected"),
    [
        (1.0, (0.2, 0.8), (1.0, (0.0, 1.0))),
        (2.0, (0.1, 0.2), (1.0, (0.0, 1.0))),  # no evaluation lies there: 1, 0.75, 0.5, 0.25
        (2.0, (0.2, 1.0), (2.0, (0.0, 1.0))),
        (2.0, (0.1, 0.6), (2.0, (0.0, 0.5))),
        (2.0, (0.7, 1.0), (2.0, (0.7, 1.0))),
    ],
)
def test_an_interval_counts_by_the_evaluations_in_it(scale, interval, expected):
    found = SPACE.simplest(replace(PLAIN, guidance_scale=scale, guidance_interval=interval))
    assert (found.guidance_scale, found.guidance_interval) == expected


@pytest.mark.parametrize(
    "defaults",
    [PLAIN, SamplerDefaults(name="heun", steps=50, guidance_scale=0.5, shift=9.0, guidance_interval=(0.3, 0.4))],
)
def test_the_defaults_are_part_of_the_space_and_its_first_point(defaults):
    space = SamplerSpace(PATH, defaults)
    first = space.first()[0]
    study = create_study(directions=["maximize", "minimize"])
    study.enqueue_trial(first)
    assert study.ask(fixed_distributions=space.distributions).params == first
    assert space.point(first) == to_point(space.simplest(defaults))


def test_a_search_begins_with_its_defaults_and_both_plain_fronts():
    points = [SamplerDefaults(**SPACE.point(params)) for params in SPACE.first()]
    assert points[0] == PLAIN
    assert {point.steps for point in points if point.guidance_scale == 1} >= {1, 2, 4, 8}
    assert {point.steps for point in points if point.guidance_scale == 2} >= {1, 2, 4}
    assert all(point.guidance_interval == (0.0, 1.0) for point in points)


def test_every_choice_of_parameters_is_a_point():
    study = create_study(directions=["maximize", "minimize"], sampler=RandomSampler(seed=0))
    for _ in range(100):
        point = SPACE.point(study.ask(fixed_distributions=SPACE.distributions).params)
        assert SPACE.simplest(SamplerDefaults(**point)) == SamplerDefaults(**point)


def test_a_model_with_averages_has_their_length_as_a_setting():
    space = SamplerSpace(PATH, PLAIN, (0.04, 0.16), 0.07)
    own = space.point(space.first()[0])
    assert own == to_point(PLAIN, 0.07)
    assert all(space.point(params).keys() == to_point(PLAIN).keys() for params in space.first()[1:])
    study = create_study(directions=["maximize", "minimize"], sampler=RandomSampler(seed=0))
    points = [space.point(study.ask(fixed_distributions=space.distributions).params) for _ in range(200)]
    lengths = {point.get("ema_length") for point in points}
    assert lengths == {None, *(number / 100 for number in range(4, 17))}


def test_of_one_average_the_search_chooses_whether_to_use_it():
    space = SamplerSpace(PATH, PLAIN, (0.08, 0.08))
    study = create_study(directions=["maximize", "minimize"], sampler=TPESampler(seed=0, n_startup_trials=4))
    lengths = set()
    for number in range(12):
        trial = study.ask(fixed_distributions=space.distributions)
        lengths.add(space.point(trial.params).get("ema_length"))
        study.tell(trial, [number % 3, number % 4])
    assert lengths == {None, 0.08}
