"""Start and end a canary: a part of the requests goes to the challenger instead of the champion.

A canary belongs to one pair of challenger and champion, so every promotion and every rollback ends it: a new challenger
or a restored champion never inherits the percentage of an earlier pair.
"""

from __future__ import annotations

from dataclasses import dataclass

from animediffusion.platform.config import Settings
from animediffusion.platform.errors import ConfigError, RegistryError
from animediffusion.platform.registry import audit_log, traffic
from animediffusion.platform.registry.alias_lock import alias_lock
from animediffusion.platform.registry.client import Registry
from animediffusion.platform.registry.traffic import CHALLENGER, Traffic


@dataclass(frozen=True)
class CanaryChange:
    """The challenger's percentage of the requests, before and after a command."""

    percent: int
    previous: int
    champion: int | None
    challenger: int | None

    @property
    def changed(self) -> bool:
        """Whether the percentage differs from the previous one."""
        return self.percent != self.previous

    def to_json(self) -> dict[str, int | bool | None]:
        """Return the JSON object of `models canary --json`."""
        return {
            "percent": self.percent,
            "from": self.previous,
            "champion": self.champion,
            "challenger": self.challenger,
            "changed": self.changed,
        }


def canary(settings: Settings, percent: int, why: str = "") -> CanaryChange:
    """Send `percent` of the requests to the challenger; 0 ends the canary. Servers follow within seconds.

    Raises:
        ConfigError: percent is not 0 to 100.
        RegistryError: there is no champion, there is no challenger, or both are the same version.
    """
    if not 0 <= percent <= 100:
        raise ConfigError("PERCENT", str(percent), "0 to 100; 0 ends the canary")
    registry = Registry(settings)
    with alias_lock(registry):
        now = traffic.read(registry)
        if percent:
            _check(registry, now)
        if percent != now.percent:
            _set(registry, now, percent, why)
    return CanaryChange(percent, now.percent, now.champion, now.challenger)


def end(registry: Registry, why: str) -> int | None:
    """End the canary because an alias moves; return its percentage, or None if no canary was running."""
    now = traffic.read(registry)
    if not now.percent:
        return None
    _set(registry, now, 0, why)
    return now.percent


def _set(registry: Registry, now: Traffic, percent: int, why: str) -> None:
    if now.challenger is None:  # the alias was removed by hand, so the audit log has no version to name
        traffic.set_percent(registry, percent)
        return
    with audit_log.recorded(
        registry, "canary", CHALLENGER, now.challenger, now.challenger, reason=why, percent=percent
    ):
        traffic.set_percent(registry, percent)


def _check(registry: Registry, now: Traffic) -> None:
    if now.champion is None and now.challenger is None and not registry.versions():
        found = f"no version of {registry.name} is registered"
        raise RegistryError("canary", found, "run `models register DIR`")
    if now.champion is None:
        raise RegistryError("canary", "there is no champion", "run `models promote V`")
    if now.challenger is None:
        raise RegistryError("canary", "there is no challenger", "run `models promote V --alias challenger`")
    if now.challenger == now.champion:
        found = f"version {now.challenger} is champion and challenger"
        raise RegistryError("canary", found, "run `models promote V --alias challenger` with another version")
