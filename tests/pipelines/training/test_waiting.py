"""A run that is stopped while it has no workers: an autoscaler has no GPU to give, or a node with workers was lost."""

import os
import signal
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import ray

from animediffusion.pipelines.training import driver
from animediffusion.pipelines.training.reporting import TrainProgress
from animediffusion.platform.cluster import cluster, ray_compat
from animediffusion.platform.errors import Interrupted

ALIVE, DEAD = "a" * 32, "d" * 32
"""Ids of actors."""


def watch(monkeypatch, tmp_path, latest):
    """Send SIGINT to a run whose fit() ends when it is asked to, and whose workers said `latest`."""
    asked, work = threading.Event(), SimpleNamespace(run="patient", checkpoints=str(tmp_path))
    given = threading.Event()

    def fit():
        os.kill(os.getpid(), signal.SIGINT)
        if not given.wait(8):
            given.set()  # there was room after all

    def stop():
        asked.set()
        if latest.worker == ALIVE:
            given.set()

    @contextmanager
    def waits(_tell):
        yield lambda: None

    monkeypatch.setattr(cluster, "waits", waits)
    monkeypatch.setattr(ray_compat, "is_alive", ALIVE.__eq__)
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    calls = {"latest": lambda: latest, "stop": stop, "warn": lambda _line: None}
    progress = SimpleNamespace(**{name: SimpleNamespace(remote=call) for name, call in calls.items()})
    try:
        with pytest.raises(Interrupted, match="run patient: stopped at step 0"):
            driver.run_and_watch(SimpleNamespace(fit=fit), work, progress, None)
        return asked.is_set(), given.is_set()
    finally:
        given.set()


def test_without_workers_it_ends_at_once(monkeypatch, tmp_path):
    assert watch(monkeypatch, tmp_path, TrainProgress()) == (True, False)


def test_after_its_workers_were_lost_it_ends_at_once(monkeypatch, tmp_path):
    assert watch(monkeypatch, tmp_path, TrainProgress(worker=DEAD)) == (True, False)


def test_with_workers_it_ends_when_they_have_saved(monkeypatch, tmp_path):
    assert watch(monkeypatch, tmp_path, TrainProgress(worker=ALIVE)) == (True, True)
