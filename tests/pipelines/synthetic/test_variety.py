"""Varied drawings: each factor alone, presets, and that the usual faces stay as they are."""

import hashlib
import json

import numpy as np
import pytest

from animediffusion.pipelines.synthetic.dataset import make_regions, make_row, synthesize
from animediffusion.pipelines.synthetic.variety import FACES, FACTORS, PRESETS, Variety
from animediffusion.platform.errors import ConfigError, DataError

ROWS = (0, 1, 2)


def only(factor):
    return Variety(**{factor: 1.0})


def test_without_variety_the_pictures_of_a_seed_stay_the_same():
    digest = hashlib.sha256()
    for seed, index in ((0, 0), (0, 1), (5, 7), (1, 4)):
        for picture in make_row(seed, index, 32):
            digest.update(picture.tobytes())
    assert digest.hexdigest() == "9e828d177579804dcf8ba28b5c62231624d751d88dbc20ead2dc4cc9676e3784"


@pytest.mark.parametrize("factor", FACTORS)
def test_a_factor_changes_the_drawings_and_a_row_follows_from_seed_and_index(factor):
    for index in ROWS:
        row = make_row(3, index, 32, only(factor))
        assert all(np.array_equal(a, b) for a, b in zip(row, make_row(3, index, 32, only(factor)), strict=True))
        assert [picture.shape for picture in row] == [(32, 32, 3), (32, 32), (32, 32, 3), (32, 32, 3)]
        changed = "sketch" if factor == "lines" else "target"
        assert not np.array_equal(getattr(row, changed), getattr(make_row(3, index, 32), changed))
    first, second = (make_row(3, index, 32, only(factor)) for index in (0, 1))
    assert not np.array_equal(first.target, second.target)


def test_lines_change_the_sketch_alone_and_palettes_the_colors_alone():
    for index in ROWS:
        usual, lines, palettes = (make_row(0, index, 32, v) for v in (FACES, only("lines"), only("palettes")))
        assert np.array_equal(lines.target, usual.target)
        assert np.array_equal(lines.cross_reference, usual.cross_reference)
        assert np.array_equal(palettes.sketch, usual.sketch)


def test_a_share_is_the_share_of_the_rows_that_vary():
    changed = [
        not np.array_equal(make_row(0, index, 16, Variety(palettes=0.4)).target, make_row(0, index, 16).target)
        for index in range(60)
    ]
    assert 0.25 < np.mean(changed) < 0.55


@pytest.mark.parametrize("factor", FACTORS)
def test_regions_are_exact_and_have_counterparts_in_the_other_view(factor):
    found = []
    for index in ROWS:
        target, other = make_regions(1, index, 64, only(factor))
        assert target.labels.shape == (64, 64)
        assert target.labels.min() == 1
        assert target.labels.max() == len(target.colors)
        area = np.bincount(target.labels.ravel(), minlength=len(target.colors) + 1)[1:]
        known = target.counterparts(other).any(axis=1)
        found.append(area[known].sum() / area.sum())
    assert np.mean(found) > 0.9


def test_the_flat_colors_of_regions_are_those_of_the_picture():
    """Most of a scene shows its flat colors, the rest is line, shadow or light."""
    for index in ROWS:
        picture, (regions, _) = (
            make_row(2, index, 64, only("shapes")).target,
            make_regions(2, index, 64, only("shapes")),
        )
        apart = np.abs(regions.colors[regions.labels - 1].astype(int) - picture).max(axis=-1)
        assert (apart < 4).mean() > 0.4


def test_a_text_describes_presets_and_shares():
    assert Variety.parse("faces") == FACES
    assert Variety.parse("diverse") == PRESETS["diverse"]
    assert Variety.parse("lines=0.5, shapes=0.2") == Variety(lines=0.5, shapes=0.2)
    assert Variety.parse("diverse,shapes=0").shapes == 0
    assert Variety.parse("diverse,shapes=0").heads == PRESETS["diverse"].heads


@pytest.mark.parametrize("text", ["", "wild", "hairs=0.5", "lines", "lines=much", "lines=2", "lines=-0.1", "lines=nan"])
def test_an_unknown_variety_raises_config_error_of_one_line(text):
    with pytest.raises(ConfigError) as raised:
        Variety.parse(text)
    assert "\n" not in str(raised.value)


def test_the_variety_is_recorded_and_a_folder_keeps_it(tmp_path):
    synthesize(str(tmp_path / "varied"), 2, size=16, variety=Variety(lines=0.5))
    record = json.loads((tmp_path / "varied/.synthesize.json").read_text())
    assert record["variety"] == {"lines": 0.5}
    with pytest.raises(DataError, match=r"was drawn with variety lines=0\.5, not faces"):
        synthesize(str(tmp_path / "varied"), 2, size=16)


def test_a_folder_of_an_earlier_version_holds_the_usual_faces(tmp_path):
    synthesize(str(tmp_path), 2, size=16)
    record = json.loads((tmp_path / ".synthesize.json").read_text())
    del record["variety"]
    (tmp_path / ".synthesize.json").write_text(json.dumps(record))
    assert synthesize(str(tmp_path), 3, size=16)["rows"] == 3
    with pytest.raises(DataError, match="was drawn with variety"):
        synthesize(str(tmp_path), 3, size=16, variety=PRESETS["diverse"])
