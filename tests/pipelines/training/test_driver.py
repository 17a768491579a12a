"""Training on Ray, five runs in all: straight, resumed after a crash, phase 2 with a Ctrl-C, and two that fail.

Their workers are on CPUs. Some are made to believe in a GPU: the ranks of the first run score its checkpoints together,
and a rank of another one has no memory left.
"""

import fcntl
import json
import os
import platform
import re
import signal
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import mlflow
import pytest
import ray
import torch
import yaml
from safetensors.torch import load_file
from tiny import NETWORK
from uploads import upload_folder

from animediffusion.cli import app as cli
from animediffusion.models.bundle import load_bundle, smoke_sample
from animediffusion.models.training.ema import read_averages
from animediffusion.pipelines.evaluation.evaluate import evaluate
from animediffusion.pipelines.training import driver
from animediffusion.pipelines.training.checkpoints import CheckpointScore, fetch, latest_step
from animediffusion.pipelines.training.driver import Interrupted, train
from animediffusion.pipelines.training.plan import plan, write_json
from animediffusion.pipelines.training.recipe import load_recipe, plain
from animediffusion.pipelines.training.reporting import TrainProgress
from animediffusion.pipelines.training.result import TrainResult
from animediffusion.platform.cluster import cluster
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import ClusterError, ConfigError, DataError, TrainingError
from animediffusion.platform.storage import storage

RECIPE = f"""{NETWORK}optimizer: {{warmup_steps: 3, ema_lengths: [0.08]}}
sampler: {{steps: 2}}
batch_size: 4
num_workers: 2
max_steps: 20
checkpoint_every: 8
log_every: 5
num_samples: 5
bundle: best
"""

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield Settings(workspace=tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, faces_dataset):
    path = tmp_path_factory.mktemp("recipes") / "tiny.yaml"
    path.write_text(f"data: {faces_dataset}\n{RECIPE}")
    return str(path)


def replace_worker(patch, change):
    """Run `change` (a function without globals) in each worker before it begins."""

    def body(config):
        from animediffusion.pipelines.training import worker

        change(worker)
        worker.train_worker(config)

    patch.setattr(driver, "train_worker", body)


@dataclass(frozen=True)
class Straight:
    """A run from start to end, which had to wait for room at first, and whose ranks scored together."""

    result: TrainResult
    reports: list[TrainProgress]
    waited_for: list[str]
    """The warnings until there was room."""


@pytest.fixture(scope="module")
def straight(ray_cluster, settings, recipe):
    @ray.remote(num_cpus=1.25)
    class Server:
        def ready(self):
            return True

    def between_steps(worker):
        worker.SCORED_BETWEEN_STEPS = ("cpu",)

    reports, lines, server = [], [], Server.remote()
    ray.get(server.ready.remote())

    def report(now):
        reports.append(now)
        if now.warnings and not lines:
            ray.kill(server)
            lines.extend(now.warnings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "WAITS_S", 1.0)
        patch.setattr(cluster, "WATCH_S", 0.5)
        replace_worker(patch, between_steps)
        result = train(settings, load_recipe(recipe), report)
    return Straight(result, reports, lines)


def weights(settings, run, step):
    return load_file(settings.workspace / "runs" / run / "checkpoints" / f"step-{step:08d}" / "state.safetensors")


def crashed(settings, straight, config):
    """Leave a run as a crash of `straight` at step 16 would have left it: a checkpoint in the store, and no result."""
    work = plan(settings, config)
    work.folder.mkdir()
    (work.folder / "config.yaml").write_text(yaml.safe_dump(plain(work.config)))
    write_json(work.folder / "run.json", {"run": work.run, "mlflow_run_id": straight.mlflow_run_id, "finished": False})
    step = "step-00000016"
    upload_folder(Path(straight.run_dir, "checkpoints", step), storage.join(work.checkpoints, step))


def test_a_run_that_has_no_room_says_what_it_waits_for_and_begins_when_there_is(straight):
    line = straight.waited_for[0]
    assert re.fullmatch(r"waiting: the cluster has no room for \d x \(0.5 CPU\); 0.75 of 2 CPU free", line)
    assert straight.result.steps == 20


def test_a_run_leaves_its_settings_checkpoints_and_a_bundle_that_colors(straight, settings):
    result = straight.result
    folder = settings.workspace / "runs" / result.run
    assert result.run.startswith("tiny-")
    assert result.run_dir == str(folder)
    assert {path.name for path in folder.iterdir()} >= {"config.yaml", "run.json", "checkpoints", "bundle"}
    assert yaml.safe_load((folder / "config.yaml").read_text())["batch_size"] == 4
    kept = {f"step-{step:08d}" for step in (16, 20, result.best_step)}
    assert {path.name for path in (folder / "checkpoints").glob("step-*")} == kept
    bundle = load_bundle(result.bundle)
    smoke_sample(bundle)
    assert bundle.config.sampler.steps == 2
    assert {"recipe": "tiny", "steps": result.best_step, "parent": None}.items() <= bundle.config.provenance.items()
    average = weights(settings, result.run, result.best_step)
    for name, parameter in bundle.denoiser.named_parameters():
        assert torch.equal(parameter, average[f"average.{name}"])
    averages = read_averages(bundle)
    assert averages.kept.keys() == {0.08}
    for length, kept in averages.kept.items():
        assert all(torch.equal(tensor, average[f"average_{length:g}.{name}"]) for name, tensor in kept.items())


