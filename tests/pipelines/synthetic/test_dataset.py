"""Writing datasets of drawn faces: layout, determinism, continuing, refusing."""

import hashlib

import numpy as np
import pytest

from animediffusion.pipelines.synthetic import dataset
from animediffusion.pipelines.synthetic.dataset import COLUMNS, make_regions, make_row, split_of, synthesize, warp
from animediffusion.platform.errors import ConfigError, DataError
from animediffusion.platform.images.codec import decode_gray, decode_rgb


def contents(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*/*/*.png"))
    }


def test_the_layout_is_split_column_number(tmp_path):
    result = synthesize(str(tmp_path / "faces"), 20, size=32)
    assert (result["rows"], result["train"], result["val"]) == (20, 18, 2)
    for split, count in (("train", 18), ("val", 2)):
        for column in COLUMNS:
            names = sorted(path.name for path in (tmp_path / "faces" / split / column).iterdir())
            assert names == [f"{number:06d}.png" for number in range(1, count + 1)]
    assert decode_rgb((tmp_path / "faces/val/target/000001.png").read_bytes()).shape == (32, 32, 3)


def test_one_row_in_ten_is_for_val_and_two_rows_give_both():
    splits = [split_of(index) for index in range(1000)]
    assert splits.count("val") == 100
    assert set(splits[:2]) == {"train", "val"}


def test_the_files_hold_the_rows_of_the_seed(tmp_path):
    synthesize(str(tmp_path), 3, size=32, seed=5)
    row = make_row(5, 2, 32)  # index 0 and 2 are train, 1 is val
    assert np.array_equal(decode_rgb((tmp_path / "train/target/000002.png").read_bytes()), row.target)
    assert np.array_equal(decode_gray((tmp_path / "train/sketch/000002.png").read_bytes()), row.sketch)
    assert np.array_equal(decode_rgb((tmp_path / "train/reference/000002.png").read_bytes()), row.reference)
    assert np.array_equal(decode_rgb((tmp_path / "train/cross_reference/000002.png").read_bytes()), row.cross_reference)


def test_rows_do_not_depend_on_the_count(tmp_path):
    synthesize(str(tmp_path / "few"), 4, size=16)
    synthesize(str(tmp_path / "more"), 14, size=16)
    few, more = contents(tmp_path / "few"), contents(tmp_path / "more")
    assert few.items() <= more.items()
    assert len(set(more.values())) == len(more) == 14 * len(COLUMNS)


def test_rows_do_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "_TASK_PIXELS", 8 * 16**2)
    synthesize(str(tmp_path / "one"), 18, size=16, workers=1)
    synthesize(str(tmp_path / "two"), 18, size=16, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_stopped_run_continues_and_a_finished_one_draws_nothing(tmp_path):
    folder = tmp_path / "faces"
    synthesize(str(folder), 12, size=16)
    before = contents(folder)
    (folder / "train/target/000003.png").unlink()
    calls = []
    synthesize(str(folder), 12, size=16, progress=lambda done, count: calls.append((done, count)))
    assert calls == [(12, 12)]
    assert contents(folder) == before
    synthesize(str(folder), 12, size=16, progress=lambda done, count: calls.append((done, count)))
    assert len(calls) == 1


def test_a_dataset_grows(tmp_path):
    synthesize(str(tmp_path), 5, size=16)
    assert synthesize(str(tmp_path), 8, size=16)["rows"] == 8
    assert len(contents(tmp_path)) == 8 * len(COLUMNS)


@pytest.mark.parametrize("changed", [{"size": 32}, {"seed": 1}, {"count": 3}])
def test_another_dataset_in_the_folder_raises_data_error(tmp_path, changed):
    synthesize(str(tmp_path), 4, size=16)
    with pytest.raises(DataError, match=r"was drawn with .*; give a new folder"):
        synthesize(str(tmp_path), **{"count": 4, "size": 16, **changed})


def test_a_folder_of_something_else_raises_data_error(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="is not empty"):
        synthesize(str(tmp_path), 4, size=16)
    with pytest.raises(DataError, match="is a file"):
        synthesize(str(tmp_path / "thesis.txt"), 4, size=16)


def test_a_damaged_record_raises_data_error_of_one_line(tmp_path):
    (tmp_path / ".synthesize.json").write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        synthesize(str(tmp_path), 4, size=16)


@pytest.mark.parametrize("wrong", [{"count": 0}, {"size": 8}, {"size": 5000}, {"seed": -1}])
def test_values_out_of_range_raise_config_error(tmp_path, wrong):
    with pytest.raises(ConfigError):
        synthesize(str(tmp_path / "faces"), **{"count": 4, "size": 16, **wrong})
    assert not (tmp_path / "faces").exists()


def test_a_uri_raises_config_error():
    with pytest.raises(ConfigError, match="is not a local folder"):
        synthesize("s3://bucket/faces", 4)


@pytest.mark.parametrize("side", [16, 64, 150])
def test_a_warp_stays_inside_and_moves_a_little(side):
    rng = np.random.default_rng(0)
    white = np.full((side, side, 3), 255, np.uint8)
    assert all((warp(white, rng) == 255).all() for _ in range(20))
    picture = make_row(0, 0, side).target
    moved = warp(picture, rng).astype(int)
    assert 2 < np.abs(moved - picture).mean() < 60
    assert np.abs(moved.mean(axis=(0, 1)) - picture.mean(axis=(0, 1))).max() < 20


def test_regions_of_the_same_color_are_counterparts_in_both_drawings_of_a_row():
    target, other = make_regions(5, 2, 64)
    assert target.labels.shape == other.labels.shape == (64, 64)
    shared = {tuple(color) for color in target.colors} & {tuple(color) for color in other.colors}
    assert len(shared) >= 4
    again, _ = make_regions(5, 2, 64)
    assert np.array_equal(again.labels, target.labels)
