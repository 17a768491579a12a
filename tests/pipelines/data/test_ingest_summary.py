"""The sum of all parts: the same numbers as counting row by row, whatever the order."""

import hashlib
import random

import numpy as np
import pytest

from animediffusion.pipelines.data.ingest_summary import IngestSummary, find_duplicates
from animediffusion.pipelines.data.ingest_task import Record, RowRecord
from animediffusion.pipelines.data.manifest import Shard


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def records(num_parts: int) -> list[Record]:
    """Parts of 0 to 4 rows; every fifth picture is the same."""
    made = []
    for number in range(num_parts):
        names = [f"{number}-{place}" for place in range(number % 5)]
        rows = tuple(
            RowRecord(
                id=name, files=(f"{name}.png", f"line/{name}.png"), content=digest(name),
                source_sha256=digest("same" if (number + place) % 5 == 0 else name),
            )
            for place, name in enumerate(names)
        )  # fmt: skip
        shard = Shard(path=f"train/{number}", rows=len(rows), sha256="", num_bytes=1) if rows else None
        made.append(Record(split="train", number=number, shard=shard, rows=rows, rejects=()))
    return made


@pytest.mark.parametrize("seed", range(3))
def test_any_order_gives_the_sums_of_the_rows(seed: int) -> None:
    parts = records(23)
    rows = [row for part in parts for row in part.rows]
    same = sorted(
        (row.id for row in rows if row.source_sha256 == digest("same")), key=lambda name: [*map(int, name.split("-"))]
    )
    kept = [row for row in rows if row.id not in same[1:]]
    random.Random(seed).shuffle(parts)
    summary = IngestSummary((), shared=False)

    for part in parts:
        summary.add(part)
    repeated = summary.repeated()
    duplicates = find_duplicates([part for part in parts if part.part in repeated], repeated)
    for key, dropped in duplicates.items():
        summary.drop(key, dropped)

    assert sorted(one.row.id for dropped in duplicates.values() for one in dropped) == sorted(same[1:])
    assert summary.num_rows == len(kept)
    assert summary.num_used() == 2 * len(kept)
    assert len(summary.rejects()) == 2 * len(same[1:])
    assert summary.content_hash() == hashlib.sha256("".join(sorted(row.content for row in kept)).encode()).hexdigest()
    assert summary.splits()["train"].rows == len(rows)


def test_a_digest_that_ends_in_zeros_counts_in_full() -> None:
    contents = [np.random.default_rng(n).bytes(30).hex() + "0000" for n in range(5)]
    rows = tuple(RowRecord(id=c, files=(c,), source_sha256=digest(c), content=c) for c in contents)
    summary = IngestSummary((), shared=True)

    summary.add(Record(split="val", number=0, shard=None, rows=rows, rejects=()))

    assert summary.content_hash() == hashlib.sha256("".join(sorted(contents)).encode()).hexdigest()
    assert summary.num_used() == 5
