"""A CSV of pairs as people and spreadsheets write it; nothing in it is ignored in silence."""

import pytest

from animediffusion.pipelines.data.ingest_plan import IngestPlan, Sample
from animediffusion.pipelines.data.pairs import plan_pairs
from animediffusion.pipelines.data.source_layout import natural
from animediffusion.platform.errors import DataError

FILES = ["a.png", "b.png", "s/a.png", "s/b.png", "with,comma.png", "\u304b\u3099.png"]
PAIRS = [("a.png", "s/a.png"), ("b.png", "s/b.png")]


def planned(text: str) -> IngestPlan:
    return plan_pairs("/data/src", text, FILES, 0)


def pairs(text: str) -> list[tuple[str, str | None]]:
    return [(sample.target, sample.sketch) for sample in planned(text).samples]


def samples(plan: IngestPlan) -> tuple[Sample, ...]:
    return tuple(sorted(plan.samples, key=lambda sample: natural(sample.target)))


def reasons(plan: IngestPlan) -> dict[str, str]:
    return {reject.path: reject.reason for reject in plan.rejects}


def test_a_pairs_csv_names_every_picture() -> None:
    text = "target,sketch,cross_reference,split\na.png,s/a.png,b.png,train\na.png,,c.png,test\n"
    plan = plan_pairs("src", text, ["a.png", "b.png", "c.png", "s/a.png", "unused.png"], 0.1)

    assert samples(plan) == (
        Sample("a", "train", "a.png", "s/a.png", None, "b.png"),
        Sample("a#2", "val", "a.png", None, None, "c.png"),
    )
    assert not plan.rejects


def test_missing_files_of_a_pairs_csv_are_rejected_by_line() -> None:
    plan = plan_pairs("src", "target,sketch\na.png,no.png\ngone.png,s.png\n", ["a.png", "s.png"], 0)

    assert reasons(plan) == {"no.png": "unreadable", "gone.png": "unreadable", "s.png": "orphan"}
    assert "line 3" in plan.rejects[1].detail


def test_a_pairs_csv_without_a_target_column_raises_data_error() -> None:
    with pytest.raises(DataError, match=r"columns are image, line; target\[,sketch"):
        plan_pairs("src", "image,line\na,b\n", ["a"], 0)


def test_an_unknown_split_in_a_pairs_csv_names_the_line() -> None:
    with pytest.raises(DataError, match="line 2: split 'holdout' is not known"):
        plan_pairs("src", "target,split\na.png,holdout\n", ["a.png"], 0)


@pytest.mark.parametrize(
    "header", ["target, sketch", "Target,SKETCH", "target,lineart", "gt,Line Art", "\ufefftarget,sketch"]
)
def test_columns_may_be_called_as_folders_may(header: str) -> None:
    assert pairs(f"{header}\na.png,s/a.png\nb.png, s/b.png\n") == PAIRS


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_any_line_end_and_delimiter_is_read(end: str, delimiter: str) -> None:
    text = "target,sketch\na.png,s/a.png\n\nb.png,s/b.png\n,\n"

    assert pairs(text.replace(",", delimiter).replace("\n", end)) == PAIRS


@pytest.mark.parametrize(
    "cell", ["./a.png", "s/../a.png", "/data/src/a.png", ".//a.png", '"a.png"', "a.png,", "s\\..\\a.png"]
)
def test_a_path_may_be_written_in_other_ways(cell: str) -> None:
    assert pairs(f"target,\n{cell}\n") == [("a.png", None)]


def test_composed_names_mean_files_that_macos_took_apart() -> None:
    assert pairs("target\n\u304c.png\n") == [("\u304b\u3099.png", None)]


def test_a_row_that_is_there_twice_counts_once() -> None:
    assert pairs("target,sketch\n" + "a.png,s/a.png\n" * 3 + "b.png,s/b.png\n") == PAIRS


def test_rows_of_one_target_stay_in_one_split() -> None:
    files = [f"{number}.png" for number in range(60)]
    text = "target,reference\n" + "".join(f"{file},{other}\n" for file in files for other in ("1.png", "2.png"))

    plan = plan_pairs("src", text, files, 0.3)

    splits = {(sample.target, sample.split) for sample in plan.samples}
    assert len(splits) == 60
    assert {split for _, split in splits} == {"train", "val"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("target,artist\na.png,me\n", "column 'artist' is not known"),
        ("target,target\na.png,b.png\n", "column 'target' is given twice"),
        ("target,color\na.png,b.png\n", "column 'target' is given twice"),
        ("target,sketch\nwith,comma.png,s/a.png\n", "line 2: 's/a.png' is not in any column; quote paths"),
        ("target,,\na.png,x,y\n", "line 2: 'x' is in column 2, which has no name; remove that column"),
        (",target\n0,t/a.png\n", "line 2: '0' is in column 1, which has no name; remove that column, or name it"),
        ('target,sketch\na.png,\n"b.png,s/b.png\n', "line 3: unexpected end of data"),
        ("target\n" + "x" * 200_000, "line 2: field larger than field limit"),
        ("target\nA.png\n", r"no target of the pairs CSV exists \(the first is 'A.png'\)"),
        ("\n\ntarget,split\n\na.png,Holdout\n", "line 5: split 'Holdout' is not known"),
        ("", "columns are none"),
    ],
)  # fmt: skip
def test_what_is_not_understood_raises_data_error_with_its_line(text: str, found: str) -> None:
    with pytest.raises(DataError, match=found) as caught:
        planned(text)
    assert "\n" not in str(caught.value)


def test_no_two_rows_have_the_same_id() -> None:
    files = ["a.png", "a.jpg", "a#2.png"]
    for order in (files, files[::-1]):
        plan = plan_pairs("src", "target\n" + "\n".join(order), files, 0.5)
        assert {sample.id for sample in plan.samples} == {"a", "a#2", "a#2#"}
