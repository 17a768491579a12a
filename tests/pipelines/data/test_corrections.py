"""Datasets of corrections; the tasks of an ingest run in this process, except for the one that is marked `ray`."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from animediffusion.pipelines.data import ingest
from animediffusion.pipelines.data.formats.corrections import most_rows
from animediffusion.pipelines.data.manifest import Manifest
from animediffusion.pipelines.data.shards import read_shard
from animediffusion.platform.corrections.store import FORMAT, Correction, Corrections
from animediffusion.platform.errors import ConfigError, DataError
from animediffusion.platform.images.codec import decode_gray, decode_rgb, encode_png


def drawing(seed: int) -> np.ndarray:
    pixels = np.full((40, 40, 3), 255, np.uint8)
    pixels[5 + seed % 30] = 0
    pixels[:, 3 + seed // 30] = 0
    return pixels


def correct(store: Corrections, key: str, number: int, *, same: int | None = None, minute: int = 0, color: int = 0):
    """Save the correction of a request; `same` is the number of a request with the same drawing."""
    sketch = drawing(number if same is None else same)
    corrected = np.full((40, 40, 3), (number, 200 - len(key), color), np.uint8)
    pictures = {
        "sketch.png": sketch,
        "lines.png": sketch[..., 0],
        "reference-1.png": np.full((8, 8, 3), (250, 30, 40), np.uint8),
        "result.png": sketch,
        "corrected.png": corrected,
    }
    record = {
        "format": FORMAT,
        "request_id": f"r{number:03d}",
        "key": key,
        "model_version": "3",
        "answered": "2026-01-31T12:00:00Z",
        "time": f"2026-01-31T12:{minute:02d}:00Z",
        "sha256": {name: hashlib.sha256(pixels.tobytes()).hexdigest() for name, pixels in pictures.items()},
    }
    store.save(Correction(record=record, files={name: encode_png(pixels) for name, pixels in pictures.items()}))


@pytest.fixture
def here(monkeypatch):
    """Run the tasks of an ingest in this process, without Ray."""
    monkeypatch.setattr(ingest, "run_tasks", lambda tasks, _: (task() for task in tasks))


@pytest.fixture
def store(tmp_path) -> Corrections:
    return Corrections(str(tmp_path / "store"))


def rows_of(data: str) -> dict:
    manifest = Manifest.load(data)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    return {row.id: row for shard in shards for row in read_shard(f"{data}/{shard.path}")}


def rejects_of(data: str) -> dict[str, str]:
    lines = Path(data, "rejects.jsonl").read_text().splitlines()
    return {one["path"]: one["reason"] for one in map(json.loads, lines)}


@pytest.mark.usefixtures("here")
def test_a_row_has_the_correction_the_lines_and_the_reference(store, tmp_path, monkeypatch):
    monkeypatch.setenv("ANIMEDIFFUSION_CORRECTIONS", store.uri)
    for number in range(3):
        correct(store, "studio", number)
    data = str(tmp_path / "data")
    manifest = ingest.prepare("corrections://", data, size=40, val_fraction=0).run()
    assert (manifest.splits["train"].rows, manifest.num_files, manifest.num_rejects) == (3, 9, 0)
    row = rows_of(data)["studio/3/r001"]
    assert (decode_rgb(row.target) == (1, 194, 0)).all()
    assert (decode_gray(row.sketch) == drawing(1)[..., 0]).all()
    assert (decode_rgb(row.cross_reference) == (250, 30, 40)).all()
    assert row.reference is None
    assert manifest.source == f"corrections://{store.uri}"
    again = ingest.prepare(f"corrections://{store.uri}", data, size=40, val_fraction=0)
    assert again.done == manifest


@pytest.mark.usefixtures("here")
def test_the_newest_correction_of_a_drawing_counts_and_equal_targets_are_one_row(store, tmp_path):
    correct(store, "studio", 1, minute=1)
    correct(store, "studio", 2, same=1, minute=3)
    correct(store, "studio", 3, minute=1)
    correct(store, "atelier", 3, minute=1)  # Another picture, because the key is in its color.
    data = str(tmp_path / "data")
    ingest.prepare(f"corrections://{store.uri}", data, size=40).run()
    assert set(rows_of(data)) <= {"studio/3/r002", "studio/3/r003", "atelier/3/r003"}
    rejects = rejects_of(data)
    assert rejects["studio/3/r001/corrected.png"] == "duplicate"
    manifest = Manifest.load(data)
    assert manifest.num_files == 3 * 4


@pytest.mark.usefixtures("here")
def test_one_key_gives_at_most_its_share_and_what_is_left_out_is_counted(store, tmp_path):
    for number in range(9):
        correct(store, "studio", number, minute=number)
    for number in range(20, 23):
        correct(store, "atelier", number)
    data = str(tmp_path / "data")
    job = ingest.prepare(f"corrections://{store.uri}", data, size=40)
    assert job.left_out == {"studio": 6}
    job.run()
    assert {name for name in rows_of(data) if name.startswith("studio")} == {f"studio/3/r{n:03d}" for n in (6, 7, 8)}
    assert list(rejects_of(data).values()).count("share") == 6
    assert ingest.prepare(f"corrections://{store.uri}", str(tmp_path / "all"), 40, max_share=1).left_out == {}
    assert ingest.prepare(f"corrections://{store.uri}", str(tmp_path / "0.7"), 40, max_share=0.7).left_out == {
        "studio": 2
    }


@pytest.mark.parametrize(
    ("numbers", "share", "most"),
    [
        ([9], 0.5, 9),
        ([9, 3], 0.5, 3),
        ([9, 3], 0.75, 9),
        ([9, 3, 3], 0.5, 6),
        ([5, 4, 3], 0.1, 3),
        ([1000, 1], 1, 1000),
    ],
)
def test_the_most_rows_of_one_key(numbers, share, most):
    assert most_rows(numbers, share) == most
    total = sum(min(number, most) for number in numbers)
    assert min(max(numbers), most) <= max(share, 1 / len(numbers)) * total + 1e-9


@pytest.mark.usefixtures("here")
def test_all_rows_of_a_drawing_are_in_one_split(store, tmp_path):
    for number in range(40):
        correct(store, f"artist{number % 2}", number, same=number // 2)
    data = str(tmp_path / "data")
    ingest.prepare(f"corrections://{store.uri}", data, size=40, val_fraction=0.3).run()
    split_of: dict[bytes, set[str]] = {}
    for row in rows_of(data).values():
        split_of.setdefault(row.sketch, set()).add(row.split)
    assert len(split_of) == 20
    assert all(len(splits) == 1 for splits in split_of.values())
    assert set.union(*split_of.values()) == {"train", "val"}


@pytest.mark.usefixtures("here")
def test_deleted_rows_are_in_no_later_dataset_and_damaged_ones_are_listed(store, tmp_path):
    for number in range(4):
        correct(store, "studio", number)
        correct(store, "atelier", 10 + number)
    (tmp_path / "store/corrections/studio/3/r001.zip").write_bytes(b"PK\3\4")
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    ingest.prepare(f"corrections://{store.uri}", first, size=40).run()
    assert rejects_of(first)["studio/3/r001"] == "unreadable"
    store.delete("atelier")
    ingest.prepare(f"corrections://{store.uri}", second, size=40).run()
    assert set(rows_of(second)) == {"studio/3/r000", "studio/3/r002", "studio/3/r003"}
    with pytest.raises(DataError, match="another dataset"):
        ingest.prepare(f"corrections://{store.uri}", first, size=40)


@pytest.mark.usefixtures("here")
def test_a_replaced_correction_changes_the_dataset(store, tmp_path):
    for number in range(2):
        correct(store, "studio", number)
    data = str(tmp_path / "data")
    ingest.prepare(f"corrections://{store.uri}", data, size=40).run()
    correct(store, "studio", 1, color=9)
    with pytest.raises(DataError, match="another dataset"):
        ingest.prepare(f"corrections://{store.uri}", data, size=40)


def test_wrong_sources_and_options_are_one_line(store, tmp_path, monkeypatch):
    monkeypatch.delenv("ANIMEDIFFUSION_CORRECTIONS", raising=False)
    data = str(tmp_path / "data")
    with pytest.raises(ConfigError, match="ANIMEDIFFUSION_CORRECTIONS: is not set"):
        ingest.prepare("corrections://", data)
    with pytest.raises(DataError, match="no corrections yet"):
        ingest.prepare(f"corrections://{store.uri}", data)
    correct(store, "studio", 1)
    with pytest.raises(ConfigError, match="--max-share: 0; above 0"):
        ingest.prepare(f"corrections://{store.uri}", data, max_share=0)
    with pytest.raises(ConfigError, match="--pairs"):
        ingest.prepare(f"corrections://{store.uri}", data, pairs="pairs.csv")
    with pytest.raises(DataError, match="inside the corrections store"):
        ingest.prepare(f"corrections://{store.uri}", f"{store.uri}/data")
    with pytest.raises(ConfigError, match="--max-share"):
        ingest.prepare(str(tmp_path), data, max_share=0.3)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_corrections_on_s3_become_a_dataset_on_s3_over_ray(tmp_path):
    store = Corrections(f"s3://bucket/{tmp_path.name}/store")
    for number in range(6):
        correct(store, "studio", number)
    data = f"s3://bucket/{tmp_path.name}/data"
    manifest = ingest.ingest(f"corrections://{store.uri}", data, 40)
    assert sum(split.rows for split in manifest.splits.values()) == 6
    assert set(rows_of(data)) == {f"studio/3/r{number:03d}" for number in range(6)}
