"""The model card says how a bundle was made, and leaves out what is not known."""

from animediffusion.models.bundle import BundleConfig, SamplerDefaults
from animediffusion.pipelines.training.model_card import model_card

MADE = {
    "run": "second",
    "recipe": "phase2",
    "objective": "reconstruction",
    "steps": 1500,
    "batch_size": 32,
    "attention": "xformers",
    "data_hash": "0123456789abcdef" * 4,
    "parent": "fedcba9876543210" * 4,
}


def rows(made, seconds=None):
    card = model_card(BundleConfig(provenance=made, sampler=SamplerDefaults(steps=1)), 3_240_000, seconds)
    cells = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ") and " | " in line[2:]]
    return {cell[0]: cell[1] for cell in cells if len(cell) == 2}


def test_a_card_says_what_was_trained_on_what_and_for_how_long():
    said = rows(MADE, seconds=750.0)
    assert said["parameters"] == "3.2 M"
    assert said["sampler"] == "euler, 1 step, guidance 1"
    assert "phase2 (phase 2" in said["trained"]
    assert said["trained"].endswith("1,500 steps of 32 images, 48,000 in all, 12.5 minutes")
    assert said["from the weights of"] == "sha256 fedcba987654"
    assert said["attention"] == "xformers"
    assert said["data"] == "sha256 0123456789ab"


def test_a_card_leaves_out_what_is_not_known():
    first = rows({**MADE, "objective": "denoising", "parent": None})
    assert "minutes" not in first["trained"]
    assert "from the weights of" not in first
    assert set(rows({"source": "the authors' code"})) == {
        "image size",
        "parameters",
        "path, prediction",
        "sampler",
        "trained",
    }


def test_a_card_ends_with_use_limits_and_rights():
    card = model_card(BundleConfig(provenance=MADE), 1)
    assert card.startswith("# AnimeDiffusion bundle `second`")
    for words in ("animediffusion colorize", "metrics.json", "plausible, not correct", "rights to the training images"):
        assert words in card
