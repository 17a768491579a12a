"""Background thread that keeps the loaded versions of a replica up to date with its model source.

serve/replica/model_source.py decides which versions the replica should load.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from animediffusion.platform.errors import AnimeDiffusionError, BundleError, RegistryError, StorageError
from animediffusion.platform.registry.client import ALIASES
from animediffusion.serve.replica.model_source import ModelSource, TrafficPlan
from animediffusion.serve.replica.replica import Replica
from animediffusion.serve.replica.stats import SWAPS
from animediffusion.serve.replica.traffic_split import among

FIRST_PAUSE_S, LONGEST_PAUSE_S = 30.0, 900.0
"""First and longest pause before a failed version is retried."""
MAX_EARLIER = 3
"""Number of former champions that a new replica tries if the present champion does not work."""

log = logging.getLogger(__name__)


@dataclass
class _Failure:
    """The latest failure of a version."""

    error: str
    pause_s: float
    """Pause before the retry; 0 if the registry or the storage was unreachable, so the version itself may work."""
    again_at: float
    """time.monotonic() of the earliest retry."""


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
    """

    def __init__(self, replica: Replica, source: ModelSource, period_s: float) -> None:
        self.replica = replica
        self.source = source
        self.period_s = period_s
        self.desired: dict[str, str | None] = dict.fromkeys(ALIASES)
        self.missing: list[str] = []
        """Desired versions that this replica has not loaded."""
        self._looked_at = float("-inf")
        self._warned = ""
        self._failures: dict[str, _Failure] = {}
        self._standing: str | None = None
        """The loaded version that answers as the main version."""
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
                    self.source.model, f"cannot be had ({self.replica.error})", "see `animediffusion doctor`"
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
            self._warn(f"cannot follow {self.source.model}: {error}")
            if not self.replica.versions:
                self.replica.error = str(error)
            return bool(self.replica.versions)
        self.desired, self._looked_at = plan.desired, time.monotonic()
        if self.replica.versions:  # Without a version, the failures of former champions must be kept, too.
            self._failures = {version: one for version, one in self._failures.items() if version in plan.shares}
        for version in sorted(plan.shares, key=lambda version: version != plan.main):
            self._try(version)
        self._settle(plan)
        return bool(self.replica.versions)

    def describe(self) -> dict[str, Any]:
        """Return the replica's entry in /v1/models, its shares, the desired versions, and the age of the poll."""
        return {
            "replica": self.replica.describe(),
            "shares": self.replica.shares,
            "desired": self.desired,
            "age_s": time.monotonic() - self._looked_at,
        }

    def _settle(self, plan: TrafficPlan) -> None:
        """Route the traffic to the loaded versions."""
        if plan.main in self.replica.versions:
            self._standing = plan.main
        elif self._standing not in self.replica.versions:
            self._standing = self._an_earlier_one(plan)
        loaded = self.replica.versions
        shares = among(plan.shares, loaded, self._standing)
        if shares:
            self.replica.route(shares)
        self.missing = [version for version in plan.shares if version not in loaded]
        failures = [self._failures[version].error for version in plan.shares if version in self._failures]
        self.replica.error = failures[0] if failures else None

    def _an_earlier_one(self, plan: TrafficPlan) -> str | None:
        """Load and return the latest former champion that works, since a new replica has no previous version."""
        try:
            earlier = [version for version in self.source.earlier() if version not in plan.shares]
        except RegistryError as error:
            self._warn(f"the history cannot be read: {error}")
            return None
        return next((version for version in dict.fromkeys(earlier[:MAX_EARLIER]) if self._try(version)), None)

    def _try(self, version: str) -> bool:
        """Load a version unless it is loaded or in its pause after a failure; return whether it is loaded."""
        if version in self.replica.versions:
            return True
        before = self._failures.get(version)
        if before is not None and time.monotonic() < before.again_at:
            return False
        try:
            self.replica.host(version, self._fetch(version), self.source.sha256(version))
        except Exception as error:  # The loaded versions must continue to answer, whatever the error is.
            self._warn(f"version {version} does not work here: {error}")
            away = isinstance(error, RegistryError | StorageError)
            pause_s = 0.0 if away else min(LONGEST_PAUSE_S, max(FIRST_PAUSE_S, 2 * before.pause_s if before else 0.0))
            self._failures[version] = _Failure(f"version {version}: {error}", pause_s, time.monotonic() + pause_s)
            if isinstance(error, BundleError):
                self._forget(version)
            return False
        self._failures.pop(version, None)
        return True

    def _fetch(self, version: str) -> Path:
        try:
            return self.source.fetch(version)
        except BundleError:  # The replica counts the failures of host() only.
            self.replica.measures.count(SWAPS, version, "failed")
            raise

    def _forget(self, version: str) -> None:
        try:
            self.source.forget(version)
        except AnimeDiffusionError as error:
            self._warn(f"the copy of version {version} stays: {error}")

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
                log.exception("following %s failed", self.source.model)
