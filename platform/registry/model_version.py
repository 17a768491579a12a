"""A registered bundle, and the encoding of its evaluations as MLflow tags."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

EvaluationJson = dict[str, Any]
"""An evaluation as `evaluate --json` prints it and as metrics.json and the tags of a version keep it."""

_EVALUATION = "evaluation."
"""Beginning of the names of the tags that hold evaluations, each as JSON."""

ASIDE = frozenset({"averages.safetensors"})
"""Large files of a bundle that coloring does not need (models/bundle.py); they are downloaded only on request."""


@dataclass(frozen=True, kw_only=True)
class Version:
    """One registered bundle."""

    name: str
    version: int
    aliases: list[str]
    parent: int | None
    """The version whose weights this version started from or shares."""
    run: str | None
    """MLflow run that made the bundle, or that registered it if it was made elsewhere."""
    sha256: str
    created: str
    """Time of registration, ISO 8601, UTC."""
    metrics: EvaluationJson
    """metrics.json of the bundle, else a later evaluation; empty if the version was never evaluated."""
    evaluations: list[EvaluationJson] = field(default_factory=list)
    """All evaluations of the version, the bundle's own first, in the format that `evaluate` prints."""
    tags: dict[str, str] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Return the fields that `models list --json` prints."""
        keys = ("version", "aliases", "parent", "run", "sha256", "created", "metrics")
        return {key: value for key, value in asdict(self).items() if key in keys}


def headline(metrics: EvaluationJson) -> dict[str, float]:
    """Return the numbers of an evaluation as flat metrics such as `same.psnr`."""
    return {
        f"{track}.{name}": float(value)
        for track, values in (metrics.get("tracks") or {}).items()
        for name, value in (values or {}).items()
        if isinstance(value, int | float)
    }


def read_version(item: Any, aliases: dict[str, str]) -> Version:
    """Return the Version for MLflow's ModelVersion and the aliases of its model."""
    tags = dict(item.tags or {})
    evaluations = _evaluations(tags)
    own = json.loads(tags["metrics"]) if "metrics" in tags else {}
    created = datetime.fromtimestamp(item.creation_timestamp / 1000, UTC)
    return Version(
        name=item.name,
        version=int(item.version),
        aliases=sorted(alias for alias, version in aliases.items() if int(version) == int(item.version)),
        parent=int(tags["parent"]) if tags.get("parent", "").isdecimal() else None,
        run=item.run_id or None,
        sha256=tags.get("sha256", ""),
        created=created.isoformat(timespec="seconds"),
        metrics=own if own.get("tracks") or not evaluations else evaluations[-1],
        evaluations=([own] if own.get("tracks") else []) + evaluations,
        tags={k: v for k, v in tags.items() if k != "metrics" and not k.startswith(_EVALUATION)},
    )


def _evaluations(tags: dict[str, str]) -> list[EvaluationJson]:
    return [json.loads(value) for key, value in sorted(tags.items()) if key.startswith(_EVALUATION)]


def evaluation_tags(metrics: EvaluationJson, *, own: bool) -> dict[str, str]:
    """Encode an evaluation as tags: `metrics` for the bundle's own evaluation, else one tag per data set and split."""
    if not metrics:
        return {}
    text = json.dumps(metrics, sort_keys=True)
    if own:
        return {"metrics": text}
    return {f"{_EVALUATION}{str(metrics.get('data_hash', ''))[:12]}.{metrics.get('split', 'val')}": text}


def bundle_files(folder: Path) -> list[Path]:
    """Return checksums.json and the files that it lists; all files of the bundle if checksums.json is missing."""
    names = listed(folder)
    return [path for path in folder.iterdir() if path.is_file() and (names is None or path.name in names)]


def listed(folder: Path) -> set[str] | None:
    """Return the file names in a bundle's checksums.json and the name of that file; None if it cannot be read."""
    try:
        return {*json.loads((folder / "checksums.json").read_text()), "checksums.json"}
    except (OSError, ValueError, TypeError):
        return None


def damage(folder: Path) -> str | None:
    """Describe the first missing or changed file of a bundle; None if all files are intact.

    A folder without checksums.json counts as intact if it is not empty. Files in ASIDE are not checked.
    """
    names = listed(folder)
    if names is None and (folder / "checksums.json").exists():
        return "checksums.json is damaged"
    if names is None:
        return None if folder.is_dir() and any(folder.iterdir()) else "has no files"
    found = (difference(folder / name, folder) for name in sorted(names - ASIDE - {"checksums.json"}))
    return next((one for one in found if one is not None), None)


def difference(file: Path, folder: Path) -> str | None:
    """Describe how a file differs from its checksum in the checksums.json of `folder`; None if it does not differ."""
    if not file.is_file():
        return f"{file.name} is missing"
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    expected = json.loads((folder / "checksums.json").read_text())[file.name]
    return None if digest == expected else f"{file.name} was changed after it was written (sha256 differs)"
