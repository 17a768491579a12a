"""What a run will take: two real trials of some steps without Ray, and what follows from such numbers."""

import io
import json
import re
from contextlib import redirect_stdout
from dataclasses import replace

import pytest
import torch
import yaml
from tiny import NETWORK

from animediffusion.cli import app as cli
from animediffusion.pipelines.estimate.estimate import (
    Estimate,
    NoEstimate,
    TrialLayout,
    derive,
    duration,
    estimate,
    lines,
    trial_layout,
)
from animediffusion.pipelines.estimate.estimate_worker import CheckpointCost, StepCost, TrialAnswer
from animediffusion.pipelines.training.plan import plan
from animediffusion.pipelines.training.recipe import load_recipe
from animediffusion.platform.config import Settings

RECIPE = f"""{NETWORK}optimizer: {{warmup_steps: 3}}
batch_size: 4
num_workers: 2
max_steps: 20
"""

ANSWER = TrialAnswer(
    ready=0.0,
    one=StepCost(seconds=0.1, memory_mb=600.0),
    row_mb=20.0,
    rows=8,
    steps=12,
    timed=StepCost(seconds=0.8, memory_mb=740.0),
    others=0.0,
    memory_saving_mb=600.0,
    device="cpu",
    gpu_memory_mb=None,
    checkpoint=CheckpointCost(seconds=1.0, size_mb=40.0, weights_mb=10.0),
)


def derived(work, workers, *answers, slowdown=1.0):
    """The estimate of a run with one thread per worker, from the answers of its processes."""
    trial = TrialLayout(workers, len(answers), cuda=answers[0].device != "cpu", slowdown=slowdown)
    return derive(work, trial, 1, answers, import_s=4.0)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
            patch.delenv(name, raising=False)
        yield Settings(workspace=tmp_path_factory.mktemp("parent") / "workspace")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, faces_dataset):
    path = tmp_path_factory.mktemp("recipes") / "tiny.yaml"
    path.write_text(f"data: {faces_dataset}\n{RECIPE}")
    return str(path)


@pytest.fixture(scope="module")
def work(settings, recipe):
    """A function that plans a tiny run with some settings."""
    return lambda *overrides: plan(settings, load_recipe(recipe, overrides))


@pytest.fixture(scope="module")
def facts(settings, recipe):
    """What the command prints, of two workers with two rows each."""
    out = io.StringIO()
    with redirect_stdout(out):
        assert cli.run(["--workspace", str(settings.workspace), "train", recipe, "--dry-run", "--json"]) == 0
    return json.loads(out.getvalue())


@pytest.fixture(scope="module")
def tried(facts):
    return facts["estimate"]


@pytest.mark.slow
def test_a_dry_run_tries_two_workers_without_ray_and_writes_nothing(facts, tried, settings):
    assert (facts["config"]["batch_size"], facts["num_parameters"] > 0) == (4, True)
    assert (tried["possible"], tried["device"]) == (True, "cpu")
    assert (tried["num_workers"], tried["rows_per_worker"], tried["steps"]) == (2, 2, 20)
    assert tried["steps_timed"] >= 2
    assert tried["images_per_s"] * tried["seconds_per_step"] == pytest.approx(4)
    assert tried["training_s"] == pytest.approx(20 * tried["seconds_per_step"])
    assert tried["seconds"] > tried["training_s"] + tried["start_s"]
    assert not settings.workspace.exists()


@pytest.mark.slow
def test_memory_and_disk_are_those_of_the_network(tried, work):
    with torch.device("meta"):
        network = work().config.bundle_config(32).build()
    # Weights, their average, and two moments.
    state_mb = 4 * 4 * sum(parameter.numel() for parameter in network.parameters()) / 2**20
    assert tried["checkpoint_mb"] == pytest.approx(state_mb, rel=0.1)
    assert 200 < tried["memory_per_worker_mb"] < 3000
    assert tried["memory_mb"] > 2 * tried["memory_per_worker_mb"]


@pytest.mark.slow
def test_many_rows_take_longer_and_need_more_memory(tried, work):
    more = estimate(work("num_workers=1", "batch_size=512"), timed_s=0.5)
    assert more.rows_per_worker == 512
    assert more.seconds_per_step > 2 * tried["seconds_per_step"]
    assert more.memory_per_worker_mb > tried["memory_per_worker_mb"]


def test_a_trial_that_fails_is_an_error_of_one_line(work, tmp_path):
    planned = work("num_workers=1")
    lost = replace(planned, config=planned.config.model_copy(update={"data": str(tmp_path)}))
    found = estimate(lost)
    assert isinstance(found, NoEstimate)
    assert lines(found) == [f"# no estimate: {found.note}"]
    assert "no dataset" in found.note


def test_minutes_become_the_steps_that_fit_in_them(work):
    found = derived(work("max_minutes=10"), 2, replace(ANSWER, rows=2))
    assert found.steps * found.seconds_per_step == pytest.approx(600, rel=0.01)
    assert found.training_s == pytest.approx(600, rel=0.01)