def test_the_result_has_the_keys_of_the_contract(straight):
    result = straight.result
    contract = {"run", "run_dir", "bundle", "steps", "resumed_from", "seconds", "images_per_s", "num_parameters"}
    contract |= {"device", "attention", "mlflow_run_id", "metrics"}
    values = result.to_json()
    assert set(values) == contract | {"scores", "best_step", "bundle_step", "num_workers", "peak_memory_mb"}
    assert set(values["metrics"]) == {"loss", "grad_norm", "data_wait"}
    assert TrainResult.from_json(json.loads(json.dumps(values))) == result
    assert 100 < result.peak_memory_mb < 4000
    assert (result.steps, result.resumed_from, result.device, result.attention) == (20, None, "cpu", "sdpa")
    assert result.images_per_s > 0
    assert straight.reports[-1].step == straight.reports[-1].max_steps == 20


def test_where_ranks_score_together_every_checkpoint_has_a_score_and_the_best_becomes_the_bundle(
    straight, settings, recipe
):
    result = straight.result
    folder = settings.workspace / "runs" / result.run
    written = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("checkpoints/*/score.json")}
    assert result.scores.keys() == {16, 20, result.best_step}
    assert {f"step-{step:08d}": asdict(score) for step, score in result.scores.items()} == written
    best = min(result.scores.values(), key=lambda score: score.ciede2000)
    assert result.scores[result.best_step] == best
    assert straight.reports[-1].best_score == best
    assert result.bundle_step == result.best_step
    found = evaluate(settings, result.bundle, load_recipe(recipe).data, limit=5).tracks
    assert best.psnr == pytest.approx(found["cross"].psnr, abs=0.01)
    assert best.psnr_same == pytest.approx(found["same"].psnr, abs=0.01)
    assert best.ciede2000 == pytest.approx(found["cross"].ciede2000, abs=0.01)


def test_a_loss_that_is_not_finite_ends_the_run_with_one_line_that_names_step_and_rows(ray_cluster, settings, recipe):
    wild = ["name=wild", "num_workers=1", "checkpoint_every=1", "num_samples=0"]
    wild += ["optimizer.learning_rate=1e30", "optimizer.warmup_steps=0"]
    with pytest.raises(TrainingError, match=r"run wild: step \d+: the .* is (nan|inf), rows train/\d+, ") as error:
        train(settings, load_recipe(recipe, wild))
    assert "\n" not in str(error.value)
    step = int(re.search(r"checkpoint of step (\d+) is kept", str(error.value))[1])
    assert latest_step(str(settings.workspace / "runs" / "wild" / "checkpoints")) == step > 0


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


