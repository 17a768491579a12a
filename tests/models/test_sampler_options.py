from dataclasses import replace

import pytest

from animediffusion.models.bundle import SamplerDefaults
from animediffusion.models.sampler_options import ALLOWED, MAX_SEED, MAX_STEPS, SamplerOptions, number, whole_number

DEFAULTS = SamplerDefaults(name="heun", steps=6, guidance_scale=1.5, shift=2.0, guidance_interval=(0.1, 0.9))


def test_only_settings_that_are_given_replace_the_models():
    assert SamplerOptions(seed=7).apply_to(DEFAULTS) == DEFAULTS
    assert SamplerOptions(guidance_scale=0.0).apply_to(DEFAULTS) == replace(DEFAULTS, guidance_scale=0.0)
    options = SamplerOptions(steps=2, guidance_scale=3.0, sampler="euler")
    assert options.apply_to(DEFAULTS) == replace(DEFAULTS, steps=2, guidance_scale=3.0, name="euler")


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", -1), ("seed", MAX_SEED + 1), ("steps", 0), ("steps", MAX_STEPS + 1), ("guidance_scale", float("nan"))],
)
def test_a_number_out_of_range_is_named_with_what_is_allowed(name, value):
    with pytest.raises(ValueError, match=f"{name} must be {ALLOWED[name]}, got {value}"):
        SamplerOptions(**{name: value})


def test_an_unknown_sampler_is_named():
    with pytest.raises(ValueError, match="got 'magic'"):
        SamplerOptions(sampler="magic").apply_to(DEFAULTS)


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("007", 7), ("-1", -1), (str(MAX_SEED), MAX_SEED)])
def test_a_whole_number_is_plain_digits(text, value):
    assert whole_number(text) == value
    assert number(text) == value


@pytest.mark.parametrize("text", ["", " 1", "1_0", "+1", "1.", "\u0663", "9" * 21])
def test_other_texts_are_not_whole_numbers(text):
    with pytest.raises(ValueError, match="must be a whole number, got"):
        whole_number(text)


@pytest.mark.parametrize("text", ["", " 1", "1_0", "+1", "inf", "nan", "1e999", "\uff11", "1e", "."])
def test_other_texts_are_not_numbers(text):
    with pytest.raises(ValueError, match="must be a number, got"):
        number(text)
