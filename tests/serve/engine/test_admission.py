from hypothesis import given
from hypothesis import strategies as st

from animediffusion.serve.engine.admission import MIN_TURNS, TurnTimes, turns_until_done

claims = st.tuples(st.integers(1, 2), st.integers(1, 9))


def simulated(num_places, running, before, own):
    """The same, turn by turn."""
    running, line, now = [list(claim) for claim in running], [*before, own], 0
    while True:
        while line and (not running or sum(p for p, _ in running) + line[0][0] <= num_places):
            running.append(list(line.pop(0)))
        if not line and running[-1][1] == 0:
            return now
        now += 1
        last = running[-1]
        running = [[p, turns - 1] for p, turns in running]
        if not line and last[1] == 1:
            return now
        running = [claim for claim in running if claim[1]]


@given(st.integers(2, 6), st.lists(claims, max_size=3), st.lists(claims, max_size=8), claims)
def test_it_is_what_turn_by_turn_comes_to(num_places, running, before, own):
    while sum(places for places, _ in running) > num_places:
        running.pop()
    assert turns_until_done(num_places, running, before, own) == simulated(num_places, running, before, own)


def test_a_guided_request_fits_a_batch_of_one_place():
    assert turns_until_done(1, [], [(2, 5)], (1, 3)) == 8


def test_the_pace_is_silent_until_it_knows_enough():
    pace = TurnTimes()
    for seconds in (9.0, *[0.5] * (MIN_TURNS - 2)):
        pace.add(seconds)
        assert (pace.fastest, pace.typical) == (0.0, 0.0)
    pace.add(0.4)
    assert (pace.fastest, pace.typical) == (0.4, 0.5)
