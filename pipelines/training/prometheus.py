"""What rank 0 of a training run exports to Prometheus, through Ray, beside what it writes to MLflow.

Ray writes `ray_` before each name; the tag `run` is the run's name. infra/grafana shows them. Where a cluster exports
no metrics, as the embedded one, they go nowhere.
"""

from __future__ import annotations

from ray.util.metrics import Gauge

GAUGES = {
    "step": "Optimizer steps done.",
    "images_per_s": "Images a second, of all workers together, since the last report.",
    "data_wait": "Share of the time that rank 0 waited for rows, 0 to 1.",
    "loss": "Loss of the last step.",
    "workers": "Workers of the run.",
}
PREFIX = "animediffusion_train_"


class RunGauges:
    """The numbers of one run.

    Args:
        run: its name.
    """

    def __init__(self, run: str) -> None:
        self._gauges = {name: Gauge(PREFIX + name, told, tag_keys=("run",)) for name, told in GAUGES.items()}
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": run})

    def set(self, **values: float) -> None:
        """Export what is named in GAUGES; the rest is for others."""
        for name, gauge in self._gauges.items():
            if name in values:
                gauge.set(float(values[name]))
