"""The connection of rank 0 to the driver, over a real Ray."""

import time

import pytest
import ray

from animediffusion.pipelines.training import reporting
from animediffusion.pipelines.training.reporting import DriverReports, ProgressActor, TrainProgress

ANSWERS_S = 0.1
"""How long an actor on a busy node takes to answer."""


@ray.remote(num_cpus=0)
class BusyActor(ProgressActor.__ray_metadata__.modified_class):
    """A ProgressActor on a busy node."""

    def report(self, now):
        time.sleep(ANSWERS_S)
        return super().report(now)

    def stop_requested(self):
        time.sleep(ANSWERS_S)
        return super().stop_requested()


@pytest.mark.parametrize("every", [1, 1000])
def test_a_stop_arrives_although_answers_are_late_and_reports_are_rare(ray_cluster, monkeypatch, every):
    monkeypatch.setattr(reporting, "ASK_S", 0.05)
    actor = BusyActor.remote()
    reports = DriverReports(actor)

    def stops_within(steps: int) -> bool:
        """Whether a run sees the stop at one of its steps; a worker asks, reports and decides in this order."""
        for step in range(1, steps + 1):
            time.sleep(3 * ANSWERS_S)
            reports.ask()
            if step % every == 0:
                reports.send(TrainProgress(step=step))
            if reports.stop_requested():
                return True
        return False

    try:
        assert not stops_within(4)
        ray.get(actor.stop.remote())
        assert stops_within(5)
    finally:
        ray.kill(actor)
