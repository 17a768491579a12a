"""Background thread that keeps the loaded versions of a replica up to date with its model source.

serve/replica/model_source.py decides which versions the replica should load.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from animediffusion.platform.errors import AnimeDiffusionError, BundleError, RegistryError, StorageError
from animediffusion.platform.registry.client import ALIASES
from animediffusion.serve.protocol import EngineStatus
from animediffusion.serve.replica.model_source import ModelSource, TrafficPlan
from animediffusion.serve.replica.replica import Replica
from animediffusion.serve.replica.stats import SWAPS
from animediffusion.serve.replica.traffic_split import loaded_shares

FIRST_PAUSE_S, LONGEST_PAUSE_S = 30.0, 900.0
"""First and longest pause before a failed version is retried."""
MAX_FORMER_CHAMPIONS = 3
"""Number of former champions that a new replica tries if the present champion does not work."""

log = logging.getLogger(__name__)


@dataclass
class _Failure:
    """The latest failure of a version."""

    error: str
    pause_s: float
    """Pause before the retry; 0 if the registry or the storage was unreachable, so the version itself may work."""
    retry_at: float
    """Time of the follower's clock of the earliest retry."""


class Follower:
    """Polls the model source on a background thread and keeps the replica up to date.

    A new version is loaded and tested while the other versions answer requests, and it gets traffic once it works. A
    version that does not work is retried after a growing pause, with a fresh copy if the bundle failed its tests. Until
    then, the previous version answers in its place. If the registry is unreachable, the replica keeps its versions. All
    replicas of one registry have read the same desired versions one period after the last change.

    Args:
        replica: the replica to keep up to date.
        source: provides the desired versions.
        period_s: average time between two polls. The time is random, so that replicas do not poll simultaneously.
        clock: returns the time for pauses, in seconds.
    """

    def __init__(
        self,
        replica: Replica,
        source: ModelSource,
        period_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.replica = replica
        self.source = source
        self.period_s = period_s
        self._clock = clock
        self.desired: dict[str, str | None] = dict.fromkeys(ALIASES)
        self.missing: list[str] = []
        """Desired versions that this replica has not loaded."""
        self._polled_at = float("-inf")
        self._warned = ""
        self._failures: dict[str, _Failure] = {}
        self._fallback: str | None = None
        """The loaded version that gets the traffic of versions that are not loaded."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follow", daemon=True)

    def start(self, patience_s: float = 0.0) -> None:
        """Load the desired versions, then poll in the background.

        A version that does not work raises no error; `replica.error` then contains the reason.

        Args:
            patience_s: how long to retry if no version can be loaded because the registry or storage is unreachable.

        Raises:
            RegistryError: the registry or storage was still unreachable after `patience_s`.
        """
        end = time.monotonic() + patience_s
        while not self.step() and not any(one.pause_s for one in self._failures.values()):
            if time.monotonic() >= end:
                raise RegistryError(
                    self.source.model, f"no version can be loaded ({self.replica.error})", "see `animediffusion doctor`"
                )
            self._stop.wait(min(1.0, self.period_s))
        self._thread.start()

    def stop(self) -> None:
        """End the thread within one period."""
        self._stop.set()

    def step(self) -> bool:
        """Poll once and load new versions; return whether the replica has a version."""
        try:
            plan = self.source.plan()
        except AnimeDiffusionError as error:
            self._warn(f"the registry cannot be polled for {self.source.model}: {error}")
            if not self.replica.versions:
                self.replica.error = str(error)
            return bool(self.replica.versions)
        self.desired, self._polled_at = plan.desired, self._clock()
        if self.replica.versions:  # Without a version, the failures of former champions must be kept, too.
            self._failures = {version: one for version, one in self._failures.items() if version in plan.shares}
        for version in sorted(plan.shares, key=lambda version: version != plan.main):
            self._load(version)
        self._route(plan)
        return bool(self.replica.versions)

    def describe(self) -> EngineStatus:
        """Return the state of the replica and the result of the latest poll."""
        return EngineStatus(
            replica=self.replica.describe(),
            shares=self.replica.shares,
            desired=self.desired,
            age_s=self._clock() - self._polled_at,
        )

    def _route(self, plan: TrafficPlan) -> None:
        """Set the traffic of the loaded versions."""
        if plan.main in self.replica.versions:
            self._fallback = plan.main
        elif self._fallback not in self.replica.versions:
            self._fallback = self._load_former_champion(plan)
        loaded = self.replica.versions
        shares = loaded_shares(plan.shares, loaded, self._fallback)
        if shares:
            self.replica.route(shares)
        self.missing = [version for version in plan.shares if version not in loaded]
        failures = [self._failures[version].error for version in plan.shares if version in self._failures]
        self.replica.error = failures[0] if failures else None

    def _load_former_champion(self, plan: TrafficPlan) -> str | None:
        """Load and return the latest former champion that works, since a new replica has no previous version."""
        try:
            former = [version for version in self.source.former_champions() if version not in plan.shares]
        except RegistryError as error:
            self._warn(f"the history cannot be read: {error}")
            return None
        return next((version for version in dict.fromkeys(former[:MAX_FORMER_CHAMPIONS]) if self._load(version)), None)

    def _load(self, version: str) -> bool:
        """Load a version unless it is loaded or in its pause after a failure; return whether it is loaded."""
        if version in self.replica.versions:
            return True
        before = self._failures.get(version)
        if before is not None and self._clock() < before.retry_at:
            return False
        try:
            self.replica.add(version, self._fetch(version), self.source.sha256(version))
        except Exception as error:  # The loaded versions must continue to answer, whatever the error is.
            self._warn(f"version {version} does not work here: {error}")
            if isinstance(error, RegistryError | StorageError):
                pause_s = 0.0
            else:
                pause_s = min(LONGEST_PAUSE_S, max(FIRST_PAUSE_S, 2 * before.pause_s if before else 0.0))
            self._failures[version] = _Failure(f"version {version}: {error}", pause_s, self._clock() + pause_s)
            if isinstance(error, BundleError):
                self._forget(version)
            return False
        self._failures.pop(version, None)
        return True

    def _fetch(self, version: str) -> Path:
        try:
            return self.source.fetch(version)
        except BundleError:  # The replica counts the failures of add() only.
            self.replica.counters.count(SWAPS, version, "failed")
            raise

    def _forget(self, version: str) -> None:
        try:
            self.source.forget(version)
        except AnimeDiffusionError as error:
            self._warn(f"the local copy of version {version} cannot be removed: {error}")

    def _warn(self, text: str) -> None:
        """Log a warning, but not the same warning in every period."""
        if text != self._warned:
            log.warning("%s", text)
        self._warned = text

    def _follow(self) -> None:
        while not self._stop.wait(self.period_s * random.uniform(0.8, 1.2)):
            try:
                self.step()
            except Exception:
                log.exception("a poll for %s failed", self.source.model)
