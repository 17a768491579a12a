"""What a trial of a dry run answers when it is out of memory."""

import json
import os
from dataclasses import asdict

import pytest
import torch

from animediffusion.pipelines.estimate import estimate_worker


@pytest.mark.parametrize(
    ("cuda", "tried", "error", "line"),
    [
        (True, 1, torch.OutOfMemoryError("CUDA out of memory."), "out of GPU memory with one row; lower image_size"),
        (
            True,
            16,
            torch.OutOfMemoryError("CUDA out of memory."),
            "out of GPU memory with 16 rows of a worker",
        ),
        (
            True,
            16,
            RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"),
            "out of GPU memory with 16 rows of a worker",
        ),
        (True, 1, MemoryError("weights and optimizer alone need 9 MB, 3 are free"), "weights and optimizer alone"),
        (False, 4, RuntimeError("can't allocate memory: you tried to allocate 9"), "can't allocate memory"),
    ],
)
def test_it_names_the_rows_that_were_tried(monkeypatch, tmp_path, cuda, tried, error, line):
    class Probe:
        def __init__(self, *_args):
            self.tried = tried

        def run(self):
            raise error

    monkeypatch.setattr(estimate_worker, "_Probe", Probe)
    monkeypatch.setattr(estimate_worker, "_end_with_parent", lambda _parent: None)
    monkeypatch.setattr(os, "_exit", lambda _code: None)
    order = estimate_worker.TrialOrder(os.getppid(), {}, 32, rows=16, timed_s=1.0, world_size=1, cuda=cuda)
    (tmp_path / "order.json").write_text(json.dumps(asdict(order)))
    estimate_worker.main(tmp_path, 0)
    assert json.loads((tmp_path / "0.json").read_text())["error"].startswith(line)
