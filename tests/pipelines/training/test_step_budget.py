"""How many steps fit into a time, on a clock that the test moves."""

from itertools import accumulate

import pytest

from animediffusion.pipelines.training.step_budget import ENOUGH, StepBudget


def first_answer(seconds, step_s):
    """(steps done, more steps) when a run that is asked after every tenth step has its answer."""
    now = [0.0]
    pace = StepBudget(seconds, lambda: now[0])
    for done, now[0] in enumerate(accumulate(step_s), 1):
        pace.step()
        if done % 10 == 0 and (more := pace.more()) is not None:
            return done, more
    raise AssertionError("no answer")


def test_the_first_half_of_the_timed_steps_only_warms_up():
    assert first_answer(600, [30.0] + [2.0] * 19 + [0.5] * 20) == (ENOUGH, (600 - 78) * 2)


@pytest.mark.parametrize("seconds", [12, 150, 170])
def test_a_slow_machine_gets_a_length_before_its_time_is_over(seconds):
    done, more = first_answer(seconds, [10.0] + [5.0] * 100)

    assert done <= max(10, seconds / 5)
    assert (done + 1) * 5 + more * 5 <= max(seconds, (done + 2) * 5)


def test_compiling_in_the_first_steps_is_not_taken_for_a_slow_machine():
    assert first_answer(60, [25.0, 0.01, 10.0] + [0.01] * 100)[0] == ENOUGH


def test_the_length_is_unknown_too_early():
    pace = StepBudget(60)
    assert pace.more() is None
    pace.step()
    assert pace.more() is None
