"""Source of the desired versions: a fixed bundle, or the registry with its aliases and the canary.

The starter model answers while the registry has no champion.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from animediffusion.models.bundle import verify
from animediffusion.platform.config import Settings
from animediffusion.platform.registry import audit_log, traffic
from animediffusion.platform.registry.client import CHAMPION, Registry
from animediffusion.platform.registry.downloads import STARTER, STARTER_FOLDER, cache_folder, fetch_folder


@dataclass(frozen=True, kw_only=True)
class TrafficPlan:
    """Versions that a replica should load, and their traffic."""

    main: str
    """The version that answers in place of a version that cannot."""
    shares: dict[str, float]
    """Version -> share of the requests; the shares sum to 1."""
    desired: dict[str, str | None]
    """Alias (champion, challenger) -> version; None if the alias is not set."""


class ModelSource:
    """Versions and bundles of a MODEL: a bundle folder or URI, `starter`, `models:/NAME@alias` or `models:/NAME/3`.

    The connection to the registry opens on first use.

    Args:
        settings: settings of the registry.
        model: the MODEL; None is the champion, together with a canary if there is one, or the starter model while
            there is no champion.
    """

    def __init__(self, settings: Settings, model: str | None = None) -> None:
        self.settings = settings
        self.model = model or f"models:/{settings.model_name}@{CHAMPION}"
        self.is_registered = self.model.startswith("models:")
        self.may_be_starter = model is None

    def resolve(self) -> str:
        """Return the version to which MODEL refers now: a registry number, `sha256:` and 12 hex digits, or `starter`.

        Raises:
            AnimeDiffusionError: the model does not exist or is damaged, or the registry is unreachable.
        """
        if not self.is_registered:
            return self._given[0]
        if self.may_be_starter and self._registry.alias(CHAMPION) is None:
            return STARTER
        return str(self._registry.get(self.model).version)

    def plan(self) -> TrafficPlan:
        """Return the versions that should answer now, and their traffic. The errors are those of resolve()."""
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
        version = self.resolve()
        return TrafficPlan(main=version, shares={version: 1.0}, desired=desired)

    def fetch(self, version: str) -> Path:
        """Return the local bundle folder of a version from resolve() or plan()."""
        if version == STARTER:
            return STARTER_FOLDER
        return self._registry.fetch(self._uri(version)) if self.is_registered else self._given[1]

    def sha256(self, version: str) -> str | None:
        """Return the hash with which a version was registered; None for other bundles."""
        is_number = self.is_registered and version != STARTER
        return self._registry.get(self._uri(version)).sha256 if is_number else None

    def forget(self, version: str) -> None:
        """Remove the local copy of a registered version, so that the next fetch() downloads it again."""
        if self.is_registered and version != STARTER:
            self._registry.forget(self._uri(version))

    def former_champions(self) -> list[str]:
        """Return the former champions, the latest first; empty if MODEL is not the champion."""
        if self.model != f"models:/{self.settings.model_name}@{CHAMPION}":
            return []
        return [str(version) for version in reversed(audit_log.stack(audit_log.read(self._registry, CHAMPION)))]

    @cached_property
    def _registry(self) -> Registry:
        return Registry(self.settings)

    @cached_property
    def _given(self) -> tuple[str, Path]:
        folder = fetch_folder(self.model, cache_folder(self.settings))
        sha256 = verify(folder, self.model)
        return STARTER if self.model == STARTER else f"sha256:{sha256[:12]}", folder

    def _uri(self, version: str) -> str:
        return f"models:/{self.settings.model_name}/{version}"
