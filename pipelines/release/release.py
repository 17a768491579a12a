"""Register bundles as versions; promote and roll back versions.

A version passes the checks before promotion if its bundle loads, its hash is the registered one, its smoke sample is
finite, and it was evaluated and is not worse than the champion on the champion's data. `--force` skips only this
evaluation check, which the audit log records; a broken bundle never passes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from animediffusion.pipelines.release import canary
from animediffusion.pipelines.release.checks import check_bundle, check_quality, check_stored
from animediffusion.pipelines.release.lineage import described, kept_files, origin, samples
from animediffusion.pipelines.release.stored_evaluation import StoredEvaluation
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import ConfigError, RegistryError
from animediffusion.platform.registry import audit_log, traffic
from animediffusion.platform.registry.alias_lock import alias_lock
from animediffusion.platform.registry.client import ALIASES, CHAMPION, Registry
from animediffusion.platform.registry.downloads import cache_folder, fetch_folder
from animediffusion.platform.registry.model_version import Version, headline

if TYPE_CHECKING:
    from animediffusion.models.bundle import Bundle


@dataclass(frozen=True, kw_only=True)
class AliasChange:
    """Result of a promotion or a rollback."""

    version: int
    alias: str
    previous: int | None
    """The version that the alias pointed at before."""
    changed: bool = True
    """False if the alias already pointed at the version."""
    forced: bool | None = None
    """Whether a promotion skipped the evaluation check; None for a rollback."""
    canary_ended: int | None = None
    """Percentage of the canary that the change ended; None if no canary was running."""

    def to_json(self) -> dict[str, int | str | bool | None]:
        """Return the JSON object of `models promote --json` and `models rollback --json`."""
        forced = {} if self.forced is None else {"forced": self.forced}
        ended = {} if self.canary_ended is None else {"canary_ended": self.canary_ended}
        change = {"from": self.previous, "changed": self.changed}
        return {"version": self.version, "alias": self.alias, **forced, **change, **ended}


def register(
    settings: Settings,
    folder: Path | str,
    *,
    run_id: str | None = None,
    parent: int | None = None,
    tags: dict[str, str] | None = None,
) -> Version:
    """Register a bundle as the next version; a bundle that is already registered keeps its version.

    Args:
        settings: names the registry.
        folder: bundle folder or its URI.
        run_id: the MLflow run that made the bundle; read from run.json next to the folder if None.
        parent: the version whose weights the training started from; found by the bundle's provenance if None.
        tags: further tags.
    """
    path = fetch_folder(folder, cache_folder(settings))
    bundle = check_bundle(path)
    registry = Registry(settings)
    known = registry.find(bundle.sha256)
    if known is not None:
        if bundle.metrics.get("tracks"):
            registry.add_evaluation(known.version, bundle.metrics)
        return registry.get(known.version)
    number = registry.register(
        path,
        sha256=bundle.sha256,
        run_id=_known_run(registry, run_id or _run_of(path)),
        parent=parent or _parent(registry, bundle),
        metrics=bundle.metrics,
        tags={**described(bundle), **(tags or {})},
        files=kept_files(bundle),
    )
    return registry.get(number)


def promote(
    settings: Settings, version: int | str, alias: str = CHAMPION, why: str = "", *, force: bool = False
) -> AliasChange:
    """Point the alias at a version that passes the checks before promotion.

    Raises:
        ConfigError: the alias is unknown.
        RegistryError: the version is unknown or does not pass the checks.
        BundleError: the bundle is broken.
    """
    if alias not in ALIASES:
        raise ConfigError("--alias", repr(alias), " or ".join(ALIASES))
    registry = Registry(settings)
    candidate = registry.get(version)
    number = candidate.version
    unchanged = AliasChange(version=number, alias=alias, previous=number, changed=False, forced=force)
    if registry.alias(alias) == number:
        return unchanged
    check_stored(registry, candidate)
    with alias_lock(registry):
        previous = registry.alias(alias)
        if previous == number:
            return unchanged
        if not force:
            check_quality(candidate, _champion(registry))
        metrics = headline(candidate.metrics)
        ended = canary.end(registry, f"version {number} became {alias}")
        with audit_log.recorded(
            registry, "promote", alias, previous, number, reason=why, forced=force, metrics=metrics
        ):
            registry.set_alias(alias, number)
    return AliasChange(version=number, alias=alias, previous=previous, forced=force, canary_ended=ended)


def rollback(settings: Settings, alias: str = CHAMPION, why: str = "") -> AliasChange:
    """Restore the alias's previous version and end a running canary; repeat to go further back.

    Raises:
        RegistryError: there is no previous version.
    """
    registry = Registry(settings)
    with alias_lock(registry):
        present = registry.alias(alias)
        target = _before(registry, alias, present)
        metrics = headline(target.metrics)
        ended = canary.end(registry, f"{alias} rolled back to version {target.version}")
        with audit_log.recorded(registry, "rollback", alias, present, target.version, reason=why, metrics=metrics):
            registry.set_alias(alias, target.version)
    return AliasChange(version=target.version, alias=alias, previous=present, canary_ended=ended)


def _before(registry: Registry, alias: str, present: int | None) -> Version:
    """Return the version that an alias pointed at before the present one."""
    existing = {version.version: version for version in registry.versions()}
    stack = audit_log.stack(audit_log.read(registry, alias))
    if stack and stack[-1] == present:
        stack.pop()
    earlier = [version for version in stack if version in existing and version != present]
    if not earlier:
        gone = [version for version in stack if version not in existing]
        found = f"there is no version before {present}" if present is not None else "no version was promoted yet"
        if gone:
            found = f"its previous version {gone[-1]} was deleted, and no other version was promoted before"
        raise RegistryError(f"alias {alias}", found, "use `models promote V`")
    return existing[earlier[-1]]


def history(settings: Settings, alias: str | None = None) -> list[dict[str, Any]]:
    """Return every promotion, rollback and canary, the oldest first."""
    return [event.summary() for event in audit_log.read(Registry(settings), alias)]


def versions(settings: Settings) -> list[dict[str, Any]]:
    """Return the versions as `models list` prints them, the newest first."""
    registry = Registry(settings)
    shares = traffic.read(registry).shares
    return [{**version.summary(), "share": shares.get(version.version, 0.0)} for version in registry.versions()]


def show(settings: Settings, version: int | str, out: Path | None = None) -> dict[str, Any]:
    """Return the facts that `models show V` prints: the version, its origin, tags, evaluations and alias events.

    Args:
        settings: names the registry.
        version: a number, an alias or `models:/...`.
        out: PNG file for the drawings that the version colored when it was registered; none is written if None.
    """
    registry = Registry(settings)
    found = registry.get(version)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(samples(registry, found))
    events = [event for event in audit_log.read(registry) if found.version in (event.version, event.previous)]
    return {
        **found.summary(),
        "share": traffic.read(registry).shares.get(found.version, 0.0),
        "name": found.name,
        **origin(registry, found).to_json(),
        "tags": {key: value for key, value in found.tags.items() if key not in ("sha256", "parent")},
        "evaluations": [StoredEvaluation.of(result).to_json() for result in found.evaluations],
        "history": [event.summary() for event in events],
    }


def record_evaluation(settings: Settings, model: str, result: dict[str, Any]) -> int | None:
    """Add an evaluation to the version that it measured and return the version's number.

    Return None if `model` is not a `models:` reference.
    """
    if not model.startswith("models:"):
        return None
    registry = Registry(settings)
    version = registry.get(model).version
    registry.add_evaluation(version, result)
    return version


def _champion(registry: Registry) -> Version | None:
    number = registry.alias(CHAMPION)
    return registry.get(number) if number is not None else None


def _parent(registry: Registry, bundle: Bundle) -> int | None:
    """Return the version of the bundle that this bundle's training started from, if it is registered."""
    sha256 = bundle.config.provenance.get("parent")
    found = registry.find(str(sha256)) if sha256 else None
    return found.version if found is not None else None


def _run_of(folder: Path) -> str | None:
    """Return the MLflow run from run.json next to a bundle folder, or None."""
    try:
        return str(json.loads((folder.parent / "run.json").read_text())["mlflow_run_id"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _known_run(registry: Registry, run_id: str | None) -> str | None:
    """Return the run if this MLflow server has it, else None: a bundle may come from another installation."""
    if run_id is None:
        return None
    try:
        return str(registry.client.get_run(run_id).info.run_id)
    except Exception:
        return None
