"""Statistics of a replica as plain numbers, without Ray. serve/replica/prometheus.py exports them to Prometheus."""

from __future__ import annotations

import threading
from collections import Counter, deque
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from animediffusion.serve.engine.engine import Engine

Labels = tuple[str, ...]
REQUESTS, SWAPS, STEPS, ROWS, CACHE = "requests", "swaps", "steps", "rows", "cache"


@dataclass(frozen=True, kw_only=True)
class ReplicaStats:
    """Current load of one version in one replica."""

    version: str
    share: float
    """Share of new requests; 0 for a version that only finishes its requests."""
    running: int
    queued: int
    max_batch: int


class ReplicaCounters:
    """Counters since the start of the replica. They never decrease: the counts of a removed version are kept.

    requests  (version, outcome): requests; the outcome is ok, failed, late, cancelled or busy
    swaps     (version, outcome): versions that were loaded and tested; the outcome is ok or failed
    steps     (version,): engine steps, that is, network evaluations of a running batch
    rows      (version,): evaluated rows of the network in these engine steps
    cache     (version, outcome): references that were encoded already (hit) or had to be encoded (miss)
    """

    def __init__(self) -> None:
        self._totals: dict[str, Counter[Labels]] = {name: Counter() for name in (REQUESTS, SWAPS, STEPS, ROWS, CACHE)}
        self._step_seconds: deque[tuple[str, float]] = deque(maxlen=16384)
        self._seen: WeakKeyDictionary[Engine, tuple[int, ...]] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def count(self, name: str, version: str, outcome: str) -> None:
        """Count one request or swap."""
        with self._lock:
            self._totals[name][version, outcome] += 1

    def add_step(self, version: str, seconds: float) -> None:
        """Record the duration of an engine step."""
        self._step_seconds.append((version, seconds))

    def collect(self, version: str, engine: Engine) -> None:
        """Add the counts of an engine since the previous call."""
        with self._lock:
            counts = engine.counts
            now = (counts.steps, counts.rows_evaluated, counts.reference_hits, counts.reference_misses)
            before = self._seen.get(engine, (0, 0, 0, 0))
            self._seen[engine] = now
            steps, rows, hits, misses = (new - old for new, old in zip(now, before, strict=True))
            self._totals[STEPS][(version,)] += steps
            self._totals[ROWS][(version,)] += rows
            self._totals[CACHE][version, "hit"] += hits
            self._totals[CACHE][version, "miss"] += misses

    def totals(self) -> dict[str, Counter[Labels]]:
        """Return a copy of all counters: name -> labels -> count."""
        with self._lock:
            return {name: totals.copy() for name, totals in self._totals.items()}

    def take_step_seconds(self) -> list[tuple[str, float]]:
        """Return (version, seconds) of the engine steps since the previous call."""
        return [self._step_seconds.popleft() for _ in range(len(self._step_seconds))]
