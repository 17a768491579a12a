"""What a replica counts, in plain numbers: no Ray in it. serve/replica/prometheus.py shows them to Prometheus."""

from __future__ import annotations

import threading
from collections import Counter, deque
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from animediffusion.serve.engine.engine import Engine

Labels = tuple[str, ...]
REQUESTS, SWAPS, TURNS, ROWS, CACHE = "requests", "swaps", "turns", "rows", "cache"


@dataclass(frozen=True, kw_only=True)
class ReplicaStats:
    """One version in one replica, now."""

    version: str
    share: float
    """Of new requests; 0 for one that only finishes what it has."""
    running: int
    queued: int
    max_batch: int


class Measures:
    """Totals since the replica began. They never fall: a version that left keeps what it did.

    requests  (version, outcome): ok, failed, late, cancelled or busy
    swaps     (version, outcome): versions that were loaded and tried, ok or failed
    turns     (version,): network evaluations of a running batch
    rows      (version,): rows of the network in those
    cache     (version, outcome): references, encoded already (hit) or now (miss)
    """

    def __init__(self) -> None:
        self._totals: dict[str, Counter[Labels]] = {name: Counter() for name in (REQUESTS, SWAPS, TURNS, ROWS, CACHE)}
        self._turn_seconds: deque[tuple[str, float]] = deque(maxlen=16384)
        self._seen: WeakKeyDictionary[Engine, tuple[int, ...]] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def count(self, name: str, version: str, outcome: str) -> None:
        """Count one request or swap."""
        with self._lock:
            self._totals[name][version, outcome] += 1

    def turn(self, version: str, seconds: float) -> None:
        """Note how long a turn took."""
        self._turn_seconds.append((version, seconds))

    def collect(self, version: str, engine: Engine) -> None:
        """Add what an engine did since the previous call."""
        with self._lock:
            counts = engine.counts
            now = (counts.turns, counts.rows_evaluated, counts.reference_hits, counts.reference_misses)
            before = self._seen.get(engine, (0, 0, 0, 0))
            self._seen[engine] = now
            turns, rows, hits, misses = (new - old for new, old in zip(now, before, strict=True))
            self._totals[TURNS][(version,)] += turns
            self._totals[ROWS][(version,)] += rows
            self._totals[CACHE][version, "hit"] += hits
            self._totals[CACHE][version, "miss"] += misses

    def totals(self) -> dict[str, Counter[Labels]]:
        """All of them, as they are now."""
        with self._lock:
            return {name: totals.copy() for name, totals in self._totals.items()}

    def take_turn_seconds(self) -> list[tuple[str, float]]:
        """(version, seconds) of the turns since the previous call."""
        return [self._turn_seconds.popleft() for _ in range(len(self._turn_seconds))]
