"""Which versions should answer: a bundle given once, or what the registry's aliases and the canary ask for now."""

from __future__ import annotations

import logging
import random
import threading
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from animediffusion.models.bundle import verify
from animediffusion.platform import ledger, traffic
from animediffusion.platform.config import Settings
from animediffusion.platform.downloads import cache_folder, fetch_folder
from animediffusion.platform.errors import AnimeDiffusionError, BundleError, RegistryError, StorageError
from animediffusion.platform.registry import ALIASES, CHAMPION, Registry
from animediffusion.serve.measures import SWAPS
from animediffusion.serve.replica import Replica
from animediffusion.serve.routing import among

FIRST_PAUSE_S, LONGEST_PAUSE_S = 30.0, 900.0
"""Before a version that failed is tried again: the first time, and at most."""
MAX_EARLIER = 3
"""Former champions that a new replica tries when the present one does not work."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a replica should do."""

    main: str
    """The version that answers for every other one that cannot."""
    shares: dict[str, float]
    """Version -> share of the requests, 1 together."""
    desired: dict[str, str | None]
    """{champion, challenger}, where the registry's aliases stand."""


class ModelSource:
    """MODEL as users write it: a bundle folder or URI, `models:/NAME@alias` or `models:/NAME/3`.

    The registry is connected to when it is first asked.

    Args:
        settings: of the registry.
        model: None is the champion, beside it a canary.
    """

    def __init__(self, settings: Settings, model: str | None = None) -> None:
        self.settings = settings
        self.model = model or f"models:/{settings.model_name}@{CHAMPION}"
        self.is_registered = self.model.startswith("models:")

    def wanted(self) -> str:
        """The one version that MODEL means now: a registry number, or `sha256:` and 12 hex digits.

        Raises:
            AnimeDiffusionError: there is none, or the registry cannot be asked.
        """
        return str(self._registry.get(self.model).version) if self.is_registered else self._given[0]

    def plan(self) -> Plan:
        """Which versions should answer now, and for how many of the requests; raises as wanted() does."""
        if not self.is_registered:
            version = self._given[0]
            return Plan(main=version, shares={version: 1.0}, desired={CHAMPION: version, traffic.CHALLENGER: None})
        now = traffic.read(self._registry)
        aliases = {CHAMPION: now.champion, traffic.CHALLENGER: now.challenger}
        desired = {alias: str(number) if number is not None else None for alias, number in aliases.items()}
        if self.model == f"models:/{self.settings.model_name}@{CHAMPION}" and now.champion is not None:
            shares = {str(version): share for version, share in now.shares.items()}
            return Plan(main=str(now.champion), shares=shares, desired=desired)
        version = self.wanted()
        return Plan(main=version, shares={version: 1.0}, desired=desired)

    def fetch(self, version: str) -> Path:
        """The bundle folder of a version that wanted() or plan() named."""
        return self._registry.fetch(self._uri(version)) if self.is_registered else self._given[1]

    def sha256(self, version: str) -> str | None:
        """The identity that a version was registered with; None for a folder."""
        return self._registry.get(self._uri(version)).sha256 if self.is_registered else None

    def forget(self, version: str) -> None:
        """Remove the local copy of a registered version, so that the next fetch() brings another one."""
        if self.is_registered:
            self._registry.forget(self._uri(version))

    def earlier(self) -> list[str]:
        """Former champions, the latest first; none where MODEL is something else."""
        if self.model != f"models:/{self.settings.model_name}@{CHAMPION}":
            return []
        return [str(version) for version in reversed(ledger.stack(ledger.read(self._registry, CHAMPION)))]

    @cached_property
    def _registry(self) -> Registry:
        return Registry(self.settings)

    @cached_property
    def _given(self) -> tuple[str, Path]:
        folder = fetch_folder(self.model, cache_folder(self.settings))
        try:
            return f"sha256:{verify(folder)[:12]}", folder
        except ValueError as error:
            raise BundleError(self.model, str(error), "give a folder as training wrote it") from error

    def _uri(self, version: str) -> str:
        return f"models:/{self.settings.model_name}/{version}"


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

    def _settle(self, plan: Plan) -> None:
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

    def _an_earlier_one(self, plan: Plan) -> str | None:
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
