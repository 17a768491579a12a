"""Measure a model on a split: two tracks, trivial baselines for comparison, and a picture of some results.

On the track `same`, the reference is the warped target. On the track `cross`, the reference is another picture with the
colors of the target, so the exact truth is known; for rows without a cross reference, target and warped reference are
recolored together. All seeds are fixed, so two models get the same inputs and the same noise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from animediffusion.models.augmentation.augment import Batch, fixed_batch
from animediffusion.models.bundle import Bundle, SamplerDefaults, load_bundle
from animediffusion.models.colorize import colorize
from animediffusion.models.tensors import to_uint8
from animediffusion.pipelines.data.manifest import Manifest
from animediffusion.pipelines.data.stream import read_split
from animediffusion.pipelines.evaluation.metrics import Images, ImageScores, score, trivial_results
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import ConfigError
from animediffusion.platform.images.codec import contact_sheet, encode_png

TRACKS = ("same", "cross")
SEED = 20240
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
) -> Evaluation:
    """Measure a model, and write OUT/metrics.json and OUT/grid.png if `out` is given.

    Raises:
        ConfigError: if the image sizes of data and model differ.
        BundleError, DataError, RegistryError: if model or data cannot be used.
    """
    from animediffusion.platform.registry.client import Registry  # MLflow takes seconds to import

    device = "cuda" if torch.cuda.is_available() else "cpu"
    bundle = load_bundle(Registry(settings).fetch(model), device)
    manifest = Manifest.load(data)
    if manifest.image_size != bundle.config.image_size:
        found = f"{manifest.image_size} px, the model is for {bundle.config.image_size} px"
        raise ConfigError(data, found, "ingest the source at the model's size")
    rows = {key: value for key, value in read_split(data, split, limit).items() if key != "id"}
    tracks = run_tracks(bundle, rows, progress)
    result = Evaluation(
        model=model,
        model_sha256=bundle.sha256,
        data=data,
        data_hash=manifest.content_hash,
        split=split,
        num_images=len(rows["target"]),
        image_size=manifest.image_size,
        sampler=bundle.config.sampler,
        tracks={name: score(track.result, track.truth) for name, track in tracks.items()},
        baselines=_baselines(tracks),
        cross_truth="second_view" if rows["has_cross"].all() else "recolored",
        grid=None if out is None else str(out / "grid.png"),
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "grid.png").write_bytes(encode_png(grid(tracks)))
        (out / "metrics.json").write_text(json.dumps(result.to_json(), indent=1) + "\n")
    return result


def run_tracks(bundle: Bundle, rows: SplitRows, progress: Callable[[int, int], None] | None = None) -> dict[str, Track]:
    """Color all rows on both tracks with fixed references and fixed noise."""
    chunks, results, done = fixed_chunks(rows), [], 0
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


def fixed_chunks(rows: SplitRows) -> list[TrackChunk]:
    """Divide both tracks of the rows into chunks of at most CHUNK images."""
    chunks = []
    for number, name in enumerate(TRACKS):
        for start in range(0, len(rows["target"]), CHUNK):
            part = {key: torch.from_numpy(value[start : start + CHUNK]) for key, value in rows.items()}
            batch = fixed_batch(part, name, torch.Generator().manual_seed(SEED + 1000 * number + start))
            chunks.append(TrackChunk(name, batch, [SEED + start + i for i in range(len(part["target"]))]))
    return chunks


def as_tracks(chunks: list[TrackChunk], results: list[torch.Tensor]) -> dict[str, Track]:
    """Join the inputs and the results of all chunks by track; `results` are uint8 [B, S, S, 3], one per chunk."""
    parts: dict[str, list[tuple[Images, ...]]] = {name: [] for name in TRACKS}
    for chunk, result in zip(chunks, results, strict=True):
        batch = chunk.batch
        sketch, reference, truth = (
            to_uint8(column).cpu().numpy()
            for column in (batch.sketch.expand(-1, 3, -1, -1), batch.reference, batch.target)
        )
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


def _baselines(tracks: dict[str, Track]) -> dict[str, dict[str, ImageScores]]:
    table: dict[str, dict[str, ImageScores]] = {}
    for name, track in tracks.items():
        for baseline, images in trivial_results(track.sketch, track.reference).items():
            table.setdefault(baseline, {})[name] = score(images, track.truth)
    return table
