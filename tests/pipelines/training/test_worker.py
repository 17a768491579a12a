"""A worker of a run without Ray: what it tells the driver when it fails."""

from types import SimpleNamespace

import pytest
import ray
import torch
from tiny import NETWORK

from animediffusion.pipelines.training import worker
from animediffusion.pipelines.training.recipe import load_recipe


@pytest.fixture
def told(monkeypatch, tmp_path):
    """(what the driver hears, a function that fails a worker with an error)."""
    path, heard = tmp_path / "tiny.yaml", []
    path.write_text(f"data: here\n{NETWORK}max_steps: 4\n")
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    progress = SimpleNamespace(
        look=SimpleNamespace(remote=dict), tell=SimpleNamespace(remote=lambda **values: heard.append(values))
    )
    config = {"run": load_recipe(str(path)).model_dump(mode="json"), "progress": progress}

    def fail(error, **more):
        def rank(_config):
            raise error

        monkeypatch.setattr(worker, "_Rank", rank)
        with pytest.raises(type(error)):
            worker.train_worker({**config, **more})

    return heard, fail


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
    heard, fail = told
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
    heard, fail = told
    fail(error)
    assert not heard
