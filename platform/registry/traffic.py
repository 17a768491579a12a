"""The split of the requests between champion and challenger, stored in the registry.

Champion and challenger are aliases; the challenger's percentage is the tag `challenger_percent` of the registered
model. One request to MLflow reads all three, so no reader sees half of a change.
Not here: changes of the split and their audit log, see pipelines/release/canary.py; the replicas that apply the split,
see serve/replica/model_source.py.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from mlflow.exceptions import MlflowException

from animediffusion.platform.errors import RegistryError
from animediffusion.platform.registry.client import ALIASES, CHAMPION, Registry
from animediffusion.platform.tracking import tracking

CHALLENGER = ALIASES[1]
PERCENT_TAG = "challenger_percent"

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """The traffic split that servers should apply."""

    champion: int | None = None
    challenger: int | None = None
    percent: int = 0
    """The challenger's percentage of the requests, 0 to 100."""

    @property
    def is_canary(self) -> bool:
        """Whether a challenger that differs from the champion gets requests."""
        return self.percent > 0 and None not in (self.champion, self.challenger) and self.champion != self.challenger

    @property
    def shares(self) -> dict[int, float]:
        """Share of the requests per version, challenger first, with sum 1; empty if there is no champion."""
        if self.champion is None:
            return {}
        if not self.is_canary or self.challenger is None:
            return {self.champion: 1.0}
        return {self.challenger: self.percent / 100, self.champion: 1 - self.percent / 100}


def read(registry: Registry) -> Traffic:
    """Read the current traffic split; it has no versions if nothing is registered yet.

    Raises:
        RegistryError: if MLflow does not answer.
    """
    try:
        model = registry.client.get_registered_model(registry.name)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return Traffic()
        raise _rejected(registry, error) from error
    versions = {alias: int(version) for alias, version in model.aliases.items() if alias in ALIASES}
    percent = _percent(model.tags.get(PERCENT_TAG, "0"))
    return Traffic(champion=versions.get(CHAMPION), challenger=versions.get(CHALLENGER), percent=percent)


def set_percent(registry: Registry, percent: int) -> None:
    """Set the challenger's percentage atomically."""
    try:
        registry.client.set_registered_model_tag(registry.name, PERCENT_TAG, str(percent))
    except MlflowException as error:
        raise _rejected(registry, error) from error


def _percent(text: str) -> int:
    """Parse the tag. An invalid value, perhaps written by hand, counts as 0 because it must not stop a server."""
    if text.isdecimal() and int(text) <= 100:
        return int(text)
    log.warning("the tag %s is %r, not a number from 0 to 100; no canary runs", PERCENT_TAG, text)
    return 0


def _rejected(registry: Registry, error: MlflowException) -> RegistryError:
    found = f"rejected the request ({tracking.first_line(error)})"
    return RegistryError(tracking.store_name(registry.tracking_uri), found, "see `animediffusion doctor`")
