"""Sample CPU, memory, network and GPU during a run with MLflow's monitors, and record the samples ourselves.

MLflow's own thread would end at the first request that the store does not answer.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from animediffusion.platform.network import why_unreachable


class SystemMetrics(SystemMetricsMonitor):  # type: ignore[misc]
    """A thread that takes a sample every 10 s, or every MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL seconds.

    Args:
        run_id: id of the run.
        tracking_uri: URI of the run's store; if it answers, a resumed run continues after its last sample.
        record: is called with the metrics of a sample and its step.
    """

    _process: threading.Thread | None

    def __init__(self, run_id: str, tracking_uri: str, record: Callable[[dict[str, float], int], None]) -> None:
        logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
        answers = not tracking_uri.startswith(("http://", "https://")) or why_unreachable(tracking_uri) is None
        super().__init__(run_id, resume_logging=answers, tracking_uri=tracking_uri)
        self._record = record
        self.start()

    def monitor(self) -> None:
        """Take samples until finish() is called."""
        while not self._shutdown_event.wait(self.sampling_interval):
            self.collect_metrics()
            self.publish_metrics(self.aggregate_metrics())

    def publish_metrics(self, metrics: dict[str, float]) -> None:
        """Record one sample."""
        prefix = self._metrics_prefix + (f"{self.node_id}/" if self.node_id else "")
        self._record({prefix + key: value for key, value in metrics.items()}, self._logging_step)
        self._logging_step += 1
        for monitor in self.monitors:
            monitor.clear_metrics()

    def finish(self) -> None:
        """Stop sampling."""
        self._shutdown_event.set()
        if self._process is not None:
            self._process.join()
            self._process = None
