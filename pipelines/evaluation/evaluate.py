"""Measure a model on a split: two tracks, trivial baselines for comparison, and a picture of some results.

On the track `same`, the reference is the warped target. On the track `cross`, the reference is another picture with the
colors of the target, so the exact truth is known; for rows without a cross reference, target and warped reference are
recolored together. All seeds are fixed, so two models get the same inputs and the same noise.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from animediffusion.models.augmentation.augment import Batch, fixed_batch
from animediffusion.models.bundle import Bundle, SamplerDefaults, load_bundle
from animediffusion.models.colorize import colorize
from animediffusion.models.tensors import to_uint8
from animediffusion.pipelines.data.manifest import Manifest
from animediffusion.pipelines.data.stream import read_split
from animediffusion.pipelines.evaluation.metrics import (
    Images,
    ImageScores,
    PerImage,
    mean_scores,
    score_each,
    trivial_results,
)
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import ConfigError
from animediffusion.platform.images.codec import contact_sheet, encode_png

TRACKS = ("same", "cross")
SEED = 20240
Scores = TypeVar("Scores")
"""Mean scores, e.g. ImageScores."""
SplitRows = Mapping[str, NDArray[Any]]
"""Rows of a split as read_split() returns them, without `id`."""
CHUNK = 25
"""Images per batch, which bounds memory and the time between progress reports."""
GRID_ROWS = 8


@dataclass(frozen=True)
class Track:
    """Inputs and results of one track, all uint8 [B, S, S, 3]."""

    sketch: Images
    reference: Images
    result: Images
    truth: Images

    def first(self, number: int) -> Track:
        """Return copies of the first rows, which do not keep the others in memory."""
        return Track(*(images[:number].copy() for images in (self.sketch, self.reference, self.result, self.truth)))


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Quality of a model on the rows of a dataset."""

    model: str
    """Bundle folder, URI or models:/ reference, as it was given."""
    model_sha256: str
    data: str
    data_hash: str
    """content_hash of the dataset."""
    split: str
    num_images: int
    image_size: int
    """Side of the images in pixels."""
    sampler: SamplerDefaults
    tracks: dict[str, ImageScores]
    """Scores of the model, by track."""
    baselines: dict[str, dict[str, ImageScores]]
    """Scores of the trivial baselines, by baseline and track."""
    cross_truth: Literal["second_view", "recolored"]
    """Truth of the track `cross`; second_view if all rows have a cross reference."""
    grid: str | None
    """Path of the picture; None if none was written."""

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that `evaluate` prints, which is also OUT/metrics.json."""
        interval = list(self.sampler.guidance_interval)
        values = asdict(self)
        return {**values, "sampler": {**values["sampler"], "guidance_interval": interval}}


def evaluate(
    settings: Settings,
    model: str,
    data: str,
    split: str = "val",
    limit: int | None = None,
    out: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    on_cluster: bool = False,
) -> Evaluation:
    """Measure a model, and write OUT/metrics.json and OUT/grid.png if `out` is given.

    Only some rows are in memory at a time. On a cluster, to which the caller connects first, actors score them; on
    CPUs, the numbers are those of one process with as many threads.

    Raises:
        ConfigError: if the image sizes of data and model differ.
        BundleError, DataError, RegistryError: if model or data cannot be used.
        ClusterError: an actor or the cluster failed.
    """
    from animediffusion.platform.registry.client import Registry  # MLflow takes seconds to import

    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = Registry(settings).fetch(model)
    bundle = load_bundle(folder, device)
    manifest = Manifest.load(data)
    if manifest.image_size != bundle.config.image_size:
        found = f"{manifest.image_size} px, the model is for {bundle.config.image_size} px"
        raise ConfigError(data, found, "ingest the source at the model's size")
    chunks = chunks_of(manifest, split, limit)
    total = sum(rows for _, rows in chunks)
    parts: list[ChunkScores] = []
    report = reporter(parts, total, progress)
    if on_cluster:
        from animediffusion.pipelines.evaluation.on_cluster import score_on_cluster  # Ray takes long to import

        for part in score_on_cluster(folder, data, split, chunks):
            parts.append(part)
            report(0)
        parts.sort(key=lambda part: part.start)
    else:
        for start, rows in chunks:
            parts.append(score_chunk(bundle, read_split(data, split, rows, start), start, lambda done, _: report(done)))
    tracks, baselines = mean_over_chunks(parts, mean_scores)
    result = Evaluation(
        model=model,
        model_sha256=bundle.sha256,
        data=data,
        data_hash=manifest.content_hash,
        split=split,
        num_images=total,
        image_size=manifest.image_size,
        sampler=bundle.config.sampler,
        tracks=tracks,
        baselines=baselines,
        cross_truth="second_view" if all(part.has_cross for part in parts) else "recolored",
        grid=None if out is None else str(out / "grid.png"),
    )
    if out is not None:
        write_evaluation(out, result.to_json(), parts[0].shown)
    return result


def chunks_of(manifest: Manifest, split: str, limit: int | None) -> list[tuple[int, int]]:
    """Return the chunks of a split, or of its first `limit` rows, as (first row, number of rows).

    Raises:
        DataError: if the split is missing.
    """
    num_rows = sum(shard.rows for shard in manifest.split(split).shards)
    total = num_rows if limit is None else min(limit, num_rows)
    return [(start, min(CHUNK, total - start)) for start in range(0, total, CHUNK)]


def reporter(
    parts: Sequence[ChunkScores], total: int, progress: Callable[[int, int], None] | None
) -> Callable[[int], None]:
    """Return a function that calls `progress` with the numbers of finished and of all pictures.

    Args:
        parts: the finished chunks, a list that grows.
        total: number of rows.
        progress: the callback, if any.

    Returns:
        A function that takes the number of finished pictures of the next chunk.
    """

    def report(done: int) -> None:
        if progress is not None:
            progress(len(TRACKS) * sum(map(len, parts)) + done, len(TRACKS) * total)

    return report


@dataclass(frozen=True)
class ChunkScores:
    """Scores of some rows of a split."""

    start: int
    """Number of the first row."""
    tracks: dict[str, PerImage]
    """Scores of the model, by track."""
    baselines: dict[str, dict[str, PerImage]]
    """Scores of the trivial baselines, by baseline and track."""
    has_cross: bool
    """Whether all rows have a cross reference."""
    shown: dict[str, Track]
    """The first rows, for the picture; no rows unless `start` is 0."""

    def __len__(self) -> int:
        return len(self.tracks[TRACKS[0]]["ciede2000"])


def score_chunk(
    bundle: Bundle, rows: SplitRows, start: int, progress: Callable[[int, int], None] | None = None
) -> ChunkScores:
    """Color and score rows, which are in a split from the row `start` on."""
    tracks = run_tracks(bundle, {key: value for key, value in rows.items() if key != "id"}, progress, start)
    has_cross = bool(rows["has_cross"].all())
    return score_tracks(tracks, start, lambda images, track: score_each(images, track.truth), has_cross=has_cross)


def score_tracks(
    tracks: dict[str, Track],
    start: int,
    measure: Callable[[Images, Track], PerImage],
    *,
    has_cross: bool,
    skipped: str | None = None,
) -> ChunkScores:
    """Score colored rows and the trivial baselines.

    Args:
        tracks: both tracks of the rows.
        start: number of the first row in the split.
        measure: returns the metrics of images [B, S, S, 3] on a track.
        has_cross: whether all rows have a cross reference.
        skipped: a baseline that is not scored.
    """
    baselines: dict[str, dict[str, PerImage]] = {}
    for name, track in tracks.items():
        for baseline, images in trivial_results(track.sketch, track.reference).items():
            if baseline != skipped:
                baselines.setdefault(baseline, {})[name] = measure(images, track)
    return ChunkScores(
        start,
        {name: measure(track.result, track) for name, track in tracks.items()},
        baselines,
        has_cross,
        {name: track.first(GRID_ROWS if start == 0 else 0) for name, track in tracks.items()},
    )


def mean_over_chunks(
    parts: Sequence[ChunkScores], mean: Callable[[Sequence[PerImage]], Scores]
) -> tuple[dict[str, Scores], dict[str, dict[str, Scores]]]:
    """Return the mean scores of the model, by track, and of the baselines, by baseline and track."""
    return (
        {name: mean([part.tracks[name] for part in parts]) for name in TRACKS},
        {
            baseline: {name: mean([part.baselines[baseline][name] for part in parts]) for name in TRACKS}
            for baseline in parts[0].baselines
        },
    )


def write_evaluation(out: Path, values: dict[str, Any], shown: dict[str, Track]) -> None:
    """Write OUT/metrics.json and OUT/grid.png."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "grid.png").write_bytes(encode_png(grid(shown)))
    (out / "metrics.json").write_text(json.dumps(values, indent=1) + "\n")


