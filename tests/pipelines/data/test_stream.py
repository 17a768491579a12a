"""Datasets: manifest, decoding, and the stream that two consumers share."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from animediffusion.pipelines.data.manifest import Manifest, Split, write_shard
from animediffusion.pipelines.data.shards import StoredRow
from animediffusion.pipelines.data.stream import Rehearsal, decode_rows, read_split, training_dataset
from animediffusion.platform.errors import DataError
from animediffusion.platform.images.codec import encode_lossless
from animediffusion.platform.storage.storage import join, read_bytes, write_bytes

SIZE = 8


def row(number: int, split: str, *, complete: bool) -> StoredRow:
    target = encode_lossless(np.full((SIZE, SIZE, 3), number, np.uint8))
    other = {
        "sketch": encode_lossless(np.full((SIZE, SIZE), 255 - number, np.uint8)),
        "reference": encode_lossless(np.full((SIZE, SIZE, 3), number + 100, np.uint8)),
    }
    return StoredRow(
        id=f"{split}-{number}",
        split=split,
        target=target,
        sketch=other["sketch"] if complete else None,
        reference=other["reference"] if complete else None,
        cross_reference=None,
        width=SIZE,
        height=SIZE,
        sha256=hashlib.sha256(target).hexdigest(),
    )


def write_dataset(uri: str, first: int = 0, **shard_rows: tuple[int, ...]) -> None:
    """A dataset whose row i is a flat picture of gray level `first` + i; every second row is a target only."""
    splits = {}
    for split, counts in shard_rows.items():
        shards, at = [], 0
        for number, count in enumerate(counts):
            rows = [row(first + at + index, split, complete=(at + index) % 2 == 0) for index in range(count)]
            shards.append(write_shard(uri, split, number, rows))
            at += count
        splits[split] = Split(rows=at, shards=tuple(shards))
    num_files = sum(split.rows for split in splits.values())
    Manifest(
        image_size=SIZE, splits=splits, num_files=num_files, num_rejects=0, source="test", content_hash="0" * 64
    ).save(uri)


@ray.remote(num_cpus=0)
class Consumer:
    """A rank: takes batches and remembers positions and ids."""

    def take(self, shard: Any, batch_rows: int, num_batches: int) -> list[tuple[int, str]]:
        seen: list[tuple[int, str]] = []
        for index, batch in enumerate(shard.iter_batches(batch_size=batch_rows, drop_last=True)):
            if index == num_batches:
                break
            seen += zip(batch["position"].tolist(), batch["id"].tolist(), strict=True)
            assert decode_rows(batch)["target"].shape == (batch_rows, SIZE, SIZE, 3)
        return seen


def consume(
    uri: str, *, batch_rows: int, num_batches: int, start_rows: int = 0, rehearse: Rehearsal | None = None
) -> list[list[tuple[int, str]]]:
    num_rows = num_batches * batch_rows
    rows = training_dataset(
        uri, seed=5, world_size=2, num_rows=num_rows, start_rows=start_rows, rehearse=rehearse
    ).streaming_split(2, equal=True)
    ranks = [Consumer.remote() for _ in range(2)]
    return ray.get([rank.take.remote(shard, batch_rows, num_batches) for rank, shard in zip(ranks, rows, strict=True)])


@pytest.mark.ray
def test_two_ranks_continue_row_by_row_after_a_resume(ray_cluster: None, tmp_path: Path) -> None:
    uri = str(tmp_path / "tiny")
    write_dataset(uri, train=(8, 8))

    whole = consume(uri, batch_rows=12, num_batches=20)
    rest = consume(uri, batch_rows=12, num_batches=13, start_rows=7 * 12)

    assert [len(rank) for rank in whole] == [240, 240]
    assert rest == [rank[7 * 12 :] for rank in whole]
    positions = sorted(position for rank in whole for position, _ in rank)
    assert len(set(positions)) == 480


@pytest.mark.ray
def test_a_rehearsed_dataset_has_its_share_of_every_batch_also_after_a_resume(
    ray_cluster: None, tmp_path: Path
) -> None:
    new, old = str(tmp_path / "new"), "s3://bucket/old"
    write_dataset(new, train=(9,))
    write_dataset(old, first=80, train=(40, 30))
    rehearse = Rehearsal(old, 0.25)

    whole = consume(new, batch_rows=8, num_batches=30, rehearse=rehearse)
    rest = consume(new, batch_rows=8, num_batches=20, start_rows=10 * 8, rehearse=rehearse)

    assert rest == [rank[10 * 8 :] for rank in whole]
    for rank in whole:
        numbers = [int(name.partition("-")[2]) for _, name in rank]
        batches = [numbers[start : start + 8] for start in range(0, len(numbers), 8)]
        assert {sum(number >= 80 for number in batch) for batch in batches} == {2}
    names = {name for rank in whole for _, name in rank}
    assert {name for name in names if int(name.partition("-")[2]) < 80} == {f"train-{number}" for number in range(9)}


@pytest.mark.ray
def test_training_streams_from_s3(ray_cluster: None) -> None:
    uri = "s3://bucket/stream"
    write_dataset(uri, train=(40, 30))

    ranks = consume(uri, batch_rows=10, num_batches=14)

    names = [name for rank in ranks for _, name in rank]
    assert len(names) == 280
    assert set(names) == {f"train-{number}" for number in range(70)}


def test_a_split_is_read_without_ray(tmp_path: Path) -> None:
    write_dataset(str(tmp_path), train=(20, 3), val=(2,))

    arrays = read_split(str(tmp_path), "train", limit=21)

    assert arrays["target"][:, 0, 0, 0].tolist() == list(range(21))
    assert arrays["id"][20] == "train-20"
    assert arrays["sketch"].shape == (21, SIZE, SIZE)
    assert arrays["has_sketch"].tolist() == [number % 2 == 0 for number in range(21)]
    assert arrays["reference"][2, 0, 0, 0] == 102
    assert not arrays["sketch"][1].any()
    assert not arrays["has_cross"].any()


def test_a_folder_without_a_dataset_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no dataset.*data ingest"):
        Manifest.load(str(tmp_path / "nothing"))


def test_a_foreign_manifest_is_one_line(tmp_path: Path) -> None:
    write_bytes(str(tmp_path / "manifest.json"), b'{"format": 7}')

    with pytest.raises(DataError, match=r"is not a dataset manifest \(format") as error:
        Manifest.load(str(tmp_path))
    assert "\n" not in str(error.value)


def test_an_unknown_split_names_those_there_are(tmp_path: Path) -> None:
    write_dataset(str(tmp_path), train=(2,))

    with pytest.raises(DataError, match="'train'"):
        read_split(str(tmp_path), "val")


@pytest.mark.parametrize("path", ["../other/train-00000.parquet", "/etc/passwd", "train/../../x"])
def test_a_manifest_that_names_files_elsewhere_is_one_line(tmp_path: Path, path: str) -> None:
    write_dataset(str(tmp_path), train=(2,))
    there = Manifest.load(str(tmp_path)).split("train").shards[0].path
    text = read_bytes(str(tmp_path / "manifest.json"))
    write_bytes(str(tmp_path / "manifest.json"), text.replace(there.encode(), path.encode()))

    with pytest.raises(DataError, match=r"is not within the dataset"):
        Manifest.load(str(tmp_path))


def test_a_manifest_survives_its_own_file(tmp_path: Path) -> None:
    write_dataset(str(tmp_path), train=(2,))

    manifest = Manifest.load(str(tmp_path))

    shard = manifest.split("train").shards[0]
    assert hashlib.sha256(read_bytes(join(str(tmp_path), shard.path))).hexdigest() == shard.sha256
