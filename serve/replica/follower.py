"""Keeps a replica at the versions that its source wants, from a thread of its own.

Not here: which versions those are, see serve/replica/model_source.py.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from dataclasses import dataclass
from typing import Any

from animediffusion.platform.errors import AnimeDiffusionError, BundleError, RegistryError, StorageError
from animediffusion.platform.registry.client import ALIASES
from animediffusion.serve.replica.model_source import ModelSource, TrafficPlan
from animediffusion.serve.replica.replica import Replica
from animediffusion.serve.replica.stats import SWAPS
from animediffusion.serve.replica.traffic_split import among

FIRST_PAUSE_S, LONGEST_PAUSE_S = 30.0, 900.0
"""Before a version that failed is tried again: the first time, and at most."""
MAX_EARLIER = 3
"""Former champions that a new replica tries when the present one does not work."""

log = logging.getLogger(__name__)


@dataclass
class _Failure:
    """A version that did not work."""

    error: str
    pause_s: float
    """Before it is tried again; 0 where the registry or the store is the reason, not the version."""
    again_at: float


class Follower:
    """Keeps a replica at what its source wants, from a thread of its own.

    A version is loaded and tried beside those that answer; the traffic moves when it works. One that does not is tried
    again after a pause that grows, with a fresh copy; until then the version before answers in its place. The registry
    away: the replica keeps what it has. All replicas that look at one registry agree one period after it last moved.

    Args:
        replica: to be kept up to date.
        source: what should answer.
        period_s: between two looks, on average: replicas that started together do not ask together.
    """

    def __init__(self, replica: Replica, source: ModelSource, period_s: float) -> None:
        self.replica = replica
        self.source = source
        self.period_s = period_s
        self.desired: dict[str, str | None] = dict.fromkeys(ALIASES)
        self.missing: list[str] = []
        """Versions that are wanted and not loaded here."""
        self._looked_at = float("-inf")
        self._warned = ""
        self._failures: dict[str, _Failure] = {}
        self._standing: str | None = None
        """The version that answers as the main one."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follow", daemon=True)

    def start(self, patience_s: float = 0.0) -> None:
        """Load what is wanted, then follow in the background.

        Args:
            patience_s: look again for as long as nothing is loaded because the registry or the store is away.

        Raises:
            RegistryError: they still were. A version that does not work raises nothing: `replica.error` says it.
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
        """Look once, and load what is new; True if something answers."""
        try:
            plan = self.source.plan()
        except AnimeDiffusionError as error:
            self._warn(f"cannot follow {self.source.model}: {error}")
            if not self.replica.versions:
                self.replica.error = str(error)
            return bool(self.replica.versions)
        self.desired, self._looked_at = plan.desired, time.monotonic()
        if self.replica.versions:  # else former champions that failed are remembered, too
            self._failures = {version: one for version, one in self._failures.items() if version in plan.shares}
        for version in sorted(plan.shares, key=lambda version: version != plan.main):
            self._try(version)
        self._settle(plan)
        return bool(self.replica.versions)

    def describe(self) -> dict[str, Any]:
        """The replica's entry in /v1/models, what it knows to be desired, and how long ago it asked."""
        return {
            "replica": self.replica.describe(),
            "shares": self.replica.shares,
            "desired": self.desired,
            "age_s": time.monotonic() - self._looked_at,
        }

    def _settle(self, plan: TrafficPlan) -> None:
        """Give the traffic to what is there."""
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
        """The latest former champion that works, loaded: a new replica has no version before to fall back on."""
        try:
            earlier = [version for version in self.source.earlier() if version not in plan.shares]
        except RegistryError as error:
            self._warn(f"the history cannot be read: {error}")
            return None
        return next((version for version in dict.fromkeys(earlier[:MAX_EARLIER]) if self._try(version)), None)

    def _try(self, version: str) -> bool:
        """Load a version unless it is there or failed a short while ago; True if it is there."""
        if version in self.replica.versions:
            return True
        before = self._failures.get(version)
        if before is not None and time.monotonic() < before.again_at:
            return False
        try:
            self.replica.host(version, self.source.fetch(version), self.source.sha256(version))
        except Exception as error:  # whatever is wrong with it, what answers goes on
            self._warn(f"version {version} does not work here: {error}")
            if isinstance(error, BundleError):  # found before the replica could try it
                self.replica.measures.count(SWAPS, version, "failed")
            away = isinstance(error, RegistryError | StorageError)
            pause_s = 0.0 if away else min(LONGEST_PAUSE_S, max(FIRST_PAUSE_S, 2 * before.pause_s if before else 0.0))
            self._failures[version] = _Failure(f"version {version}: {error}", pause_s, time.monotonic() + pause_s)
            if isinstance(error, ValueError):
                self._forget(version)
            return False
        self._failures.pop(version, None)
        return True

    def _forget(self, version: str) -> None:
        try:
            self.source.forget(version)
        except AnimeDiffusionError as error:
            self._warn(f"the copy of version {version} stays: {error}")

    def _warn(self, text: str) -> None:
        """Log what is new, not each period what was said before."""
        if text != self._warned:
            log.warning("%s", text)
        self._warned = text

    def _follow(self) -> None:
        while not self._stop.wait(self.period_s * random.uniform(0.8, 1.2)):
            try:
                self.step()
            except Exception:
                log.exception("following %s failed", self.source.model)