def test_a_run_that_is_resumed_has_only_the_rest_to_do(work):
    found = derived(replace(work("max_steps=100"), start_step=60), 2, ANSWER)
    assert found.steps == 40


@pytest.mark.parametrize(("rows", "seconds", "memory"), [(8, 0.8, 740), (1, 0.1, 600), (32, 3.2, 1220)])
def test_rows_that_were_not_tried_follow_from_one_and_the_most(work, rows, seconds, memory):
    one = derived(work(f"batch_size={8 * 2}"), 2, ANSWER)
    found = derived(work(f"batch_size={rows * 2}"), 2, ANSWER)
    assert found.seconds_per_step / one.seconds_per_step == pytest.approx(seconds / 0.8)
    assert found.memory_per_worker_mb - one.memory_per_worker_mb == pytest.approx(memory - 740)


def test_the_slowest_worker_counts_and_workers_that_share_cores_take_longer(work):
    slow = replace(ANSWER, timed=replace(ANSWER.timed, seconds=1.6))
    alone, both = derived(work("batch_size=16"), 2, ANSWER), derived(work("batch_size=16"), 2, ANSWER, slow)
    shared = derived(work("batch_size=16"), 2, ANSWER, slowdown=3.0)
    assert both.seconds_per_step == pytest.approx(2 * alone.seconds_per_step)
    assert shared.seconds_per_step == pytest.approx(3 * alone.seconds_per_step)


def test_the_estimate_names_the_share_that_other_programs_used(work):
    found = derived(work(), 2, replace(ANSWER, others=0.5))
    assert found.images_per_s_alone == pytest.approx(2 * found.images_per_s)
    note = "#   note    other programs used 50% of the CPUs during the trial; alone about "
    assert lines(found)[-1].startswith(note)
    assert len(lines(replace(found, others_share=0.0))) == len(lines(found)) - 1


def test_a_run_that_is_too_large_for_the_gpu_says_how_many_workers_it_needs(work):
    gpu = replace(ANSWER, device="NVIDIA X", gpu_memory_mb=24_000.0, row_mb=5000.0, rows=1)
    gpu = replace(gpu, timed=replace(gpu.timed, memory_mb=6000.0), memory_saving_mb=6000.0)
    found = derived(work("batch_size=16", "num_workers=2"), 2, gpu)
    # 8 rows: 6000 + 7 * 5000 MB and the allowance; with 4 rows 21,000 MB fit.
    assert (found.workers_that_fit, found.gpu_memory_mb) == (4, 24_000.0)
    shown = lines(found)
    assert "41.5 GB of GPU memory (1.5 GB allowed for CUDA and NCCL) per worker" in shown[3]
    way = "use 4 workers (num_workers=4) or lower batch_size"
    assert shown[-1] == f"#   note    a worker does not fit: the GPU has 23.4 GB; {way}"
    fits = derived(work("batch_size=16", "num_workers=4"), 4, gpu)
    assert "does not fit" not in lines(fits)[-1]


def test_on_cpus_nothing_is_compared_with_a_card(work):
    found = derived(work(), 2, ANSWER)
    assert (found.gpu_memory_mb, found.workers_that_fit) == (None, None)


@pytest.mark.slow
def test_every_number_that_is_printed_has_a_unit(tried):
    shown = lines(Estimate(**{key: value for key, value in tried.items() if key != "possible"}))
    assert yaml.safe_load("\n".join(shown)) is None
    assert "2 x 2 rows, " in shown[0]
    assert re.search(r"speed +[\d.e+]+ images/s, [\d.e-]+ s per step$", shown[1])
    assert re.search(r"time +\d+ (s|min).* for 20 steps, \d+ (s|min).* in all$", shown[2])
    assert re.search(r"memory +[\d.]+ GB of memory per worker, [\d.]+ GB in all$", shown[3])
    assert re.search(r"disk +\d+ MB a checkpoint, \d+ MB in all$", shown[4])


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_workers_with_gpus_are_not_guessed_on_a_machine_without(work):
    found = estimate(work("use_gpu=true"))
    assert lines(found) == ["# no estimate: the workers need GPUs, but this machine has none"]


def test_on_a_cluster_one_worker_is_tried_and_the_estimate_says_so(work, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "ray.example:6379")
    trial = trial_layout(work("use_gpu=false").config)
    assert (trial.workers, trial.processes) == (2, 1)
    assert trial.note.startswith("one worker on this machine was measured, not the cluster at ray.example:6379")


def test_a_finished_run_takes_nothing(work):
    found = estimate(replace(work(), finished=True))
    assert found.to_json() == {"possible": False, "note": "the run is finished, nothing is left to do"}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (60, "1 min"), (310, "5 min 10 s"), (12_000, "3 h 20 min"), (1_051_200, "12 d 4 h")],
)
def test_durations_are_for_people(seconds, text):
    assert duration(seconds) == text