def test_mlflow_has_parameters_steps_and_the_sample_grid(straight, settings):
    result = straight.result
    client = mlflow.MlflowClient(settings.tracking_uri)
    run = client.get_run(result.mlflow_run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["optimizer.warmup_steps"] == "3"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [point.step for point in history] == [5, 10, 15, 20]
    assert {"grad_norm", "learning_rate", "images_per_s", "data_wait"} <= set(run.data.metrics)
    assert any(name.startswith("loss_by_noise/") for name in run.data.metrics)
    assert [item.path for item in client.list_artifacts(run.info.run_id) if "config" in item.path] == ["config.yaml"]


def test_a_finished_run_says_so_and_is_not_trained_again(straight, settings, recipe, capsys):
    assert cli.run(["train", recipe, "--workspace", str(settings.workspace), "--json"]) == 0
    captured = capsys.readouterr()
    assert f"{straight.result.run} is finished" in captured.err
    assert json.loads(captured.out.splitlines()[-1]) == straight.result.to_json()


def test_a_run_that_crashed_continues_without_its_store_and_ends_with_the_weights_of_one_that_did_not(
    straight, settings, recipe, faulty_s3, faces_dataset, tmp_path, monkeypatch
):
    url, store = faulty_s3
    data, runs = (f"s3://bucket/{name}?endpoint_override={url}" for name in ("faces", "runs"))
    upload_folder(Path(faces_dataset), data)
    config = load_recipe(recipe, [f"data={data}", f"storage={runs}", "name=afar", "bundle=last", "log_every=1"])
    crashed(settings, straight.result, config)
    assert plan(settings, config).start_step == 16
    requests = []

    def cut(now):
        if now.step > 16 and not requests:
            requests.append(len(store.requests))
            store.fail("refuse", seconds=3)

    monkeypatch.setattr(cluster, "POLL_S", 0.05)
    again = train(settings, config, cut)
    assert (again.resumed_from, again.steps, again.mlflow_run_id) == (16, 20, straight.result.mlflow_run_id)
    written = [one for one in store.requests[requests[0] :] if one.startswith(("PUT", "POST"))]
    assert any("step-00000020/state.safetensors" in one for one in written), "the outage came too late"
    fetch(plan(settings, config).checkpoints, 20, tmp_path)
    found, expected = load_file(tmp_path / "state.safetensors"), weights(settings, straight.result.run, 20)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    bundle, same = load_bundle(again.bundle), load_bundle(straight.result.bundle)
    assert replace(bundle.config, provenance={}) == replace(same.config, provenance={})
    tensors = dict(bundle.denoiser.named_parameters())
    assert again.bundle_step == 20
    assert all(torch.equal(tensor, expected[f"average.{name}"]) for name, tensor in tensors.items())
    # A task scored this checkpoint while the run continued.
    found = evaluate(settings, again.bundle, faces_dataset, limit=5).tracks
    cross, same = found["cross"], found["same"]
    assert again.scores[20] == CheckpointScore(cross.psnr, cross.ssim, cross.ciede2000, same.psnr)


def test_phase_2_starts_from_phase_1_continues_in_a_second_execution_and_ctrl_c_saves_a_checkpoint(
    straight, settings, faces_dataset, monkeypatch
):
    parent = straight.result.bundle
    overrides = [f"data={faces_dataset}", f"init_from={parent}", "name=second", "num_workers=1", "batch_size=4"]
    config = load_recipe("phase2", [*overrides, "max_steps=3000", "num_samples=0", "log_every=1"])
    sent, fits = [], []
    rows, trainer = driver.unread_rows, driver.build_trainer

    def few(run, world_size):
        from animediffusion.pipelines.data import stream

        stream.MOST_BLOCKS = 2  # one of 64 rows: 16 steps of four rows
        return rows(run, world_size)

    def build_trainer(*args):
        fits.append(latest_step(plan(settings, config).checkpoints))
        return trainer(*args)

    def interrupt(now):
        if now.step > 16 and not sent:
            sent.append(now.step)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(driver, "unread_rows", few)
    monkeypatch.setattr(driver, "build_trainer", build_trainer)
    with pytest.raises(Interrupted) as stopped:
        train(settings, config, interrupt)
    assert fits == [0, 16], "one execution of Ray Data ran out of rows at step 16"
    step = stopped.value.step
    assert (stopped.value.thing, stopped.value.signum) == ("run second", signal.SIGINT)
    assert sent[0] <= step < 3000
    work = plan(settings, config)
    assert (work.start_step, work.finished) == (step, False)
    assert work.config.network == load_bundle(parent).config.network
    trained, first = weights(settings, "second", step), dict(load_bundle(parent).denoiser.named_parameters())
    changed = [name for name in first if not torch.equal(trained[f"model.{name}"], first[name])]
    assert len(changed) == len(first)
    assert all(torch.isfinite(trained[f"model.{name}"]).all() for name in first)
    # It did not start again: the network is still near its parent.
    apart = sum(float((trained[f"model.{name}"] - first[name]).square().sum()) for name in first)
    assert apart < 0.5 * sum(float(value.square().sum()) for value in first.values())


def test_without_a_checkpoint_the_latest_step_is_zero(tmp_path):
    assert latest_step(str(tmp_path)) == 0


def test_what_cannot_be_trained_raises_an_error_before_training(ray_cluster, settings, recipe, faces_dataset, tmp_path):
    with pytest.raises(DataError, match="no dataset"):
        plan(settings, load_recipe(recipe, [f"data={tmp_path}"]))
    with pytest.raises(ConfigError, match=r"image_size: 64; the data in .* is 32 px"):
        plan(settings, load_recipe(recipe, ["image_size=64"]))
    with pytest.raises(ConfigError, match="image_size: 32; this network needs a multiple of 64"):
        plan(settings, load_recipe(recipe, ["network.patch_size=64"]))
    with pytest.raises(ClusterError, match="4 workers take 2 of 2 CPUs; lower num_workers or cpus_per_worker"):
        train(settings, load_recipe(recipe, ["num_workers=4", "cpus_per_worker=0.5", "name=wide"]))
    assert not (settings.workspace / "runs" / "wide").exists()


def test_a_second_process_does_not_train_the_same_run(ray_cluster, settings, recipe):
    config = load_recipe(recipe, ["name=twice"])
    folder = plan(settings, config).folder
    folder.mkdir(parents=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(TrainingError, match="run twice: another process trains it now; wait until it ends"):
            train(settings, config)
    assert not (folder / "run.json").exists()


def test_the_plan_of_a_run_depends_on_no_ray(settings, recipe):
    work = plan(settings, load_recipe(recipe, ["name=planned"]))
    assert (work.run, work.start_step, work.image_size, work.parent) == ("planned", 0, 32, None)
    assert work.storage == str(settings.workspace / "runs" / "planned")
