"""What GPUs change in a run, in workers on CPUs that are made to believe it; and a run that has to wait for room."""

import platform
import re
from dataclasses import dataclass

import pytest
import ray
import torch
from tiny import NETWORK

from animediffusion.models.bundle import load_bundle
from animediffusion.pipelines.evaluation.evaluate import evaluate
from animediffusion.pipelines.training import driver
from animediffusion.pipelines.training.driver import train
from animediffusion.pipelines.training.recipe import load_recipe
from animediffusion.pipelines.training.result import TrainResult
from animediffusion.platform.cluster import cluster
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import TrainingError

RECIPE = f"""{NETWORK}optimizer: {{warmup_steps: 3}}
sampler: {{steps: 2}}
batch_size: 4
max_steps: 12
checkpoint_every: 4
keep_checkpoints: 1
log_every: 4
num_samples: 5
"""

pytestmark = pytest.mark.ray


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Settings(workspace=tmp_path / "workspace")


@pytest.fixture
def recipe(tmp_path, faces_dataset):
    path = tmp_path / "tiny.yaml"
    path.write_text(f"data: {faces_dataset}\n{RECIPE}")
    return str(path)


def replace_worker(monkeypatch, change):
    """Run `change` (a function without globals) in each worker before it begins."""

    def body(config):
        from animediffusion.pipelines.training import worker

        change(worker)
        worker.train_worker(config)

    monkeypatch.setattr("animediffusion.pipelines.training.driver.train_worker", body)


def test_a_run_that_is_out_of_gpu_memory_is_not_tried_again_and_says_what_to_lower(
    ray_cluster, settings, recipe, monkeypatch, tmp_path
):
    attempts = str(tmp_path / "attempts")

    def fill(worker):
        fit = worker.fit

        def full(state, *args, **kwargs):
            with open(attempts, "a") as file:
                file.write(".")
            if torch.distributed.get_rank() == 0:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
            fit(state, *args, **kwargs)

        worker.fit = full

    replace_worker(monkeypatch, fill)
    with pytest.raises(TrainingError) as error:
        train(settings, load_recipe(recipe, ["name=full", "num_samples=0"]))
    advice = "the checkpoint of step 0 is kept; lower batch_size or use more workers (num_workers)"
    assert str(error.value) == f"run full: out of memory on {platform.node()}; {advice}"
    with open(attempts) as file:
        assert len(file.read()) <= 2, "each of two ranks has come to its steps once"


@dataclass(frozen=True)
class Waited:
    """A run that had to wait for room, whose ranks score together, and that needs two executions of Ray Data."""

    result: TrainResult
    fits: int
    settings: Settings
    data: str
    warnings: list[str]


@pytest.fixture(scope="module")
def waited(ray_cluster, faces_dataset, tmp_path_factory):
    @ray.remote(num_cpus=1.25)
    class Server:
        def ready(self):
            return True

    def between_steps(worker):
        worker.SCORED_BETWEEN_STEPS = ("cpu",)

    build, fit, fits = driver.unread_rows, driver.build_trainer, []

    def few(run, world_size):
        from animediffusion.pipelines.data import stream

        stream.MOST_BLOCKS = 2  # one of 64 rows for each worker: 32 steps of two rows
        return build(run, world_size)

    def build_trainer(*args):
        fits.append(1)
        return fit(*args)

    folder, lines, server = tmp_path_factory.mktemp("waited"), [], Server.remote()
    ray.get(server.ready.remote())
    (folder / "tiny.yaml").write_text(f"data: {faces_dataset}\n{RECIPE}")
    settings = Settings(workspace=folder / "workspace")

    def report(now):
        if now.warnings and not lines:
            ray.kill(server)
            lines.extend(now.warnings)

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr(cluster, "WAITS_S", 1.0)
        patch.setattr(cluster, "WATCH_S", 0.5)
        patch.setattr(driver, "unread_rows", few)
        patch.setattr(driver, "build_trainer", build_trainer)
        replace_worker(patch, between_steps)
        overrides = ["name=patient", "bundle=best", "max_steps=40", "checkpoint_every=15"]
        result = train(settings, load_recipe(str(folder / "tiny.yaml"), overrides), report)
    return Waited(result, len(fits), settings, faces_dataset, lines)


def test_a_run_that_has_no_room_says_what_it_waits_for_and_begins_when_there_is(waited):
    line = waited.warnings[0]
    assert re.fullmatch(r"waiting: the cluster has no room for \d x \(0.5 CPU\); 0.75 of 2 CPU free", line)
    assert waited.result.steps == 40


def test_where_ranks_score_together_every_checkpoint_has_a_score_and_the_best_becomes_the_bundle(waited):
    result = waited.result
    assert max(result.scores) == 40
    assert result.bundle_step == result.best_step
    assert load_bundle(result.bundle).config.provenance["steps"] == result.best_step
    found = evaluate(waited.settings, result.bundle, waited.data, limit=5).tracks
    score = result.scores[result.best_step]
    assert score.psnr == pytest.approx(found["cross"].psnr, abs=0.01)
    assert score.psnr_same == pytest.approx(found["same"].psnr, abs=0.01)
    assert score.ciede2000 == pytest.approx(found["cross"].ciede2000, abs=0.01)


def test_a_run_that_needs_more_reads_than_one_execution_may_have_continues_in_another(waited):
    assert (waited.result.steps, waited.fits) == (40, 2)
