"""Which trials are asked to end early, how the end of a trial is called, and searches that are killed; without Ray."""

import json
import random
from types import SimpleNamespace

import pytest
from optuna.distributions import FloatDistribution
from optuna.samplers import TPESampler
from ray.tune.schedulers import AsyncHyperBandScheduler

from animediffusion.pipelines.tuning.asha import REDUCTION, AshaScheduler, Rungs
from animediffusion.pipelines.tuning.optuna_searcher import Study, TrialEntry, TrialLog, new_study

STEPS = (2, 6, 18)


class KilledError(Exception):
    """A search was killed."""


@pytest.fixture
def asha(tmp_path):
    """(a scheduler of the rungs 2, 6 and 18, the MLflow runs of the trials that it asks to end)."""
    return scheduler(Rungs(STEPS, tmp_path / "rungs.jsonl"))


def scheduler(rungs):
    asked = []
    stops = SimpleNamespace(add=SimpleNamespace(remote=asked.append))
    return AshaScheduler(rungs, STEPS[-1], stops), asked


def metrics(trial, step, psnr):
    history = json.dumps([[step, psnr]])
    return {"step": step, "psnr": psnr, "sampler_steps": 4, "history": history, "mlflow_run_id": f"run of {trial}"}


def reported(asha, trial, step, psnr):
    """Report as a trial does; returns the decision of the scheduler."""
    one = SimpleNamespace(trial_id=trial, config={"name": trial})
    return asha.on_trial_result(None, one, metrics(trial, step, psnr))


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


def test_the_decisions_are_those_of_rays_own_scheduler(tmp_path):
    rays = AsyncHyperBandScheduler(
        time_attr="step", metric="psnr", mode="max", grace_period=2, max_t=18, reduction_factor=REDUCTION
    )
    rungs, generator = Rungs(STEPS, tmp_path / "rungs.jsonl"), random.Random(0)
    for number in range(60):
        one = SimpleNamespace(trial_id=str(number))
        rays.on_trial_add(None, one)
        for step in STEPS[:-1]:
            psnr = generator.choice([generator.uniform(10, 20), 15.0])
            stops = rays.on_trial_result(None, one, {"step": step, "psnr": psnr}) == rays.STOP
            assert rungs.stops({"name": number}, step, psnr) == stops
            if stops:
                break


def search(folder, trials, killed_after):
    """Run a search of one trial at a time, killed after so many reports; returns what is known of its trials."""
    log = TrialLog(folder / "trials.jsonl")
    asha, asked = scheduler(Rungs(STEPS, folder / "rungs.jsonl", log.read()))
    study = Study(
        new_study(TPESampler(seed=0), ["maximize"]),
        {"rate": FloatDistribution(0.0, 1.0)},
        lambda params: {"rate": round(params["rate"], 1)},  # many suggestions are known
        asha.judge,
        log,
        [{"rate": 0.5}],
        "psnr",
        lambda seed: TPESampler(seed=seed, n_startup_trials=3),
    )
    while study.num_known < trials:
        name = f"{id(study)}-{study.num_known}"
        point = study.suggest(name)
        if point == Study.FINISHED:
            break
        for step in STEPS:
            psnr = 10 + random.Random(f"{point['rate']} {step}").uniform(0, 3) - abs(point["rate"] - 0.3)
            trial = SimpleNamespace(trial_id=name, config=point)
            asha.on_trial_result(None, trial, metrics(name, step, psnr))
            killed_after -= 1
            if not killed_after:
                raise KilledError
            if f"run of {name}" in asked:
                break
        study.on_trial_complete(name, metrics(name, step, psnr))
    done = [entry for entry in log.read() if entry.values is not None]
    return [(entry.point["rate"], entry.details["step"], entry.details["ended"]) for entry in done]


def test_a_search_that_is_killed_five_times_stops_the_trials_that_it_stops_in_a_calm_run(tmp_path):
    calm = search(tmp_path / "calm", 10, 0)
    assert {ended for *_, ended in calm} == {"finished", "stopped early"}
    for killed_after in (1, 4, 2, 6, 3):
        with pytest.raises(KilledError):
            search(tmp_path / "killed", 10, killed_after)
    assert search(tmp_path / "killed", 10, 0) == calm


def test_a_trial_that_a_kill_cut_short_gets_the_decision_that_it_got_before(tmp_path):
    path = tmp_path / "rungs.jsonl"
    for name, psnr in (("a", 12.0), ("b", 15.0), ("c", 11.0)):
        Rungs(STEPS, path).stops({"name": name}, 2, psnr)
    with path.open("a") as file:
        file.write('{"point": {"na')  # killed in the middle of a line
    again = Rungs(STEPS, path)
    assert [again.stops({"name": name}, 2, 13.0) for name in "abc"] == [False, False, True]
    assert not again.stops({"name": "d"}, 2, 14.5)  # two thirds of 11, 12 and 15 are below 13
    assert again.stops({"name": "e"}, 2, 14.0)


def test_the_rungs_of_a_search_without_a_file_of_them_are_those_of_its_trial_log(tmp_path):
    entries = [
        TrialEntry({"name": "a"}, [15.0], {}, {"ended": "finished", "history": [[2, 12.0], [6, 14.0], [18, 15.0]]}),
        TrialEntry({"name": "b"}, [11.0], {}, {"ended": "stopped early", "history": [[2, 11.0]]}),
        TrialEntry({"name": "c"}, None, {}, {"ended": "failed", "reason": "none given"}),
    ]
    rungs = Rungs(STEPS, tmp_path / "rungs.jsonl", entries)
    assert rungs.stops({"name": "d"}, 2, 11.5)
    assert rungs.stops({"name": "e"}, 6, 13.0)
    assert not rungs.stops({"name": "f"}, 6, 14.0)
