"""Which version should answer: a bundle given once, or whatever the registry's alias points at now."""

from __future__ import annotations

import logging
import random
import threading
from pathlib import Path
from typing import Any

from animediffusion.models.bundle import verify
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import AnimeDiffusionError, BundleError
from animediffusion.platform.registry import ALIASES, CHAMPION, Registry, fetch_folder
from animediffusion.serve.replica import Replica

log = logging.getLogger(__name__)


class ModelSource:
    """MODEL as users write it: a bundle folder or URI, `models:/NAME@alias` or `models:/NAME/3`.

    Args:
        settings: of the registry.
        model: None is the champion.
    """

    def __init__(self, settings: Settings, model: str | None = None) -> None:
        self.settings = settings
        self.model = model or f"models:/{settings.model_name}@{CHAMPION}"
        self.is_registered = self.model.startswith("models:")
        self._registry = Registry(settings) if self.is_registered else None
        self._bundle: tuple[str, Path] | None = None

    def wanted(self) -> str:
        """The version that should answer now: a registry number, or `sha256:` and 12 hex digits.

        Raises:
            AnimeDiffusionError: there is none, or the registry cannot be asked.
        """
        if self._registry is not None:
            return str(self._registry.get(self.model).version)
        return self._given()[0]

    def fetch(self, version: str) -> Path:
        """The bundle folder of a version that wanted() named."""
        if self._registry is not None:
            return self._registry.fetch(f"models:/{self.settings.model_name}/{version}")
        return self._given()[1]

    def desired(self) -> dict[str, str | None]:
        """Where the registry's aliases stand: {champion, challenger}."""
        if self._registry is None:
            return {CHAMPION: self._given()[0], "challenger": None}
        numbers = {alias: self._registry.alias(alias) for alias in ALIASES}
        return {alias: str(number) if number is not None else None for alias, number in numbers.items()}

    def _given(self) -> tuple[str, Path]:
        if self._bundle is None:
            folder = fetch_folder(self.model, self.settings.workspace / "cache")
            try:
                self._bundle = (f"sha256:{verify(folder)[:12]}", folder)
            except ValueError as error:
                raise BundleError(self.model, str(error), "give a folder as training wrote it") from error
        return self._bundle


class Follower:
    """Keeps a replica at the version its source wants, from a thread of its own.

    The registry unreachable: the replica keeps what it has. A version that fails is not tried again until another one
    was wanted in between.
    """

    def __init__(self, replica: Replica, source: ModelSource, period_s: float) -> None:
        self.replica = replica
        self.source = source
        self.period_s = period_s
        self.desired: dict[str, str | None] = dict.fromkeys(ALIASES)
        self._failed: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follow", daemon=True)

    def start(self) -> None:
        """Load what is wanted, then follow in the background."""
        self.step()
        self._thread.start()

    def stop(self) -> None:
        """End the thread within one period."""
        self._stop.set()

    def step(self) -> None:
        """Look once, and load what is new."""
        try:
            wanted = self.source.wanted()
            self.desired = self.source.desired()
            if wanted == self.replica.version:
                self._failed = self.replica.error = None
            if wanted in (self._failed, self.replica.version):
                return
            loaded = self.replica.load(wanted, self.source.fetch(wanted))
            self._failed = None if loaded else wanted
        except AnimeDiffusionError as error:
            log.warning("cannot follow %s: %s", self.source.model, error)
            if self.replica.version is None:
                self.replica.error = str(error)

    def _follow(self) -> None:
        while not self._stop.wait(self.period_s * random.uniform(0.8, 1.2)):
            try:
                self.step()
            except Exception:
                log.exception("following %s failed", self.source.model)

    def describe(self) -> dict[str, Any]:
        """The replica's entry in /v1/models, and what is desired."""
        return {"desired": self.desired, "replica": self.replica.describe()}
