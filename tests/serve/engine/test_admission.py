from hypothesis import given
from hypothesis import strategies as st

from animediffusion.serve.engine.admission import MIN_STEPS, StepTimes, steps_until_done

claims = st.tuples(st.integers(1, 2), st.integers(1, 9))


def simulated(num_slots, running, before, own):
    """The same, step by step."""
    running, line, now = [list(claim) for claim in running], [*before, own], 0
    while True:
        while line and (not running or sum(p for p, _ in running) + line[0][0] <= num_slots):
            running.append(list(line.pop(0)))
        if not line and running[-1][1] == 0:
            return now
        now += 1
        last = running[-1]
        running = [[p, steps - 1] for p, steps in running]
        if not line and last[1] == 1:
            return now
        running = [claim for claim in running if claim[1]]


@given(st.integers(2, 6), st.lists(claims, max_size=3), st.lists(claims, max_size=8), claims)
def test_the_estimate_equals_a_simulation_step_by_step(num_slots, running, before, own):
    while sum(slots for slots, _ in running) > num_slots:
        running.pop()
    assert steps_until_done(num_slots, running, before, own) == simulated(num_slots, running, before, own)


def test_a_guided_request_fits_a_batch_of_one_slot():
    assert steps_until_done(1, [], [(2, 5)], (1, 3)) == 8


def test_the_pace_is_silent_until_it_knows_enough():
    pace = StepTimes()
    for seconds in (9.0, *[0.5] * (MIN_STEPS - 2)):
        pace.add(seconds)
        assert (pace.fastest, pace.typical) == (0.0, 0.0)
    pace.add(0.4)
    assert (pace.fastest, pace.typical) == (0.4, 0.5)
