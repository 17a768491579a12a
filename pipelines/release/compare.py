"""Compare two versions: the metrics of both, and the same drawings colored by both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from animediffusion.pipelines.evaluation.examples import (
    NUM_EXAMPLES,
    color_examples,
    dataset_examples,
    drawn_examples,
    sheet,
)
from animediffusion.pipelines.release.checks import check_bundle, same_data
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import ConfigError
from animediffusion.platform.images.codec import encode_png
from animediffusion.platform.registry.client import Registry
from animediffusion.platform.registry.model_version import Version, headline

LOWER_IS_BETTER = ("ciede2000", "lpips", "fid")
CENTERED = ("sharpness",)
"""Metrics for which 1 is best, and more is not better."""


def compare(
    settings: Settings, first: str, second: str, *, data: str | None = None, out: Path | None = None
) -> dict[str, Any]:
    """Return the comparison that `models compare V1 V2` prints, and write its image.

    Args:
        settings: names the registry.
        first: number, alias or `models:/...` of the first version.
        second: the second version, in the same form.
        data: dataset whose first val rows are colored; drawn faces if None.
        out: PNG file to write; `compare-V1-V2.png` in the current folder if None.

    Returns:
        `{versions: [A, B], metrics: [...], data, picture}`; a metric is `{data, data_hash, split, num_images, track,
        metric, a, b, difference, better}`. `difference` is b - a; `better` is the number of the better version, or None
        if the two are equal or one was not measured.

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
    summaries = [{**version.summary(), "sampler": version.tags.get("sampler")} for version in (a, b)]
    return {"versions": summaries, "metrics": metric_rows(a, b), "data": data, "picture": str(picture)}


def metric_rows(a: Version, b: Version) -> list[dict[str, Any]]:
    """Return one row per metric and set of images that either version was evaluated on, from the latest evaluations."""
    rows: list[dict[str, Any]] = []
    rest = _newest(b.evaluations)
    for ours in _newest(a.evaluations):
        theirs = next((result for result in rest if same_data(ours, result)), None)
        rest = [result for result in rest if result is not theirs]
        rows += _rows(a, b, ours, theirs)
    for theirs in rest:
        rows += _rows(a, b, None, theirs)
    return rows


def _newest(evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the last evaluation on each set of images."""
    kept: list[dict[str, Any]] = []
    for result in evaluations:
        kept = [known for known in kept if not same_data(known, result)] + [result]
    return kept


def _rows(a: Version, b: Version, ours: dict[str, Any] | None, theirs: dict[str, Any] | None) -> list[dict[str, Any]]:
    source = ours or theirs or {}
    where = {key: source.get(key) for key in ("data", "data_hash", "split", "num_images")}
    left, right = headline(ours or {}), headline(theirs or {})
    rows = []
    for key in dict.fromkeys([*left, *right]):
        track, _, metric = key.partition(".")
        x, y = left.get(key), right.get(key)
        difference = None if x is None or y is None else round(y - x, 6)
        better = _better(metric, x, y, a.version, b.version)
        numbers = {"a": x, "b": y, "difference": difference, "better": better}
        rows.append({**where, "track": track, "metric": metric, **numbers})
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
