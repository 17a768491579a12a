"""A worker of a run without Ray: what it does when memory is short, or fails otherwise."""

from contextlib import nullcontext, suppress
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch
from tiny import NETWORK

from animediffusion.pipelines.training import driver, worker
from animediffusion.pipelines.training.recipe import load_recipe
from animediffusion.pipelines.training.reporting import RunAddress, TrainProgress
from animediffusion.pipelines.training.trial_report import TrialContext
from animediffusion.pipelines.training.validation import SharedColorizer
from animediffusion.platform.cluster import cluster
from animediffusion.platform.errors import TrainingError


@pytest.fixture
def context(tmp_path):
    """What a worker gets; the progress actor only collects failures."""
    path, failures = tmp_path / "tiny.yaml", []
    path.write_text(f"data: here\n{NETWORK}max_steps: 4\n")
    start, ignore = (lambda _worker: failures[0] if failures else None), (lambda *_: None)
    calls = {"start": start, "fail": failures.append, "latest": TrainProgress, "stop": ignore, "warn": ignore}
    progress = SimpleNamespace(**{name: SimpleNamespace(remote=call) for name, call in calls.items()})
    progress.failures = failures
    address = RunAddress("uri", "id", tmp_path / "unsent")
    return worker.WorkerContext(load_recipe(str(path)), "tiny", 32, str(tmp_path), address, progress)


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch):
    """The real context would start a Ray for this process, or look for one."""
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_actor_id=lambda: "worker"))


@pytest.fixture
def failing(monkeypatch, context):
    """(failures that the driver learns, a function that fails a worker with an error)."""
    monkeypatch.setattr(ray, "get", lambda answer: answer)

    def fail(error, **changes):
        def rank(_context):
            raise error

        monkeypatch.setattr(worker, "Rank", rank)
        with pytest.raises(type(error)):
            worker.train_worker({"context": replace(context, **changes)})

    return context.progress.failures, fail


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
    ],
)
def test_whoever_says_that_memory_is_short_the_run_is_not_tried_again(failing, error):
    failures, fail = failing
    fail(error)
    assert failures[0].reason.startswith("out of memory on ")
    assert failures[0].advice == "lower batch_size or use more workers (num_workers)"
    failures.clear()
    fail(error, trial=TrialContext((2,), None, None))
    assert not failures, "a search continues with other settings"


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        ray.exceptions.RayError("a read task was out of memory"),
    ],
)
def test_what_may_pass_is_tried_again(failing, error):
    failures, fail = failing
    fail(error)
    assert not failures


def test_attention_that_cannot_run_is_not_tried_again_and_says_what_to_set(monkeypatch, context):
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    monkeypatch.setattr(cluster, "waits", lambda _report: nullcontext(lambda: None))
    wanted = replace(context, config=context.config.model_copy(update={"attention": "xformers"}))
    failures, tries = context.progress.failures, []

    def fit():
        """Start the worker again after each error, as Ray Train does."""
        while len(tries) < 5:
            tries.append(len(failures))
            with suppress(ValueError):
                worker.train_worker({"context": wanted})
                break

    context.progress.latest.remote = lambda: TrainProgress(failure=failures[0] if failures else None)
    work = SimpleNamespace(run="tiny", checkpoints=context.checkpoints)
    reason = "run tiny: attention is 'xformers', which cannot run: it needs CUDA.*; set attention=auto$"
    with pytest.raises(TrainingError, match=reason):
        driver.run_and_watch(SimpleNamespace(fit=fit), work, context.progress, None)
    assert tries == [0, 1], "the second worker returns immediately"


def shared_colorizer(config):
    pictures = np.zeros((3, 16, 16, 3), np.uint8)
    rows = {"target": pictures, "reference": pictures, "cross_reference": pictures, "sketch": pictures[..., 0]}
    rows |= {flag: np.zeros(3, bool) for flag in ("has_sketch", "has_reference", "has_cross")}
    return SharedColorizer(config.bundle_config(16), rows)


def test_a_lack_of_memory_for_scoring_costs_the_score_and_not_the_run(monkeypatch, context):
    lines, config = [], load_recipe("demo", ["num_samples=3"])
    context.progress.warn = SimpleNamespace(remote=lines.append)
    rank = worker.Rank.__new__(worker.Rank)
    rank.context, rank.config, rank.rank, rank.world_size = context, config, 0, 1
    rank.colorizer, rank.state = shared_colorizer(config), SimpleNamespace(averaged=lambda: None)

    def full(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("animediffusion.pipelines.training.validation.colorize", full)
    assert [rank.color_samples(), rank.color_samples()] == [None, None]
    assert [line.partition(" on ")[0] for line in lines] == ["checkpoints are no longer scored: out of memory"]
    assert lines[0].endswith("; set num_samples below 3")


def raising(error):
    def call():
        raise error

    return call


def test_any_other_error_of_a_score_is_not_hidden():
    colorizer = shared_colorizer(load_recipe("demo"))
    with pytest.raises(RuntimeError, match="illegal"):
        colorizer.color(SimpleNamespace(averaged=raising(torch.AcceleratorError("CUDA error: illegal access"))), 0, 1)
