"""Every layout in which the paper's dataset and its followers exist, from files to rows; and a folder of all kinds."""

import json
import os
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from sources import fill, picture, without_ray

from animediffusion.cli.app import run
from animediffusion.pipelines.data.ingest import prepare
from animediffusion.pipelines.data.shards import PICTURES
from animediffusion.pipelines.data.stream import read_split
from animediffusion.platform.errors import DataError
from animediffusion.platform.storage.storage import join, read_bytes

SIZE = 16

PAPER = [f"train/{role}/{n}.jpg" for role in ("reference", "condition") for n in (1, 2, 10)]
PAPER_TEST = [
    f"test/{kind}/{role}/{n}.jpg"
    for kind in ("reconstruction", "limitation")
    for role in ("reference", "condition")
    for n in (1, 2)
]
OLD_TEST = [f"test/{role}/{n}.jpg" for role in ("reference", "condition") for n in (1, 2)]
FIVE_BY_FIVE = [f"test/5t5/{role}/{n}.jpg" for role in ("reference_3", "condition") for n in (1, 2)]
SSIMBAD = [
    f"{folder}/{role}/{n}.jpg"
    for folder in ("train_data", "test_data", "test_data_shuffled")
    for role in ("reference", "sketch")
    for n in (1, 2)
]
IN_NAMES = [
    f"data/{split}/000{n}_{role}.png" for split in ("train", "val") for role in ("gt", "sketch", "ref") for n in (1, 2)
]
DRAWN = [f"{split}/{role}/1.png" for split in ("train", "val") for role in PICTURES]

LAYOUTS = {
    "paper": (PAPER + PAPER_TEST, {"train": 3, "val": 4}, {"target", "sketch"}, {}),
    "paper, older test": (PAPER + OLD_TEST, {"train": 3, "val": 2}, {"target", "sketch"}, {}),
    "paper, every sketch by every reference": (
        PAPER + OLD_TEST + FIVE_BY_FIVE, {"train": 3, "val": 2}, {"target", "sketch"}, {"orphan": 4},
    ),
    "SSIMBaD": (SSIMBAD, {"train": 2, "val": 2}, {"target", "sketch"}, {"duplicate": 4}),
    "SSIMBaD, roles in names": (IN_NAMES, {"train": 2, "val": 2}, {"target", "sketch", "reference"}, {}),
    "ours": (DRAWN, {"train": 1, "val": 1}, set(PICTURES), {}),
    "color alone": ([f"{n}.webp" for n in range(6)], {"train": 5, "val": 1}, {"target"}, {}),
}  # fmt: skip


def is_line_art(path: str) -> bool:
    return "condition" in path or "sketch" in path


def drawn(paths: list[str]) -> dict[str, bytes]:
    """A picture of its own for every path, line art where the path says so."""
    kinds = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
    return {
        path: picture(number, kind=kinds[path.rpartition(".")[2]], mode="L" if is_line_art(path) else "RGB")
        for number, path in enumerate(paths)
    }


def rejects(uri: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in read_bytes(join(uri, "rejects.jsonl")).decode().splitlines()]


def files_in_rows(folder: Path) -> int:
    """Pictures in all shards."""
    tables = [pq.read_table(shard, columns=list(PICTURES)) for shard in sorted(folder.rglob("*.parquet"))]
    return sum(len(column) - column.null_count for table in tables for column in table.columns)


