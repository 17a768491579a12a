"""Start and end a canary: a part of the requests goes to the challenger instead of the champion.

A canary belongs to one pair of challenger and champion, so every promotion and every rollback ends it: a new challenger
or a restored champion never inherits the percentage of an earlier pair.
"""

from __future__ import annotations

from typing import Any

from animediffusion.platform.config import Settings
from animediffusion.platform.errors import ConfigError, RegistryError
from animediffusion.platform.registry import audit_log, traffic
from animediffusion.platform.registry.alias_lock import alias_lock
from animediffusion.platform.registry.client import Registry
from animediffusion.platform.registry.traffic import CHALLENGER, Traffic


def canary(settings: Settings, percent: int, why: str = "") -> dict[str, Any]:
    """Send `percent` of the requests to the challenger; 0 ends the canary. Servers follow within seconds.

    Returns:
        `{percent, from, champion, challenger, changed}`; `from` is the percentage before.

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
    return {
        "percent": percent,
        "from": now.percent,
        "champion": now.champion,
        "challenger": now.challenger,
        "changed": percent != now.percent,
    }


def end(registry: Registry, why: str) -> dict[str, int]:
    """End the canary because an alias moves; return `{canary_ended: PERCENT}`, or `{}` if no canary was running."""
    now = traffic.read(registry)
    if not now.percent:
        return {}
    _set(registry, now, 0, why)
    return {"canary_ended": now.percent}


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
        raise RegistryError("canary", "there is no champion beside it", "run `models promote V`")
    if now.challenger is None:
        raise RegistryError("canary", "there is no challenger", "run `models promote V --alias challenger`")
    if now.challenger == now.champion:
        found = f"version {now.challenger} is champion and challenger"
        raise RegistryError("canary", found, "run `models promote V --alias challenger` with another version")
