"""benchmarks/open.py: its drawings are the same everywhere, and scores are those of a known picture."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from animediffusion.platform.errors import ConfigError


@pytest.fixture(scope="module")
def benchmark():
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    yield importlib.import_module("open")
    sys.path.remove(folder)


@pytest.fixture(scope="module")
def case(benchmark):
    return benchmark.draw_case(0)


def test_the_drawings_are_the_published_ones(benchmark, case):
    assert benchmark.digest([case])[:16] == "c88fb72745f515dc"


def test_the_truth_is_right_everywhere_and_a_picture_without_its_skin_is_not(benchmark, case):
    base = benchmark.CONDITIONS[0]
    perfect = benchmark.score("perfect", lambda *_: case.truth, case, base)
    assert perfect[:-1] == (0, 0, 1, 1, 1)
    skin = np.bincount(case.regions.labels.ravel()).argmax()
    wrong = np.where((case.regions.labels == skin)[..., None], np.uint8([0, 255, 0]), case.truth)
    found = benchmark.score("wrong", lambda *_: wrong, case, base)
    counted = 1 - (case.regions.labels == skin)[case.off_lines].mean()
    assert found.within_6 == pytest.approx(counted, abs=0.01)
    assert 0.8 < found.regions < 1


def test_conditions_change_only_what_they_name(benchmark, case):
    given = {one.name: benchmark.inputs(case, one) for one in benchmark.CONDITIONS}
    sketch, references, hints = given["base"]
    assert (sketch.shape, len(references), hints) == ((512, 512), 1, [])
    assert len(given["8 hints"][2]) == 8
    assert (given["8 hints"][0] == sketch).all()
    assert (given["two other views"][1][0] == references[0]).all()
    assert (given["gaps of 12 px"][0] != sketch).mean() > (given["gaps of 6 px"][0] != sketch).mean() > 0
    for x, y, color in given["8 hints"][2]:
        assert case.off_lines[y, x]
        assert tuple(case.regions.colors[case.regions.labels[y, x] - 1]) == color


def test_hints_flood_their_region_with_their_color(benchmark, case):
    eight = next(one for one in benchmark.CONDITIONS if one.hints)
    sketch, references, hints = benchmark.inputs(case, eight)
    picture = benchmark.flooded(sketch, references, hints)
    assert all(tuple(picture[y, x]) == color for x, y, color in hints)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (None, "mine: returned NoneType; a NumPy array, uint8 (512, 512, 3)"),
        (np.zeros((512, 512), np.uint8), "mine: returned uint8 (512, 512); a NumPy array"),
        (np.zeros((512, 512, 3)), "mine: returned float64 (512, 512, 3); a NumPy array"),
    ],
)
def test_a_method_that_returns_no_picture_is_named(benchmark, case, made, said):
    with pytest.raises(ConfigError) as caught:
        benchmark.score("mine", lambda *_: made, case, benchmark.CONDITIONS[0])
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rows", "0"], "error: --rows: 0; at least 1"),
        (["--out", "/nowhere/x.md"], "error: --out /nowhere/x.md: its folder does not exist"),
    ],
)
def test_what_would_fail_after_minutes_is_said_before(benchmark, monkeypatch, arguments, said):
    monkeypatch.setattr(sys, "argv", ["open.py", *arguments])
    with pytest.raises(SystemExit, match=said):
        benchmark.main()


@pytest.mark.parametrize("name", ["nowhere:color", "json:nothing", "json", ":"])
def test_a_method_that_does_not_exist_is_named(benchmark, name):
    with pytest.raises(ConfigError, match=f"--method {name}: "):
        benchmark.imported(name)
