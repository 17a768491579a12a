"""Ingest: from real folders to a dataset, locally and on S3; bad files are named, finished parts are kept."""

import io
import json
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sources import fill, picture, without_ray
from uploads import upload_folder

from animediffusion.pipelines.data import ingest as ingesting
from animediffusion.pipelines.data.ingest import STATE, choose_part_rows, ingest, prepare
from animediffusion.pipelines.data.ingest_plan import IngestPlan, Sample, Samples
from animediffusion.pipelines.data.ingest_task import make_row
from animediffusion.pipelines.data.manifest import Manifest
from animediffusion.pipelines.data.stream import read_split
from animediffusion.platform.errors import ConfigError, DataError, StorageError
from animediffusion.platform.storage.storage import exists, join, list_files, read_bytes

SIZE = 16


def pairs(*numbers: int) -> dict[str, bytes]:
    files = {f"target/{number}.png": picture(number) for number in numbers}
    return files | {f"sketch/{number}.png": picture(number, mode="L") for number in numbers}


def damaged() -> dict[str, bytes]:
    """A paired folder in which every kind of bad file occurs once, and six good pairs."""
    white_on_black = io.BytesIO()
    Image.new("L", (20, 20), 10).save(white_on_black, "PNG")
    huge = bytearray(picture(0))
    huge[16:24] = (40_000).to_bytes(4, "big") * 2
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    return pairs(*range(6)) | {
        "target/truncated.jpg": picture(10, kind="JPEG")[:-200],
        "sketch/truncated.png": picture(11, mode="L"),
        "target/text.png": b"this is text",
        "target/empty.png": b"",
        "target/huge.png": bytes(huge),
        "target/again.png": picture(0),
        "sketch/alone.png": picture(12, mode="L"),
        "target/inverted.png": picture(13),
        "sketch/inverted.png": white_on_black.getvalue(),
        ".DS_Store": b"x",
        "target/Thumbs.db": b"x",
    }


def rejects(uri: str) -> dict[str, str]:
    lines = read_bytes(join(uri, "rejects.jsonl")).decode().splitlines()
    return {entry["path"]: entry["reason"] for entry in map(json.loads, lines)}


@pytest.mark.ray
def test_every_file_ends_in_a_row_or_a_reject(ray_cluster: None, tmp_path: Path) -> None:
    source = fill(tmp_path / "source", damaged())
    destination = str(tmp_path / "dataset")
    seen: list[tuple[int, int, int]] = []

    manifest = ingest(source, destination, SIZE, progress=lambda *numbers: seen.append(numbers))

    assert rejects(destination) == {
        "sketch/alone.png": "orphan",
        "sketch/inverted.png": "inverted",
        "sketch/truncated.png": "orphan",
        "target/again.png": "duplicate",
        "target/empty.png": "empty",
        "target/huge.png": "too_large",
        "target/text.png": "not_an_image",
        "target/truncated.jpg": "truncated",
    }
    rows = sum(split.rows for split in manifest.splits.values())
    assert rows == 7
    assert manifest.num_rejects == 8
    assert manifest.num_files == 13 + 8
    assert manifest == Manifest.load(destination)
    assert seen[-1][:2] == (21, 21)
    assert not [name for name in list_files(destination) if name.startswith("_")]
    arrays = [read_split(destination, name) for name in manifest.splits]
    assert sum(int(split["has_sketch"].sum()) for split in arrays) == 6


@pytest.mark.ray
def test_s3_to_s3_gives_the_same_content(ray_cluster: None, tmp_path: Path) -> None:
    source = fill(tmp_path / "source", pairs(*range(5)))
    upload_folder(tmp_path / "source", "s3://bucket/source")

    remote = ingest("s3://bucket/source", "s3://bucket/dataset", SIZE)
    local = without_ray(prepare(source, str(tmp_path / "dataset"), SIZE))

    assert remote.content_hash == local.content_hash
    assert remote.splits == local.splits
    assert prepare("s3://bucket/source", "s3://bucket/dataset", SIZE).done == remote
    assert read_split("s3://bucket/dataset", "train")["target"].shape == (4, SIZE, SIZE, 3)