@pytest.mark.parametrize("above", ["", "Anime/", "downloads/Anime dataset/"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_user_points_at_it_and_every_picture_has_its_role(layout: str, above: str, tmp_path: Path) -> None:
    paths, rows, roles, aside = LAYOUTS[layout]
    source = fill(tmp_path / "source", drawn([above + path for path in paths]))

    manifest = without_ray(prepare(source, str(tmp_path / "dataset"), SIZE, val_fraction=0.1))

    assert {name: split.rows for name, split in manifest.splits.items()} == rows
    assert Counter(reject["reason"] for reject in rejects(str(tmp_path / "dataset"))) == aside
    flags = {"sketch": "has_sketch", "reference": "has_reference", "cross_reference": "has_cross"}
    for split in rows:
        arrays = read_split(str(tmp_path / "dataset"), split)
        assert {"target"} | {role for role, flag in flags.items() if arrays[flag].all()} == roles
    assert manifest.num_files == len(paths) == files_in_rows(tmp_path / "dataset") + manifest.num_rejects


@pytest.mark.ray
def test_counts_add_up_on_a_folder_of_all_kinds(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = drawn(
        [f"{split}/{role}/{n}.png" for split in ("train", "val") for role in ("color", "line") for n in range(9)]
    )
    bad = {
        "train/color/0.jpg": picture(900, kind="JPEG"),
        "train/color/cut.jpg": picture(901, kind="JPEG")[:-150],
        "train/line/cut.jpg": picture(902, kind="JPEG", mode="L"),
        "train/color/copy of 1.png": good["train/color/1.png"],
        "val/color/copy of 2.png": good["train/color/2.png"],
        "val/line/alone.png": picture(903, mode="L"),
        "val/color/alone.png": picture(904),
        "val/color/empty.png": b"",
        "val/color/no picture.png": b"GIF89a",
        "loose.png": picture(905),
        "notes.txt": b"hello",
        "train/color/a.tar": b"x" * 100,
    }
    hidden = {".git/config": b"x", "train/color/.DS_Store": b"x", "val/Thumbs.db": b"x"}
    source = fill(tmp_path / "source", good | bad | hidden)

    code = run(["data", "ingest", source, str(tmp_path / "dataset"), "--size", str(SIZE), "--json"])

    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 0
    assert found["num_files"] == len(good) + len(bad)
    assert found["num_rejects"] == len(rejects(str(tmp_path / "dataset")))
    assert found["num_files"] == files_in_rows(tmp_path / "dataset") + found["num_rejects"]
    on_disk = {str(path.relative_to(source)) for path in Path(source).rglob("*") if path.is_file()} - set(hidden)
    assert {reject["path"] for reject in rejects(str(tmp_path / "dataset"))} < on_disk


def test_a_link_to_a_folder_above_changes_no_row(tmp_path: Path) -> None:
    source = fill(tmp_path / "source", drawn([f"sub/{n}.png" for n in range(20)]))
    plain = without_ray(prepare(source, str(tmp_path / "plain"), SIZE))
    for name, target in (("sub/loop", ".."), ("sub/up", "../.."), ("z", "sub")):
        (Path(source) / name).symlink_to(target)

    linked = without_ray(prepare(source, str(tmp_path / "linked"), SIZE))

    assert (linked.content_hash, linked.num_files) == (plain.content_hash, plain.num_files)


def test_bad_names_and_endless_files_are_set_aside_and_the_others_ingested(tmp_path: Path) -> None:
    source = fill(tmp_path / "source", drawn(["ok.png", "line\nend.png", "@eaDir/ok.png/THUMB.png"]))
    Path(os.fsdecode(source.encode() + b"/\x90\xfc\x89\xe6.png")).write_bytes(b"x")
    (Path(source) / "gone.png").symlink_to("nothing.png")
    (Path(source) / "notes.txt").symlink_to("nothing.txt")
    with (Path(source) / "endless.png").open("wb") as file:
        file.truncate(2**40)
    os.mkfifo(Path(source) / "pipe.png")

    manifest = without_ray(prepare(source, str(tmp_path / "dataset"), SIZE))

    details = {reject["path"]: reject["detail"] for reject in rejects(str(tmp_path / "dataset"))}
    assert details[r"\x90\xfc\x89\xe6.png"] == "its name is not UTF-8"
    assert details["gone.png"] == "is a broken link"
    assert details["endless.png"].startswith("has 1,099,511,627,776 bytes")
    assert set(details) == {r"\x90\xfc\x89\xe6.png", "gone.png", "endless.png", "notes.txt"}
    assert manifest.num_files == 6


def test_a_folder_of_names_that_are_not_utf8_says_so(tmp_path: Path) -> None:
    Path(os.fsdecode(bytes(tmp_path) + b"/\x90\xfc.png")).write_bytes(picture(0))

    with pytest.raises(DataError, match=r"none of its files can be used \(\\x90\\xfc.png: its name is not UTF-8\)"):
        prepare(str(tmp_path), str(tmp_path.parent / "dataset"), SIZE)


def test_a_picture_with_copies_is_not_more_often_in_val(tmp_path: Path) -> None:
    files = {f"{n}{copy}.png": picture(n, (8, 8)) for n in range(100) for copy in "abc"}

    manifest = without_ray(prepare(fill(tmp_path / "source", files), str(tmp_path / "dataset"), SIZE, val_fraction=0.1))

    assert {name: split.rows for name, split in manifest.splits.items()}["train"] > 80
    assert sum(split.rows for split in manifest.splits.values()) == 100


@pytest.mark.parametrize("names", ["abcd", "efgh", "ijkl", "mnop"])
def test_val_keeps_a_row_where_all_of_its_pictures_have_copies(names: str, tmp_path: Path) -> None:
    files = {f"{name}.png": picture(number // 2) for number, name in enumerate(names)}

    manifest = without_ray(prepare(fill(tmp_path / "source", files), str(tmp_path / "dataset"), SIZE))

    assert manifest.splits["val"].rows == 1
