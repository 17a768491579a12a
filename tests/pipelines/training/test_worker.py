"""A worker of a run without Ray: what it does when memory is short, or fails otherwise."""

from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch
from tiny import NETWORK

from animediffusion.pipelines.training import worker
from animediffusion.pipelines.training.recipe import load_recipe
from animediffusion.pipelines.training.validation import SharedPainter


@pytest.fixture
def told(monkeypatch, tmp_path):
    """(what the driver hears, a function that fails a worker with an error, the worker's config)."""
    path, heard = tmp_path / "tiny.yaml", []

    def tell(**values):
        heard.extend([values] if "failed" in values else [])

    path.write_text(f"data: here\n{NETWORK}max_steps: 4\n")
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    progress = SimpleNamespace(look=SimpleNamespace(remote=dict), tell=SimpleNamespace(remote=tell))
    config = {"run": load_recipe(str(path)).model_dump(mode="json"), "progress": progress}

    def fail(error, **more):
        def rank(_config):
            raise error

        monkeypatch.setattr(worker, "_Rank", rank)
        with pytest.raises(type(error)):
            worker.train_worker({**config, **more})

    return heard, fail, config


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
    ],
)
def test_whoever_says_that_memory_is_short_the_run_is_not_tried_again(told, error):
    heard, fail, _ = told
    fail(error)
    assert heard[0]["failed"].startswith("out of memory on ")
    assert heard[0]["advice"] == "lower batch_size or use more workers (num_workers)"
    heard.clear()
    fail(error, rungs={"steps": [2]})
    assert not heard, "a search goes on with other settings"


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        ray.exceptions.RayError("a read task was out of memory"),
    ],
)
def test_what_may_pass_is_tried_again(told, error):
    heard, fail, _ = told
    fail(error)
    assert not heard


def test_attention_that_cannot_run_is_not_tried_again_and_says_what_to_set(told):
    heard, _, config = told
    with pytest.raises(ValueError, match="attention is 'xformers'"):
        worker.train_worker({**config, "run": {**config["run"], "attention": "xformers"}})
    assert heard[0]["failed"].startswith("attention is 'xformers', which cannot run: it needs CUDA")
    assert heard[0]["advice"] == "set attention=auto"


def test_rows_of_a_score_for_which_there_is_no_memory_cost_the_score_and_not_the_run(
    monkeypatch,
):
    lines, config = [], load_recipe("demo", ["num_samples=3"])
    pictures = np.zeros((3, 16, 16, 3), np.uint8)
    rows = {"target": pictures, "reference": pictures, "cross_reference": pictures, "sketch": pictures[..., 0]}
    rows |= {flag: np.zeros(3, bool) for flag in ("has_sketch", "has_reference", "has_cross")}
    rank = worker._Rank.__new__(worker._Rank)
    rank.painter, rank.run_config, rank.rank, rank.world_size = SharedPainter(config, 16, rows), config, 0, 1
    rank.state, rank._warn = SimpleNamespace(averaged=lambda: None), lines.append

    def full(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("animediffusion.pipelines.training.validation.colorize", full)
    assert [rank._paint(), rank._paint()] == [None, None]
    assert [line.partition(" on ")[0] for line in lines] == ["no more scores: out of memory"]
    assert lines[0].endswith("beside what trains; set num_samples below 3")


def raising(error):
    def call():
        raise error

    return call


def test_any_other_error_of_a_score_is_not_hidden(monkeypatch):
    painter = SharedPainter.__new__(SharedPainter)
    painter._config, painter._chunks = None, []
    with pytest.raises(RuntimeError, match="illegal"):
        painter.paint(SimpleNamespace(averaged=raising(torch.AcceleratorError("CUDA error: illegal access"))), 0, 1)
