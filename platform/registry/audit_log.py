"""Audit log of alias and traffic changes, refusals and deletions: one MLflow run per event, which never changes.

An event records who changed what, when and why. MLflow itself keeps no history of aliases. Runs work with every backend
and are visible in MLflow's UI.
"""

from __future__ import annotations

import getpass
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from mlflow.entities import Metric, RunTag
from mlflow.exceptions import MlflowException

from animediffusion.platform.errors import RegistryError
from animediffusion.platform.registry.client import Registry
from animediffusion.platform.tracking import tracking

EXPERIMENT = "animediffusion-promotions"


@dataclass(frozen=True, kw_only=True)
class Event:
    """One change of an alias or of the challenger's share of the requests, with its reason and its MLflow run."""

    action: str
    """promote, rollback, canary, or refuse: improve did not make the version the challenger."""
    alias: str
    previous: int | None
    """The version that the alias pointed at before the event."""
    version: int
    """The version that the alias points at after the event."""
    user: str
    reason: str
    forced: bool
    time: str
    """ISO 8601, UTC."""
    metrics: dict[str, float]
    run: str
    percent: int | None = None
    """The challenger's new percentage of the requests; None unless the action is canary."""

    def summary(self) -> dict[str, Any]:
        """Return the fields of `models history --json`."""
        return {
            "action": self.action,
            "from": self.previous,
            "to": self.version,
            "alias": self.alias,
            "percent": self.percent,
            "user": self.user,
            "reason": self.reason,
            "forced": self.forced,
            "time": self.time,
            "metrics": self.metrics,
        }


@contextmanager
def recorded(
    registry: Registry,
    action: str,
    alias: str,
    previous: int | None,
    version: int,
    *,
    reason: str = "",
    forced: bool = False,
    metrics: dict[str, float] | None = None,
    percent: int | None = None,
) -> Iterator[str]:
    """Record an event before the block runs; its MLflow run becomes FINISHED only if the block succeeds.

    Yields:
        The id of the event's run.
    """
    tags = {
        "alias": alias,
        "from": "" if previous is None else str(previous),
        "to": str(version),
        "reason": reason,
        "forced": str(forced).lower(),
        **({} if percent is None else {"percent": str(percent)}),
    }
    with recorded_action(registry, action, f"{alias} {version}", tags, metrics) as run_id:
        yield run_id


@contextmanager
def recorded_action(
    registry: Registry, action: str, subject: str, facts: dict[str, str], metrics: dict[str, float] | None = None
) -> Iterator[str]:
    """Record an action, which may concern no alias, as recorded() does.

    Args:
        registry: the registry whose log it is.
        action: what is done.
        subject: to what, for the name of the run.
        facts: further tags of the run; those of recorded() make it an Event.
        metrics: metrics of the run.

    Yields:
        The id of the MLflow run.
    """
    client = registry.client
    tags = {"action": action, "model": registry.name, "user": user_name(), **facts}
    try:
        experiment = tracking.experiment_id(client, EXPERIMENT, tracking.artifact_root(registry.settings))
        run_id = str(client.create_run(experiment, run_name=f"{action} {subject}").info.run_id)
        now = int(datetime.now(UTC).timestamp() * 1000)
        numbers = [Metric(key, value, now, 0) for key, value in (metrics or {}).items()]
        client.log_batch(run_id, metrics=numbers, tags=[RunTag(key, value) for key, value in tags.items()])
    except MlflowException as error:
        found = f"cannot be written ({tracking.first_line(error)})"
        raise RegistryError("audit log", found, "nothing was changed") from error
    try:
        yield run_id
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id, "FINISHED")


def read(registry: Registry, alias: str | None = None) -> list[Event]:
    """Return the events of this model that took effect, oldest first, for one alias or for all."""
    try:
        experiment = registry.client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            return []
        if experiment.lifecycle_stage == "deleted":
            found = f"the experiment {EXPERIMENT} was deleted in MLflow"
            command = f"run `mlflow experiments restore -x {experiment.experiment_id}`, or promote again"
            raise RegistryError("audit log", found, command)
        runs = _search(registry, experiment.experiment_id)
    except MlflowException as error:
        found = f"cannot be read ({tracking.first_line(error)})"
        raise RegistryError("audit log", found, "see `animediffusion doctor`") from error
    events = (_event(run) for run in runs if "alias" in run.data.tags)
    return [event for event in events if alias is None or event.alias == alias]


def stack(events: list[Event]) -> list[int]:
    """Return the versions of an alias, the current one last: promote pushes, rollback pops, others do nothing."""
    versions: list[int] = []
    for event in events:
        if event.action in ("canary", "refuse"):
            continue
        if event.action == "rollback":
            while versions and versions[-1] != event.version:
                versions.pop()
        if not versions or versions[-1] != event.version:
            versions.append(event.version)
    return versions


def user_name() -> str:
    """Return the user's name for events, or the uid if the user has no name, as in some containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def _search(registry: Registry, experiment_id: str) -> list[Any]:
    found: list[Any] = []
    token: str | None = None
    wanted = f"attributes.status = 'FINISHED' and tags.model = '{registry.name}'"
    while True:
        page = registry.client.search_runs(
            [experiment_id], wanted, max_results=1000, order_by=["attributes.start_time ASC"], page_token=token
        )
        found += page
        token = page.token
        if not token:
            return found


def _event(run: Any) -> Event:
    tags = run.data.tags
    return Event(
        action=tags["action"],
        alias=tags["alias"],
        previous=int(tags["from"]) if tags.get("from") else None,
        version=int(tags["to"]),
        user=tags.get("user", ""),
        reason=tags.get("reason", ""),
        forced=tags.get("forced") == "true",
        time=datetime.fromtimestamp(run.info.start_time / 1000, UTC).isoformat(timespec="milliseconds"),
        metrics=dict(run.data.metrics),
        run=run.info.run_id,
        percent=int(tags["percent"]) if "percent" in tags else None,
    )
