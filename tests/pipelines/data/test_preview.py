"""Counts and contact sheet of a dataset or of a drawn folder."""

import json

import numpy as np
import pytest

from animediffusion.pipelines.data.manifest import Manifest, Split, write_shard
from animediffusion.pipelines.data.preview import show
from animediffusion.pipelines.data.shards import StoredRow
from animediffusion.pipelines.synthetic.dataset import make_row, synthesize
from animediffusion.platform.errors import DataError
from animediffusion.platform.images.codec import decode_rgb, encode_lossless


def encoded(index, **without):
    row = {name: encode_lossless(array) for name, array in make_row(0, index, 32)._asdict().items()}
    return StoredRow(id=f"{index}", split="val", width=32, height=32, sha256=f"{index:064d}", **{**row, **without})


def write_dataset(folder, rows, rejects=()):
    shard = write_shard(str(folder), "val", 0, rows)
    splits = {"train": Split(rows=0, shards=()), "val": Split(rows=len(rows), shards=(shard,))}
    number = len(rows) + len(rejects)
    Manifest(
        image_size=32, splits=splits, num_files=number, num_rejects=len(rejects), source="drawn", content_hash="0"
    ).save(str(folder))
    lines = [json.dumps({"path": f"{i}.png", "reason": reason, "detail": ""}) for i, reason in enumerate(rejects)]
    (folder / "rejects.jsonl").write_text("\n".join(lines))


def test_a_drawn_folder_is_counted_and_shown(tmp_path):
    synthesize(str(tmp_path / "faces"), 12, size=32)
    counts = show(str(tmp_path / "faces"), str(tmp_path / "sheet.png"))
    assert counts.splits == {"train": 10, "val": 2}
    assert counts.image_size == 32
    assert counts.rejects == {}
    sheet = decode_rgb((tmp_path / "sheet.png").read_bytes())
    assert sheet.shape[1] > 4 * 128
    assert 2 * 128 < sheet.shape[0] < 4 * 128


def test_a_dataset_is_counted_with_its_rejects(tmp_path):
    write_dataset(tmp_path, [encoded(0), encoded(1)], ["truncated", "empty", "truncated"])
    counts = show(str(tmp_path), str(tmp_path / "out" / "sheet.png"))
    assert counts.splits == {"train": 0, "val": 2}
    assert counts.num_rejects == 3
    assert counts.rejects == {"truncated": 2, "empty": 1}
    assert (tmp_path / "out" / "sheet.png").exists()


def test_empty_columns_are_omitted_and_missing_cells_are_blank(tmp_path):
    write_dataset(tmp_path, [encoded(0, reference=None, sketch=None), encoded(1, reference=None)])
    show(str(tmp_path), str(tmp_path / "three.png"))
    three = decode_rgb((tmp_path / "three.png").read_bytes())
    write_dataset(tmp_path, [encoded(0)])
    show(str(tmp_path), str(tmp_path / "four.png"))
    assert three.shape[1] < decode_rgb((tmp_path / "four.png").read_bytes()).shape[1]


def test_without_out_nothing_is_written(tmp_path):
    synthesize(str(tmp_path / "faces"), 2, size=16)
    before = sorted(tmp_path.rglob("*"))
    assert show(str(tmp_path / "faces"), None).sheet is None
    assert sorted(tmp_path.rglob("*")) == before


def test_a_sheet_holds_at_most_the_rows_asked_for(tmp_path):
    write_dataset(tmp_path, [encoded(i) for i in range(3)])
    heights = []
    for rows in (1, 3, 9):
        show(str(tmp_path), str(tmp_path / "sheet.png"), rows=rows)
        heights.append(len(decode_rgb((tmp_path / "sheet.png").read_bytes())))
    assert heights[0] < heights[1] == heights[2]


def test_a_folder_without_data_is_an_error(tmp_path):
    with pytest.raises(DataError, match="holds no dataset"):
        show(str(tmp_path), None)


def test_a_damaged_picture_in_a_folder_becomes_a_blank(tmp_path):
    synthesize(str(tmp_path / "faces"), 2, size=16)
    (tmp_path / "faces/val/sketch/000001.png").write_bytes(b"\x89PNG")
    show(str(tmp_path / "faces"), str(tmp_path / "sheet.png"))
    assert np.unique(decode_rgb((tmp_path / "sheet.png").read_bytes()).reshape(-1, 3), axis=0).shape[0] > 10
