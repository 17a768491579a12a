"""Compare two versions: the metrics of both, and the same drawings colored by both."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from animediffusion.pipelines.evaluation.examples import (
    NUM_EXAMPLES,
    color_examples,
    dataset_examples,
    drawn_examples,
    sheet,
)
from animediffusion.pipelines.release.checks import check_bundle
from animediffusion.pipelines.release.stored_evaluation import StoredEvaluation
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import ConfigError
from animediffusion.platform.images.codec import encode_png
from animediffusion.platform.registry.client import Registry
from animediffusion.platform.registry.model_version import Version

LOWER_IS_BETTER = ("ciede2000", "lpips", "fid")
CENTERED = ("sharpness",)
"""Metrics for which 1 is best, and more is not better."""


@dataclass(frozen=True)
class MetricRow:
    """One metric of both versions on one set of images."""

    data: str | None
    data_hash: str | None
    split: str | None
    num_images: int | None
    track: str
    metric: str
    a: float | None
    b: float | None
    difference: float | None
    """b - a."""
    better: int | None
    """Number of the better version; None if the two are equal or one was not measured."""


@dataclass(frozen=True)
class Comparison:
    """What `models compare V1 V2` prints."""

    versions: tuple[Version, Version]
    metrics: list[MetricRow]
    data: str | None
    picture: Path

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of `models compare --json`."""
        return {
            "versions": [{**version.summary(), "sampler": version.tags.get("sampler")} for version in self.versions],
            "metrics": [asdict(row) for row in self.metrics],
            "data": self.data,
            "picture": str(self.picture),
        }


def compare(
    settings: Settings, first: str, second: str, *, data: str | None = None, out: Path | None = None
) -> Comparison:
    """Compare two versions, and write an image of drawings that both colored.

    Args:
        settings: names the registry.
        first: number, alias or `models:/...` of the first version.
        second: the second version, in the same form.
        data: dataset whose first val rows are colored; drawn faces if None.
        out: PNG file to write; `compare-V1-V2.png` in the current folder if None.

    Raises:
        ConfigError: both are the same version, or the file name is unusable.
        RegistryError, BundleError, DataError: a version or the data is missing or cannot be read.
    """
    registry = Registry(settings)
    a, b = registry.get(first), registry.get(second)
    if a.version == b.version:
        raise ConfigError("models compare", f"{first} and {second} are both version {a.version}", "give two versions")
    picture = out or Path(f"compare-{a.version}-{b.version}.png")
    if picture.suffix.lower() != ".png" or picture.is_dir():
        raise ConfigError("--out", str(picture), "give the name of a PNG file")
    _draw(registry, a, b, data, picture)
    return Comparison((a, b), metric_rows(a, b), data, picture)


def metric_rows(a: Version, b: Version) -> list[MetricRow]:
    """Return one row per metric and set of images that either version was evaluated on, from the latest evaluations."""
    rows: list[MetricRow] = []
    rest = _newest(b)
    for ours in _newest(a):
        theirs = next((result for result in rest if ours.has_same_images(result)), None)
        rest = [result for result in rest if result is not theirs]
        rows += _rows(ours, (a, ours), (b, theirs))
    for theirs in rest:
        rows += _rows(theirs, (a, None), (b, theirs))
    return rows


def _newest(version: Version) -> list[StoredEvaluation]:
    """Return the last evaluation on each set of images."""
    kept: list[StoredEvaluation] = []
    for result in map(StoredEvaluation.of, version.evaluations):
        kept = [known for known in kept if not known.has_same_images(result)] + [result]
    return kept


_Measured = tuple[Version, StoredEvaluation | None]


def _rows(images: StoredEvaluation, a: _Measured, b: _Measured) -> list[MetricRow]:
    left, right = (result.metrics if result else {} for _, result in (a, b))
    rows = []
    for key in dict.fromkeys([*left, *right]):
        track, _, metric = key.partition(".")
        x, y = left.get(key), right.get(key)
        rows.append(
            MetricRow(
                data=images.data,
                data_hash=images.data_hash,
                split=images.split,
                num_images=images.num_images,
                track=track,
                metric=metric,
                a=x,
                b=y,
                difference=None if x is None or y is None else round(y - x, 6),
                better=_better(metric, x, y, a[0].version, b[0].version),
            )
        )
    return rows


def _better(metric: str, x: float | None, y: float | None, a: int, b: int) -> int | None:
    if x is None or y is None:
        return None
    if metric in CENTERED:
        x, y = -abs(x - 1), -abs(y - 1)
    elif metric in LOWER_IS_BETTER:
        x, y = -x, -y
    if x == y:
        return None
    return a if x > y else b


def _draw(registry: Registry, a: Version, b: Version, data: str | None, picture: Path) -> None:
    bundles = {
        f"version {version.version}": check_bundle(
            registry.fetch(f"models:/{version.name}/{version.version}"), version.sha256
        )
        for version in (a, b)
    }
    size = max(bundle.config.image_size for bundle in bundles.values())
    examples = drawn_examples(size, NUM_EXAMPLES) if data is None else dataset_examples(data, NUM_EXAMPLES)
    results = {name: color_examples(bundle, examples) for name, bundle in bundles.items()}
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes(encode_png(sheet(examples, results)))
