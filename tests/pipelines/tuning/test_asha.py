"""Which trials are asked to end early, and how the end of a trial is called; without Ray."""

import json
from types import SimpleNamespace

import pytest

from animediffusion.pipelines.tuning.asha import AshaScheduler


@pytest.fixture
def asha():
    """(a scheduler of the rungs 2, 6 and 18, the MLflow runs of the trials that it asks to end)."""
    asked = []
    stops = SimpleNamespace(add=SimpleNamespace(remote=asked.append))
    return AshaScheduler((2, 6, 18), stops), asked


def reported(asha, trial, step, psnr):
    """Report as a trial does; returns the decision of the scheduler."""
    one = SimpleNamespace(trial_id=trial)
    if step == 2:
        asha.on_trial_add(None, one)
    result = {"step": step, "training_iteration": 1, "psnr": psnr, "mlflow_run_id": f"run of {trial}"}
    return asha.on_trial_result(None, one, result)


def test_a_trial_that_is_not_among_the_best_third_is_asked_to_end_and_is_not_killed(asha):
    scheduler, asked = asha
    decisions = [reported(scheduler, name, 2, psnr) for name, psnr in (("a", 12.0), ("b", 15.0), ("c", 11.0))]
    assert asked == ["run of c"]
    decisions.append(reported(scheduler, "b", 6, 16.0))
    assert set(decisions) == {scheduler.CONTINUE}
    assert asked == ["run of c"]


def test_a_trial_is_asked_once_and_not_at_its_last_step(asha):
    scheduler, asked = asha
    for name, psnr in (("a", 15.0), ("b", 10.0)):
        reported(scheduler, name, 2, psnr)
    reported(scheduler, "b", 6, 10.0)
    reported(scheduler, "a", 18, 1.0)
    assert asked == ["run of b"]


@pytest.mark.parametrize(
    ("trial", "step", "ended"), [("a", 18, "finished"), ("b", 2, "stopped early"), ("a", 6, "cut")]
)
def test_the_end_of_a_trial_has_a_name_and_one_that_was_cut_is_tried_again(asha, trial, step, ended):
    scheduler, _ = asha
    for name, psnr in (("a", 15.0), ("b", 10.0)):
        reported(scheduler, name, 2, psnr)
    result = {"step": step, "psnr": 9.0, "sampler_steps": 4, "mlflow_run_id": "r", "history": json.dumps([[2, 9.0]])}
    verdict = scheduler.judge(trial, result)
    assert verdict.values == [9.0]
    kept = verdict.details
    assert (kept["ended"], kept["open"], kept["history"]) == (ended, ended == "cut", ((2, 9.0),))


def test_a_trial_that_never_reported_is_not_judged(asha):
    assert asha[0].judge("a", {"step": 1}) is None
