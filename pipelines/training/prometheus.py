"""Prometheus metrics of a training run, exported by rank 0 through Ray.

Ray adds the prefix `ray_` to each name; the tag `run` is the run's name. The dashboard in infra/grafana shows these
metrics. A cluster that exports no metrics, such as the embedded one, discards them.
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
    """Prometheus gauges of one run.

    Args:
        run: name of the run.
    """

    def __init__(self, run: str) -> None:
        self._gauges = {name: Gauge(PREFIX + name, told, tag_keys=("run",)) for name, told in GAUGES.items()}
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": run})

    def set(self, **values: float) -> None:
        """Set the gauges listed in GAUGES; ignore other values."""
        for name, gauge in self._gauges.items():
            if name in values:
                gauge.set(float(values[name]))
