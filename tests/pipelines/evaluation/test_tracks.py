import numpy as np
import pytest
import torch

from animediffusion.models.tensors import to_tensor, to_uint8
from animediffusion.pipelines.evaluation.tracks import KINDS, TRACKS, _RowChance, build, recolored
from animediffusion.pipelines.synthetic.dataset import make_row
from animediffusion.platform.errors import ConfigError, DataError

SIZE = 32
DAMAGE = [name for name in TRACKS if name.startswith("damage/")]
LINES = [name for name in TRACKS if name.startswith("lines/")]


@pytest.fixture(scope="module")
def rows():
    """Eight drawn faces as read_split() returns them."""
    drawn = [make_row(0, index, SIZE) for index in range(8)]
    pictures = {name: np.stack([getattr(row, name) for row in drawn]) for name in drawn[0]._fields if name != "id"}
    there = np.ones(8, bool)
    return {"id": np.arange(8), **pictures, "has_sketch": there, "has_reference": there, "has_cross": there}


@pytest.fixture
def alone(rows):
    """The same faces without line art and references."""
    nothing = np.zeros(8, bool)
    return {**rows, "has_sketch": nothing, "has_reference": nothing, "has_cross": nothing}


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))


@pytest.mark.parametrize("name", TRACKS)
def test_a_track_is_the_same_for_everybody_and_in_any_chunks(rows, name):
    whole = build(rows, name)
    parts = [build(rows, name, places) for places in (range(3), [3], range(4, 8))]
    assert [tuple(image.shape) for image in whole[:3]] == [(8, c, SIZE, SIZE) for c in (3, 1, 3)]
    assert all(image.abs().max() <= 1 for image in whole[:3])
    for image, *pieces in zip(whole[:3], *(part[:3] for part in parts), strict=True):
        torch.testing.assert_close(torch.cat(pieces), image, rtol=0, atol=1e-5)


def test_the_random_numbers_of_a_place_are_fixed_for_good():
    found = torch.stack([_RowChance([3, 700], purpose).uniform(0, 1) for purpose in (0, 1)])
    torch.testing.assert_close(found, torch.tensor([[0.7392555, 0.9812189], [0.7635706, 0.1828303]]))


def test_the_warps_are_fixed_for_good(rows):
    place = np.linspace(0, 255, SIZE).astype(np.uint8)
    plane = np.stack(np.broadcast_arrays(place[None, :], place[:, None], np.uint8(0)), -1)
    found = build({**rows, "target": plane[None].repeat(8, 0)}, "same", [0, 5]).reference[:, :2, 16, 16]
    torch.testing.assert_close(found, torch.tensor([[0.2071, 0.0774], [-0.1440, 0.1757]]), rtol=0, atol=2e-3)


def test_the_same_track_bends_the_target_even_if_a_reference_is_given(rows):
    batch = build(rows, "same")
    assert torch.equal(batch.target, to_tensor(torch.from_numpy(rows["target"])))
    assert torch.equal(batch.sketch, to_tensor(torch.from_numpy(rows["sketch"])))
    difference = (batch.reference - batch.target).abs().mean((1, 2, 3))
    assert (difference > 0.05).all()


def test_the_cross_track_is_the_datasets(rows):
    assert torch.equal(build(rows, "cross").reference, to_tensor(torch.from_numpy(rows["cross_reference"])))


def test_a_dataset_without_second_pictures_has_no_cross_track(alone):
    with pytest.raises(DataError, match="8 of 8 rows have no cross reference; use 'recolored'"):
        build(alone, "cross")


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_recoloring_maps_equal_colors_to_equal_colors(rows, kind):
    before = rows["target"][kind : kind + 1]
    after = to_uint8(build(rows, "recolored", [kind]).target).numpy()
    colors, index = np.unique(before.reshape(-1, 3), axis=0, return_inverse=True)
    changed = after.reshape(-1, 3).astype(int)
    lowest, highest = np.full((len(colors), 3), 255), np.zeros((len(colors), 3), int)
    np.minimum.at(lowest, index.ravel(), changed)
    np.maximum.at(highest, index.ravel(), changed)
    assert (highest - lowest).max() <= 1
    assert np.abs(before.astype(int) - after).mean() > 8


def test_the_recolored_reference_is_the_recolored_truth_bent_as_on_the_same_track(rows):
    truth = {**rows, "target": to_uint8(build(rows, "recolored").target).numpy()}
    bent, expected = build(rows, "recolored").reference, build(truth, "same").reference
    torch.testing.assert_close(bent, expected, rtol=0, atol=0.01)


def test_recoloring_needs_the_target_alone(rows):
    flat = torch.zeros(8, 3, SIZE, SIZE)
    assert torch.isfinite(recolored(flat, range(8))).all()


@pytest.mark.parametrize("name", LINES)
def test_line_styles_change_the_line_art_alone(rows, name):
    batch, same = build(rows, name), build(rows, "same")
    assert torch.equal(batch.target, same.target)
    assert torch.equal(batch.reference, same.reference)
    assert not torch.equal(batch.sketch, same.sketch)
    assert 0.3 < (batch.sketch > 0.5).float().mean() < 0.99


def test_extracted_line_art_is_the_xdog_style(alone):
    assert torch.equal(build(alone, "same").sketch, build(alone, "lines/xdog").sketch)


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_changes_the_reference_alone(rows, name):
    batch, whole = build(rows, name), build(rows, "recolored")
    assert equal(batch[:2], whole[:2])
    assert all(not torch.equal(a, b) for a, b in zip(batch.reference, whole.reference, strict=True))


def test_the_damages_are_what_they_are_called(rows):
    whole = build(rows, "recolored").reference
    damaged = {name.removeprefix("damage/"): build(rows, name).reference for name in DAMAGE}
    assert (damaged["none"] == 0).all()
    assert torch.equal(damaged["gray"][:, 0], damaged["gray"][:, 2])
    assert torch.equal(damaged["flipped"].flip(-1), whole)
    assert torch.equal(damaged["shuffled"].flatten(2).sort(2).values, whole.flatten(2).sort(2).values)
    assert torch.equal(damaged["unrelated"], whole.roll(4, 0))
    torch.testing.assert_close(
        (damaged["half"] == 0).all(1).float().mean((1, 2)), torch.full((8,), 0.5), atol=0.02, rtol=0
    )
    middle = whole[..., 8:24, 8:24]
    halved = torch.nn.functional.avg_pool2d(damaged["cropped"], 2)
    torch.testing.assert_close(halved, middle, rtol=0, atol=0.6)
    assert (halved - middle).abs().mean() < 0.05


def test_one_row_has_no_unrelated_reference(rows):
    single = {key: value[:1] for key, value in rows.items()}
    with pytest.raises(DataError, match="one row"):
        build(single, "damage/unrelated")


def test_an_unknown_track_is_named_with_those_there_are(rows):
    with pytest.raises(ConfigError, match="track 'sme': is unknown; one of same, cross, recolored"):
        build(rows, "sme")