def run_tracks(
    bundle: Bundle, rows: SplitRows, progress: Callable[[int, int], None] | None = None, start: int = 0
) -> dict[str, Track]:
    """Color all rows on both tracks with fixed references and fixed noise; errors are those of colorize().

    Args:
        bundle: the model.
        rows: rows of a split, without `id`.
        progress: a callback with the numbers of colored and of all pictures.
        start: number of the first row in the split, a multiple of CHUNK.
    """
    chunks, results, done = fixed_chunks(rows, start), [], 0
    for chunk in chunks:
        results.append(to_uint8(colorize(bundle, chunk.batch.sketch, chunk.batch.reference, seeds=chunk.seeds)))
        done += len(chunk.seeds)
        if progress is not None:
            progress(done, len(TRACKS) * len(rows["target"]))
    return as_tracks(chunks, results)


@dataclass(frozen=True)
class TrackChunk:
    """Some rows of a track, with fixed random inputs."""

    track: str
    batch: Batch
    seeds: list[int]
    """Seed of each row's noise."""

    @functools.cached_property
    def pictures(self) -> tuple[Images, Images, Images]:
        """Sketch, reference and truth, each uint8 [B, S, S, 3]."""
        columns = (self.batch.sketch.expand(-1, 3, -1, -1), self.batch.reference, self.batch.target)
        sketch, reference, truth = (to_uint8(column).cpu().numpy() for column in columns)
        return sketch, reference, truth


