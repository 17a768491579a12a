"""How many requests each model version answered, and how many of these were corrected, by day, in one small file.

    {"format": 1, "days": {"2026-01-31": {"3": [120, 4]}}, "before": {"2": [9000, 210]}}

Servers add what they counted every few seconds, so the file is right with any number of servers; a server that is
killed loses the counts since then. Days beyond the newest MAX_DAYS are added up under `before`: the file stays small.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Literal, NamedTuple

from pydantic import Field, ValidationError

from animediffusion.platform.atomic_update import update
from animediffusion.platform.config import Config
from animediffusion.platform.errors import DataError
from animediffusion.platform.storage import storage

MAX_DAYS = 400


class VersionCounts(NamedTuple):
    """Requests that a model version answered, and how many of them were corrected."""

    answered: int = 0
    corrected: int = 0

    def plus(self, other: VersionCounts) -> VersionCounts:
        """Return the sum of both."""
        return VersionCounts(self.answered + other.answered, self.corrected + other.corrected)

    @property
    def rate(self) -> float:
        """Share of the answered requests that were corrected; 0 if none was answered."""
        return self.corrected / self.answered if self.answered else 0.0


class CountsFile(Config):
    """Content of the file."""

    format: Literal[1] = 1
    days: dict[str, dict[str, VersionCounts]] = Field(default_factory=dict)
    before: dict[str, VersionCounts] = Field(default_factory=dict)


def add_counts(uri: str, more: Mapping[tuple[str, str], VersionCounts]) -> None:
    """Add the counts of each (day, model version) to the file, which is made if it is missing.

    Raises:
        StorageError: the file cannot be read or written; nothing was added.
        DataError: it is not a file of counts.
    """

    def change(old: bytes | None) -> bytes:
        file = _parse(uri, old)
        days, before = {day: dict(counts) for day, counts in file.days.items()}, dict(file.before)
        for (day, version), counts in more.items():
            _add(days.setdefault(day, {}), version, counts)
        for day in sorted(days)[:-MAX_DAYS]:
            for version, counts in days.pop(day).items():
                _add(before, version, counts)
        changed = CountsFile(days=dict(sorted(days.items())), before=before)
        return json.dumps(changed.model_dump()).encode() + b"\n"

    update(uri, change)


def read_counts(uri: str, since: str = "") -> dict[str, VersionCounts]:
    """Return the counts by model version, since a day (YYYY-MM-DD) or of all days; empty without a file."""
    file = _parse(uri, storage.read_bytes(uri) if storage.exists(uri) else None)
    found = {} if since else dict(file.before)
    for day, counts in file.days.items():
        for version, more in counts.items():
            if day >= since:
                _add(found, version, more)
    return found


def _add(counts: dict[str, VersionCounts], version: str, more: VersionCounts) -> None:
    counts[version] = counts.get(version, VersionCounts()).plus(more)


def _parse(uri: str, data: bytes | None) -> CountsFile:
    if data is None:
        return CountsFile()
    try:
        return CountsFile.model_validate_json(data)
    except ValidationError as error:
        raise DataError(uri, "is not a file of counts", "restore it, or delete it to count from zero again") from error