@pytest.mark.ray
def test_a_store_that_fails_on_the_way_is_one_line(ray_cluster: None, tmp_path: Path) -> None:
    job = prepare(fill(tmp_path / "source", pairs(1)), str(tmp_path / "dataset"), SIZE)
    fill(tmp_path, {"dataset/train": b"a file where a folder must be"})

    with pytest.raises(StorageError, match="dataset/train") as error:
        job.run()
    assert "\n" not in str(error.value)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingesting, "MIN_PART_ROWS", 2)


def test_the_content_hash_does_not_depend_on_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = fill(tmp_path / "source", damaged())
    whole = without_ray(prepare(source, str(tmp_path / "whole"), SIZE))
    monkeypatch.setattr(ingesting, "MIN_PART_ROWS", 2)

    parts = without_ray(prepare(source, str(tmp_path / "parts"), SIZE))

    assert len(parts.split("train").shards) > len(whole.split("train").shards)
    assert parts.content_hash == whole.content_hash
    assert without_ray(prepare(source, str(tmp_path / "other"), 8)).content_hash != whole.content_hash


def test_a_killed_ingest_continues_with_what_is_missing(
    tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = fill(tmp_path / "source", pairs(*range(8)))
    expected = without_ray(prepare(source, str(tmp_path / "expected"), SIZE))
    destination = str(tmp_path / "dataset")
    job = prepare(source, destination, SIZE)
    with pytest.raises(KeyboardInterrupt):
        without_ray(job, stop_after(1 + 2))
    (tmp_path / "dataset" / "train" / ".00003.parquet.0a1b2c3d.part").write_bytes(b"half")
    first = (tmp_path / "dataset" / "train" / "00000.parquet").stat().st_mtime_ns
    monkeypatch.setattr(ingesting, "MIN_PART_ROWS", 3)

    again = prepare(source, destination, SIZE)
    manifest = without_ray(again)

    assert again.continues
    assert manifest.splits == expected.splits
    assert manifest.content_hash == expected.content_hash
    assert (tmp_path / "dataset" / "train" / "00000.parquet").stat().st_mtime_ns == first
    assert list_files(destination) == list_files(str(tmp_path / "expected"))


def stop_after(calls: int) -> Callable[[int, int, int], None]:
    """A progress function that interrupts an ingest when it is called so often."""
    seen: list[int] = []

    def progress(done: int, total: int, rejects: int) -> None:
        seen.append(done)
        if len(seen) == calls:
            raise KeyboardInterrupt

    return progress


def test_the_same_source_again_is_up_to_date(tmp_path: Path) -> None:
    source = fill(tmp_path / "source", pairs(1, 2))
    manifest = without_ray(prepare(source, str(tmp_path / "dataset"), SIZE))

    assert prepare(source, str(tmp_path / "dataset"), SIZE).done == manifest


def test_a_destination_with_other_content_raises_data_error(tmp_path: Path) -> None:
    source = fill(tmp_path / "source", pairs(1, 2))
    destination = str(tmp_path / "dataset")
    without_ray(prepare(source, destination, SIZE))

    with pytest.raises(DataError, match=r"holds another dataset \(from .*source\)"):
        prepare(source, destination, SIZE * 2)
    with pytest.raises(DataError, match=r"holds other files \(sketch/1.png\)"):
        prepare(fill(tmp_path / "more", pairs(3)), source, SIZE)
    with pytest.raises(DataError, match="lies inside the source"):
        prepare(source, source + "/dataset", SIZE)


def test_val_keeps_the_picture_that_train_has_too(tmp_path: Path) -> None:
    files = {"train/a.png": picture(1), "train/b.png": picture(2), "val/z.png": picture(1)}
    destination = str(tmp_path / "dataset")

    manifest = without_ray(prepare(fill(tmp_path / "source", files), destination, SIZE))

    assert rejects(destination) == {"train/a.png": "duplicate"}
    assert {name: split.rows for name, split in manifest.splits.items()} == {"train": 1, "val": 1}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_pairs_csv_makes_rows_that_share_files(tmp_path: Path, encoding: str) -> None:
    text = "target,reference,split\n1.png,2.png,train\n2.png,1.png,train\n3.png,1.png,val\n"
    files = {"1.png": picture(1), "2.png": picture(2), "3.png": b"text", "pairs.csv": text.encode(encoding)}
    destination = str(tmp_path / "dataset")

    manifest = without_ray(prepare(fill(tmp_path / "source", files), destination, SIZE, pairs="pairs.csv"))

    assert manifest.split("train").rows == 2
    assert rejects(destination) == {"3.png": "not_an_image"}
    assert manifest.num_files == 3
    assert read_split(destination, "train")["has_reference"].all()


def test_no_usable_picture_names_the_reasons_and_leaves_nothing(tmp_path: Path) -> None:
    source = fill(tmp_path / "source", {"1.png": b"", "2.png": b"text"})

    with pytest.raises(DataError, match=r"no usable picture among 2 files \(empty, not_an_image\)"):
        without_ray(prepare(source, str(tmp_path / "dataset"), SIZE))
    assert not exists(str(tmp_path / "dataset" / STATE))


@pytest.mark.parametrize("there", [True, False])
def test_a_missing_or_empty_folder_names_the_layouts(tmp_path: Path, there: bool) -> None:
    source = tmp_path / "source"
    if there:
        source.mkdir()

    with pytest.raises(DataError, match=r"(no such folder|holds no files); expected color pictures alone"):
        prepare(str(source), str(tmp_path / "dataset"))


def test_a_missing_s3_prefix_raises_data_error(moto_server: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="s3://bucket/nothing: no such folder"):
        prepare("s3://bucket/nothing", str(tmp_path / "dataset"))


def test_a_missing_bucket_at_either_end_is_named(moto_server: str, tmp_path: Path) -> None:
    source = fill(tmp_path / "source", pairs(1))

    with pytest.raises(StorageError, match="bucket 'nowhere' does not exist"):
        prepare("s3://nowhere/source", str(tmp_path / "dataset"))
    with pytest.raises(StorageError, match="bucket 'nowhere' does not exist"):
        prepare(source, "s3://nowhere/dataset")


def test_a_missing_pairs_csv_raises_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.csv: no such pairs CSV"):
        prepare(fill(tmp_path / "source", pairs(1)), str(tmp_path / "dataset"), pairs="no.csv")


@pytest.mark.parametrize(("size", "val_fraction", "name"), [(4, 0.1, "--size"), (64, 1.0, "--val-fraction")])
def test_settings_out_of_range_raise_config_error(tmp_path: Path, size: int, val_fraction: float, name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: .*; .* to "):
        prepare(str(tmp_path), str(tmp_path), size, val_fraction=val_fraction)


def test_a_picture_keeps_its_middle_when_it_is_cropped(tmp_path: Path) -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = (10, 200, 30)
    buffer = io.BytesIO()
    Image.fromarray(wide).save(buffer, "PNG")
    fill(tmp_path, {"wide.png": buffer.getvalue()})

    row, entry, aside = make_row(str(tmp_path), Sample("wide", "train", "wide.png"), 10)

    assert row is not None
    assert entry is not None
    assert not aside
    stored = np.array(Image.open(io.BytesIO(row.target)))
    assert (stored[:, 2:-2] == (10, 200, 30)).all()


@pytest.mark.parametrize(("count", "size", "rows"), [(100, 64, 256), (40_000, 64, 625), (40_000, 512, 85)])
def test_parts_grow_with_the_source_up_to_a_good_size_for_a_store(count: int, size: int, rows: int) -> None:
    samples = Samples(Sample(str(n), "train", f"{n}.png", f"{n}-line.png") for n in range(count))

    assert choose_part_rows(IngestPlan(samples, ()), size) == rows
