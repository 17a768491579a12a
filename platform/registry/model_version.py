"""A registered bundle, and how MLflow's tags carry what is known of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_EVALUATION = "evaluation."

ASIDE = frozenset({"averages.safetensors"})
"""Files of a bundle that coloring does not need (models/bundle.py): large, and brought here only where asked for."""


@dataclass(frozen=True, kw_only=True)
class Version:
    """One registered bundle."""

    name: str
    version: int
    aliases: list[str]
    parent: int | None
    """The version whose weights this one started from or shares."""
    run: str | None
    """MLflow run that made it, or that registered it where it came from elsewhere."""
    sha256: str
    created: str
    """ISO 8601, UTC."""
    metrics: dict[str, Any]
    """metrics.json of the bundle, else an evaluation made later; empty where there is none."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """Every evaluation known of it, the bundle's own first: objects as `evaluate` prints them."""
    tags: dict[str, str] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """The fields that `models list --json` prints."""
        keys = ("version", "aliases", "parent", "run", "sha256", "created", "metrics")
        return {key: value for key, value in asdict(self).items() if key in keys}


def headline(metrics: dict[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation as flat metrics, `same.psnr` and so on."""
    return {
        f"{track}.{name}": float(value)
        for track, values in (metrics.get("tracks") or {}).items()
        for name, value in (values or {}).items()
        if isinstance(value, int | float)
    }


def read_version(item: Any, aliases: dict[str, str]) -> Version:
    """A Version from MLflow's ModelVersion and the aliases of its model."""
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


def _evaluations(tags: dict[str, str]) -> list[dict[str, Any]]:
    return [json.loads(value) for key, value in sorted(tags.items()) if key.startswith(_EVALUATION)]


def evaluation_tags(metrics: dict[str, Any], *, own: bool) -> dict[str, str]:
    """Tags that carry an evaluation: `metrics` for the bundle's own, else one per data set."""
    if not metrics:
        return {}
    text = json.dumps(metrics, sort_keys=True)
    if own:
        return {"metrics": text}
    return {f"{_EVALUATION}{str(metrics.get('data_hash', ''))[:12]}.{metrics.get('split', 'val')}": text}


def bundle_files(folder: Path) -> list[Path]:
    """The files that a bundle's checksums.json names, and itself; all files where there is no such list."""
    names = listed(folder)
    return [path for path in folder.iterdir() if path.is_file() and (names is None or path.name in names)]


def listed(folder: Path) -> set[str] | None:
    """Names of the files of a bundle by its checksums.json, which is one of them; None where there is no such list."""
    try:
        return {*json.loads((folder / "checksums.json").read_text()), "checksums.json"}
    except (OSError, ValueError, TypeError):
        return None


def damage(folder: Path) -> str | None:
    """Description of the first file of a bundle that is missing or changed; None where all are whole.

    A folder without checksums.json is whole if it has any file.
    """
    names = listed(folder)
    if names is None and (folder / "checksums.json").exists():
        return "checksums.json is damaged"
    if names is None:
        return None if folder.is_dir() and any(folder.iterdir()) else "has no files"
    found = (difference(folder / name, folder) for name in sorted(names - ASIDE - {"checksums.json"}))
    return next((one for one in found if one is not None), None)


def difference(file: Path, folder: Path) -> str | None:
    """How a file differs from the one of its name in the checksums.json of `folder`; None where it does not."""
    if not file.is_file():
        return f"{file.name} is missing"
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    expected = json.loads((folder / "checksums.json").read_text())[file.name]
    return None if digest == expected else f"{file.name} was changed after it was written (sha256 differs)"
