"""The search with training: what may be changed, how trials are judged, and one small search on Ray."""

from pathlib import Path

import pytest
import torch
from optuna import create_study
from optuna.samplers import RandomSampler
from tiny import NETWORK

from animediffusion.models.training.loop import TrainState
from animediffusion.pipelines.evaluation.measure import load_rows
from animediffusion.pipelines.training.recipe import TrainConfig, load_recipe
from animediffusion.pipelines.training.trial_report import TrialContext, TrialReport, TrialReporter
from animediffusion.pipelines.tuning.schedule_search import rung_steps, trial_config, tune_schedule
from animediffusion.pipelines.tuning.schedule_space import ScheduleSpace, as_recipe, changed
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import ConfigError
from animediffusion.platform.tracking import tracking

PHASE_1 = ["phase1", "demo", "animediffusion", "ssimbad", "small"]


def loaded(recipe):
    return load_recipe(recipe, ["max_steps=9"])


@pytest.mark.parametrize("recipe", PHASE_1)
def test_a_search_begins_with_the_recipe_itself(recipe):
    base = loaded(recipe)
    assert TrainConfig.check(changed(base, ScheduleSpace(base).own())) == base


@pytest.mark.parametrize("recipe", PHASE_1)
def test_every_choice_of_parameters_is_a_recipe_that_can_be_built_and_read_back(recipe, tmp_path):
    base = loaded(recipe)
    space = ScheduleSpace(base)
    study = create_study(sampler=RandomSampler(seed=0))
    for _ in range(20):
        point = space.point(study.ask(fixed_distributions=space.distributions).params)
        config = TrainConfig.check(changed(base, point))
        with torch.device("meta"):
            bundle = config.bundle_config(64)
            config.objective.build(bundle.build(), bundle.sampler, 0)
        assert space.point({**space.first(), **point}) == point
        path = tmp_path / "found.yaml"
        path.write_text(as_recipe(recipe, base, point, 1, "found", "Found in a test"))
        written = load_recipe(str(path), ["max_steps=9"])
        for key in ("network", "path", "prediction", "objective", "optimizer", "augment", "batch_size", "data"):
            assert getattr(written, key) == getattr(config, key), key
        assert (written.recipe, written.sampler.steps) == ("found", 1)


def test_what_has_no_effect_is_not_part_of_a_point():
    space = ScheduleSpace(loaded("phase1"))
    first = space.first()
    assert space.point({**first, "path": "cosine", "times": "uniform"}) == {
        "path": "cosine",
        "times": "uniform",
        "prediction": "x0",
        "loss_weight": "flat",
        "learning_rate": 2e-3,
        "drop_reference": 0.1,
    }


def test_noise_is_predicted_only_where_sampling_can_start_from_it():
    space = ScheduleSpace(loaded("phase1"))
    eps = {**space.first(), "prediction": "eps"}
    assert [space.point({**eps, "path": path})["prediction"] for path in ("linear", "linear_to_noise", "flow")] == [
        "eps",
        "v",
        "v",
    ]


def test_the_rate_for_muon_goes_with_the_learning_rate():
    base = loaded("phase1")
    found = TrainConfig.check(changed(base, {**ScheduleSpace(base).own(), "learning_rate": 4e-3}))
    assert (found.optimizer.learning_rate, found.optimizer.muon_learning_rate) == (4e-3, 0.04)


def test_rungs_are_a_ninth_a_third_and_all_of_the_steps():
    assert rung_steps(270) == (30, 90, 270)
    assert rung_steps(9) == (1, 3, 9)
    with pytest.raises(ConfigError, match="--steps: 8; at least 9"):
        rung_steps(8)


@pytest.mark.parametrize("recipe", ["phase2", "animediffusion-strict"])
def test_a_recipe_that_is_not_phase_1_from_scratch_is_rejected(recipe, tmp_path):
    with pytest.raises(ConfigError, match="start from phase1"):
        tune_schedule(Settings(workspace=tmp_path), "data", recipe=recipe)


@pytest.fixture
def recipe(tmp_path, faces_dataset):
    """A small network with a learning rate that is far too low."""
    path = tmp_path / "start.yaml"
    slow = "optimizer: {learning_rate: 1.0e-5, warmup_steps: 1}\nsampler: {steps: 2}\nbatch_size: 4\nmax_steps: 9\n"
    path.write_text(f"data: {faces_dataset}\n{NETWORK}{slow}")
    return str(path)


def test_a_rung_reports_what_the_averaged_weights_do_on_fixed_rows(recipe, faces_dataset):
    base = load_recipe(recipe)
    config = trial_config(base, ScheduleSpace(base).own(), [1, 3, 9], "trial")
    assert (config.max_steps, config.num_workers, config.max_failures, config.num_samples) == (9, 1, 0, 0)
    rows = load_rows(faces_dataset, "val", 4).searched
    reporter = TrialReporter(TrialContext((1,), rows, None), config.bundle_config(32), "r")
    state = TrainState(config.bundle_config(32).build(), config.optimizer, 9)
    state.step = 1
    found = reporter.report(state)
    assert (found.step, found.mlflow_run_id, found.history) == (1, "r", ((1, found.psnr),))
    assert found.sampler_steps in (1, 2)
    assert TrialReport.of(found.to_metrics()) == found
    assert reporter.report(state).psnr == found.psnr


@pytest.mark.ray
def test_a_search_ends_with_a_recipe_and_child_runs_and_resumes_where_it_ended(
    ray_cluster, recipe, faces_dataset, tmp_path, monkeypatch
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    settings, lines = Settings(workspace=tmp_path / "workspace"), []
    out = tmp_path / "found.yaml"

    def search(trials):
        arguments = {"recipe": recipe, "trials": trials, "steps": 18, "out": out, "progress": lines.append}
        return tune_schedule(settings, faces_dataset, **arguments)

    result = search(2)
    keys = ["trials", "finished", "stopped_early", "failed", "cut", "best", "base", "front", "recipe", "folder"]
    assert list(result.to_json()) == keys
    assert (result.trials, result.failed, result.cut) == (2, 0, 0)
    assert result.finished + result.stopped_early == 2
    assert result.finished >= 1
    assert [line.split()[1] for line in lines if line.startswith("trial ")] == ["1/2", "2/2"]
    assert result.base.point["learning_rate"] == 1e-5
    assert result.best.psnr >= result.base.psnr
    assert result.front[0].steps == 2
    assert result.recipe == str(out)
    assert load_recipe(str(out)).optimizer.learning_rate == result.best.point["learning_rate"]
    client = tracking.setup(settings)
    [experiment] = [e for e in client.search_experiments() if e.name == tracking.TUNING]
    runs = client.search_runs([experiment.experiment_id])
    [parent] = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 2
    assert all(run.info.status == "FINISHED" for run in [parent, *children])
    assert {run.data.tags["ended"] for run in children} <= {"finished", "stopped early"}
    assert max(run.data.metrics["psnr"] for run in children) == pytest.approx(result.best.psnr)
    assert not (Path(result.folder) / "runs").exists()

    again = search(2)
    assert (again.trials, again.best) == (2, result.best)
    assert sum(line.startswith("trial ") for line in lines) == 2