def fixed_chunks(rows: SplitRows, first: int = 0) -> list[TrackChunk]:
    """Divide both tracks of the rows into chunks of at most CHUNK images; `first` is the first row's number."""
    chunks = []
    for number, name in enumerate(TRACKS):
        for start in range(first, first + len(rows["target"]), CHUNK):
            own = slice(start - first, start - first + CHUNK)
            part = {key: torch.from_numpy(value[own]) for key, value in rows.items()}
            batch = fixed_batch(part, name, torch.Generator().manual_seed(SEED + 1000 * number + start))
            chunks.append(TrackChunk(name, batch, [SEED + start + i for i in range(len(part["target"]))]))
    return chunks


def as_tracks(chunks: list[TrackChunk], results: list[torch.Tensor]) -> dict[str, Track]:
    """Join the inputs and the results of all chunks by track; `results` are uint8 [B, S, S, 3], one per chunk."""
    parts: dict[str, list[tuple[Images, ...]]] = {name: [] for name in TRACKS}
    for chunk, result in zip(chunks, results, strict=True):
        sketch, reference, truth = chunk.pictures
        parts[chunk.track].append((sketch, reference, result.cpu().numpy(), truth))
    joined = {name: map(np.concatenate, zip(*part, strict=True)) for name, part in parts.items()}
    return {name: Track(*columns) for name, columns in joined.items()}


def grid(tracks: dict[str, Track], rows: int = GRID_ROWS) -> Images:
    """Draw a contact sheet with sketch | reference | result | truth, both tracks side by side."""
    lines: list[list[Images]] = []
    for i in range(min(rows, len(tracks["same"].truth))):
        line = [x[i] for t in tracks.values() for x in (t.sketch, t.reference, t.result, t.truth)]
        lines.append(line)
    labels = [f"{name}{suffix}" for suffix in ("", " (cross)") for name in ("sketch", "reference", "result", "truth")]
    return contact_sheet(lines, labels)
