import numpy as np
import pytest

from animediffusion.models.sampler_options import SamplerOptions
from animediffusion.serve.protocol import ColorizeJob
from animediffusion.serve.replica.traffic_split import choose_version, hash_position, loaded_shares
from animediffusion.serve.retry_after import LONGEST_S, UNKNOWN_S, CompletionRate

WHITE = np.full((64, 48), 255, np.uint8)
GRAY = np.full((32, 32, 3), 128, np.uint8)


def place(seed: int, lines: np.ndarray = WHITE, reference: np.ndarray = GRAY) -> float:
    return hash_position(ColorizeJob(lines=lines, references=(reference,), options=SamplerOptions(seed=seed)))


def test_requests_that_differ_are_spread_evenly():
    counts, _ = np.histogram([place(seed) for seed in range(4000)], bins=10, range=(0, 1))
    assert counts.sum() == 4000
    assert abs(counts - 400).max() < 100  # five standard deviations


def test_what_is_drawn_and_with_which_colors_matters():
    lines = WHITE.copy()
    lines[8:24, 8:24] = 0
    assert len({place(1), place(2), place(1, lines), place(1, WHITE, GRAY + 1), place(1, WHITE[:32])}) == 5
    assert place(1) == place(1, WHITE.copy(), GRAY.copy())


def test_a_version_is_drawn_as_often_as_its_share_says():
    slots = np.linspace(0, 1, 1000, endpoint=False)
    drawn = [choose_version({"2": 0.2, "1": 0.8}, place) for place in slots]
    assert drawn.count("2") == 200
    assert {choose_version({"2": 1.0, "1": 0.0}, place) for place in slots} == {"2"}
    assert choose_version({"3": 0.1, "2": 0.2, "1": 0.7}, np.nextafter(1, 0)) == "1"


@pytest.mark.parametrize(
    ("loaded", "fallback", "expected"),
    [
        ({"1", "2"}, "1", {"2": 0.2, "1": 0.8}),
        ({"1"}, "1", {"1": 1.0}),
        ({"0", "2"}, "0", {"2": 0.2, "0": 0.8}),
        ({"2"}, None, {"2": 1.0}),
        (set(), None, {}),
    ],
)
def test_the_share_of_a_version_that_is_not_there_goes_to_the_fallback(loaded, fallback, expected):
    assert loaded_shares({"2": 0.2, "1": 0.8}, loaded, fallback) == pytest.approx(expected)


def test_retry_after_is_the_present_work_at_the_rate_so_far():
    now = [0.0]
    pace = CompletionRate(lambda: now[0])
    assert pace.retry_after_s() == UNKNOWN_S
    for _ in range(20):
        pace.started()
    for _ in range(12):
        now[0] += 0.5
        pace.ended(finished=True)
    assert pace.retry_after_s() == 4  # 8 pictures at two a second
    now[0] += 11
    assert pace.retry_after_s() == 12  # nothing moved for 11 s: 11 pictures took 16.5 s
    now[0] += 10_000
    assert pace.retry_after_s() == LONGEST_S


def test_idle_time_does_not_count_as_slow():
    now = [0.0]
    pace = CompletionRate(lambda: now[0])
    for _ in range(5):
        pace.started()
        now[0] += 1
        pace.ended(finished=True)
        now[0] += 1000
    for _ in range(4):
        pace.started()
    assert pace.retry_after_s() == 4
    for _ in range(3):
        pace.ended(finished=False)
    assert pace.retry_after_s() == 1
