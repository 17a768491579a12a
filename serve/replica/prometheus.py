"""Export of a replica's statistics to Prometheus via Ray, which serves them on the metrics port of every node.

Ray adds the prefix `ray_` to the names, which docs/serving.md lists. Every metric except versions_missing has a label
`version`; Ray adds labels for application, deployment and replica.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter as Totals
from typing import Any

from ray.serve.metrics import Counter, Gauge, Histogram

from animediffusion.serve.replica.follower import Follower
from animediffusion.serve.replica.stats import CACHE, REQUESTS, ROWS, STEPS, SWAPS, Labels, ReplicaStats

PERIOD_S = 2.0
STEP_BOUNDARIES_S = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0]
PREFIX = "animediffusion_"
_BY_OUTCOME = ("version", "outcome")

log = logging.getLogger(__name__)


class Exporter:
    """Exports the statistics of a replica on a background thread.

    It must be created in a Serve replica, from which Ray takes the labels.

    Args:
        follower: the follower of the replica.
        period_s: seconds between two exports.
    """

    def __init__(self, follower: Follower, period_s: float = PERIOD_S) -> None:
        self.follower = follower
        self.period_s = period_s
        self._gauges = {
            name: Gauge(f"{PREFIX}{name}", what, tag_keys=("version",))
            for name, what in {
                "queued": "Requests that wait for a slot in the running batch.",
                "running": "Requests in the running batch.",
                "occupancy": "Part of the batch's slots that were taken, 0 to 1.",
                "traffic_share": "Share of new requests, 0 to 1.",
            }.items()
        }
        self._missing = Gauge(f"{PREFIX}versions_missing", "Desired versions that are not loaded here.")
        self._counters = {
            REQUESTS: requests_counter(),
            SWAPS: _counter("swaps_total", "Versions that were loaded and tested.", _BY_OUTCOME),
            CACHE: _counter(
                "reference_cache_total",
                "References that were encoded already (hit) or had to be encoded (miss).",
                _BY_OUTCOME,
            ),
            STEPS: _counter("turns_total", "Engine steps: network evaluations of a running batch.", ("version",)),
        }
        self._step_seconds = Histogram(
            f"{PREFIX}turn_seconds",
            "Seconds that an engine step took.",
            boundaries=STEP_BOUNDARIES_S,
            tag_keys=("version",),
        )
        self._shown: dict[str, Totals[Labels]] = {}
        self._versions: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def start(self) -> None:
        """Start the thread, which exports now and after every period."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread without waiting for the period."""
        self._stop.set()

    def export(self) -> None:
        """Update every metric."""
        replica = self.follower.replica
        gauges = {one.version: one for one in replica.stats()}
        totals = replica.counters.totals()
        gains = {name: total - self._shown.get(name, Totals()) for name, total in totals.items()}
        self._shown = totals
        for name, counter in self._counters.items():
            for labels, gain in gains[name].items():
                counter.inc(gain, tags=dict(zip(_BY_OUTCOME, labels, strict=False)))
        for version, seconds in replica.counters.take_step_seconds():
            self._step_seconds.observe(seconds, tags={"version": version})
        for version in self._versions | set(gauges):  # The gauges of a removed version must become 0.
            for name, value in _values(gauges.get(version), gains[STEPS][version,], gains[ROWS][version,]).items():
                self._gauges[name].set(value, tags={"version": version})
        self._versions = set(gauges)
        self._missing.set(len(self.follower.missing))

    def _run(self) -> None:
        while True:
            try:
                self.export()
            except Exception:  # An error in the metrics must not stop the replica.
                log.exception("the metrics of this engine could not be exported")
            if self._stop.wait(self.period_s):
                return


def requests_counter() -> Any:
    """Return the counter requests_total, to which the HTTP side adds busy requests, with an empty version."""
    return _counter("requests_total", "Requests by outcome.", _BY_OUTCOME)


def _counter(name: str, what: str, labels: tuple[str, ...]) -> Any:
    return Counter(f"{PREFIX}{name}", what, tag_keys=labels)


def _values(now: ReplicaStats | None, steps: int, rows: int) -> dict[str, float]:
    if now is None:
        return {"queued": 0, "running": 0, "occupancy": 0, "traffic_share": 0}
    occupancy = min(1.0, rows / (steps * now.max_batch)) if steps else 0.0
    return {"queued": now.queued, "running": now.running, "occupancy": occupancy, "traffic_share": now.share}
