"""Which versions should answer: a bundle given once, or what the registry's aliases and the canary ask for now."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from animediffusion.models.bundle import verify
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import BundleError
from animediffusion.platform.registry import audit_log as ledger
from animediffusion.platform.registry import traffic
from animediffusion.platform.registry.client import CHAMPION, Registry
from animediffusion.platform.registry.downloads import cache_folder, fetch_folder


@dataclass(frozen=True, kw_only=True)
class TrafficPlan:
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

    def plan(self) -> TrafficPlan:
        """Which versions should answer now, and for how many of the requests; raises as wanted() does."""
        if not self.is_registered:
            version = self._given[0]
            return TrafficPlan(
                main=version, shares={version: 1.0}, desired={CHAMPION: version, traffic.CHALLENGER: None}
            )
        now = traffic.read(self._registry)
        aliases = {CHAMPION: now.champion, traffic.CHALLENGER: now.challenger}
        desired = {alias: str(number) if number is not None else None for alias, number in aliases.items()}
        if self.model == f"models:/{self.settings.model_name}@{CHAMPION}" and now.champion is not None:
            shares = {str(version): share for version, share in now.shares.items()}
            return TrafficPlan(main=str(now.champion), shares=shares, desired=desired)
        version = self.wanted()
        return TrafficPlan(main=version, shares={version: 1.0}, desired=desired)

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
