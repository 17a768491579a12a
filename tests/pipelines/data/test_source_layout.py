"""Layouts: which files become which rows, from their names alone."""

import pytest

from animediffusion.pipelines.data.ingest_plan import IngestPlan, Sample
from animediffusion.pipelines.data.source_layout import natural, plan_folder
from animediffusion.platform.errors import DataError


def planned(*paths: str, val_fraction: float = 0.05) -> IngestPlan:
    return plan_folder("src", paths, val_fraction)


def samples(plan: IngestPlan) -> tuple[Sample, ...]:
    return tuple(sorted(plan.samples, key=lambda sample: natural(sample.target)))


def reasons(plan: IngestPlan) -> dict[str, str]:
    return {reject.path: reject.reason for reject in plan.rejects}


def test_color_pictures_alone_are_targets() -> None:
    plan = planned("train/2.jpg", "train/10.jpg", "val/1.jpg")

    assert samples(plan) == (
        Sample("train/2", "train", "train/2.jpg"),
        Sample("train/10", "train", "train/10.jpg"),
        Sample("val/1", "val", "val/1.jpg"),
    )
    assert not plan.rejects


def test_folders_name_the_roles() -> None:
    plan = planned(*[f"val/{role}/000001.png" for role in ("target", "sketch", "reference", "cross_reference")])

    assert samples(plan) == (
        Sample(
            "val/000001",
            "val",
            "val/target/000001.png",
            "val/sketch/000001.png",
            "val/reference/000001.png",
            "val/cross_reference/000001.png",
        ),
    )


def test_in_the_papers_layout_reference_is_the_target() -> None:
    plan = planned(
        "Anime/train/reference/1.jpg",
        "Anime/train/condition/1.jpg",
        "Anime/test/reconstruction/reference/1.jpg",
        "Anime/test/reconstruction/condition/1.png",
    )

    assert samples(plan) == (
        Sample(
            "Anime/test/reconstruction/1",
            "val",
            "Anime/test/reconstruction/reference/1.jpg",
            "Anime/test/reconstruction/condition/1.png",
        ),
        Sample("Anime/train/1", "train", "Anime/train/reference/1.jpg", "Anime/train/condition/1.jpg"),
    )


def test_ssimbads_shuffled_copies_are_set_aside() -> None:
    folders = ("train_data", "test_data", "test_data_shuffled")
    plan = planned(*[f"Anime/{folder}/{role}/1.jpg" for folder in folders for role in ("reference", "sketch")])

    assert {(sample.id, sample.split) for sample in plan.samples} == {
        ("Anime/train_data/1", "train"),
        ("Anime/test_data/1", "val"),
    }
    assert set(reasons(plan).values()) == {"duplicate"}
    assert len(plan.rejects) == 2


def test_a_folder_called_shuffled_without_the_other_is_read() -> None:
    plan = planned("my_shuffled/a.png", "b.png")

    assert [sample.id for sample in samples(plan)] == ["b", "my_shuffled/a"]
    assert not plan.rejects


def test_roles_may_be_in_the_names() -> None:
    plan = planned(*[f"data/{split}/0001_{role}.png" for split in ("train", "val") for role in ("gt", "sketch", "ref")])

    assert samples(plan)[0] == Sample(
        "data/train/0001", "train", "data/train/0001_gt.png", "data/train/0001_sketch.png", "data/train/0001_ref.png"
    )


def test_a_picture_named_color_is_not_a_role_without_line_art() -> None:
    assert [sample.id for sample in planned("hair_color.png", "eye_color.png").samples] == ["eye_color", "hair_color"]


def test_roles_above_the_splits_are_understood() -> None:
    plan = planned("color/train/a.png", "line/train/a.webp", "color/test/b.png", "line/test/b.webp")

    assert [(sample.split, sample.sketch) for sample in plan.samples] == [
        ("val", "line/test/b.webp"),
        ("train", "line/train/a.webp"),
    ]


def test_test_stays_test_where_there_is_a_val() -> None:
    plan = planned("train/a.png", "valid/b.png", "test/c.png")

    assert {sample.id: sample.split for sample in plan.samples} == {
        "train/a": "train",
        "valid/b": "val",
        "test/c": "test",
    }


def test_every_file_that_is_not_used_has_a_reason() -> None:
    plan = planned(
        "target/a.png", "sketch/a.png", "sketch/a.jpg", "sketch/b.png", "loose.png", "notes.txt", ".DS_Store",
        "target/Thumbs.db", "__MACOSX/target/a.png",
    )  # fmt: skip

    assert len(plan.samples) == 1
    assert reasons(plan) == {
        "sketch/a.png": "duplicate",
        "sketch/b.png": "orphan",
        "loose.png": "orphan",
        "notes.txt": "not_an_image",
    }


def test_same_stem_with_two_endings_are_two_pictures() -> None:
    assert [sample.id for sample in planned("a.jpg", "a.png").samples] == ["a", "a.png"]


def test_without_folders_a_hash_of_the_id_splits() -> None:
    names = [f"{number}.png" for number in range(1000)]
    more = [*names, "new.png"]

    first = {sample.id: sample.split for sample in planned(*names, val_fraction=0.1).samples}
    second = {sample.id: sample.split for sample in planned(*more, val_fraction=0.1).samples}

    assert 70 < sum(split == "val" for split in first.values()) < 130
    assert {key: second[key] for key in first} == first


@pytest.mark.parametrize(("count", "val"), [(1, 0), (2, 1), (6, 1)])
def test_a_small_folder_still_has_one_val_picture(count: int, val: int) -> None:
    plan = planned(*[f"{number}.png" for number in range(count)], val_fraction=0.001)

    assert sum(sample.split == "val" for sample in plan.samples) == val


def test_an_empty_folder_names_the_layouts() -> None:
    with pytest.raises(DataError, match=r"holds no files; expected color pictures alone, or folders target"):
        planned(".DS_Store")


def test_line_art_alone_raises_data_error() -> None:
    with pytest.raises(DataError, match="none of its 2 files can be a target"):
        planned("sketch/a.png", "sketch/b.png")


def test_no_pair_raises_data_error() -> None:
    with pytest.raises(DataError, match="no line art has the name of a target"):
        planned("target/a.png", "sketch/b.png")


def test_numbers_sort_by_value() -> None:
    assert sorted(["10.jpg", "9.jpg", "A2.jpg", "a10.jpg", "a.jpg"], key=natural) == [
        "9.jpg", "10.jpg", "A2.jpg", "a10.jpg", "a.jpg",
    ]  # fmt: skip


def test_names_that_macos_took_apart_are_paired_with_composed_ones() -> None:
    plan = planned("target/\u304c.png", "sketch/\u304b\u3099.png", "target/b.png")

    assert samples(plan)[1] == Sample("\u304c", samples(plan)[1].split, "target/\u304c.png", "sketch/\u304b\u3099.png")


@pytest.mark.parametrize(
    "name", ["@eaDir/a.png/THUMB.png", "lost+found/a.png", "$RECYCLE.BIN/a.png", "._a.png", "Icon\r"]
)
def test_files_that_desktops_and_servers_leave_behind_are_not_pictures(name: str) -> None:
    plan = planned("a.png", "b.png", f"sub/{name}", name)

    assert len(plan.samples) == 2
    assert not plan.rejects
