"""Measure a model as its users see it: at the size of the drawings, off the lines.

pipelines/evaluation/evaluate.py measures the network's own pictures; here they are also rendered, so that the pictures
of a model for 64 px can be compared with truths of 512 px. The tracks and the chunks are those of evaluate.py.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from animediffusion.pipelines.data.manifest import Manifest
from animediffusion.pipelines.data.stream import read_split
from animediffusion.pipelines.evaluation.evaluate import (
    ChunkScores,
    SplitRows,
    Track,
    as_tracks,
    chunks_of,
    fixed_chunks,
    mean_over_chunks,
    reporter,
    score_tracks,
    write_evaluation,
)
from animediffusion.pipelines.evaluation.metrics import (
    ColorScores,
    Images,
    PerImage,
    color_scores_each,
    mean_color_scores,
)

Painter = Callable[[Images, Images, int], Images]
"""Colors a sketch [H, W, 3] with a reference [H, W, 3] and a seed; returns a picture of the sketch's size."""


@dataclass(frozen=True, slots=True)
class NativeEvaluation:
    """Colors of a model's pictures on the rows of a dataset, at the dataset's size."""

    model: str
    """Bundle folder, URI or models:/ reference, as it was given."""
    model_sha256: str
    data: str
    data_hash: str
    """content_hash of the dataset."""
    split: str
    num_images: int
    image_size: int
    """Side of the images in pixels; the model may be for another size."""
    style: str
    """Style in which the pictures were rendered."""
    tracks: dict[str, ColorScores]
    """Scores of the model, by track."""
    baselines: dict[str, dict[str, ColorScores]]
    """Scores of the trivial baselines, by baseline and track."""
    cross_truth: Literal["second_view", "recolored"]
    """Truth of the track `cross`; second_view if all rows have a cross reference."""
    grid: str | None
    """Path of the picture; None if none was written."""

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that `evaluate --native` prints, which is also OUT/metrics.json."""
        return asdict(self)


def evaluate_native(
    model: str,
    model_sha256: str,
    painter: Painter,
    style: str,
    data: str,
    split: str = "val",
    limit: int | None = None,
    out: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    threads: int = 1,
) -> NativeEvaluation:
    """Measure the pictures of a painter, and write OUT/metrics.json and OUT/grid.png if `out` is given.

    Args:
        model: name of the model in the result.
        model_sha256: hash of its weights.
        painter: what colors; it is called from `threads` threads.
        style: name of the style in the result.
        data: URI of a dataset.
        split: split to measure on.
        limit: number of rows, the first of the split; None means all.
        out: folder of the files.
        progress: called with the numbers of finished and of all pictures.
        threads: number of pictures at the same time.

    Raises:
        DataError: if the data cannot be used.
    """
    manifest = Manifest.load(data)
    chunks = chunks_of(manifest, split, limit)
    total = sum(rows for _, rows in chunks)
    parts: list[ChunkScores] = []
    report = reporter(parts, total, progress)
    with ThreadPoolExecutor(threads) as pool:
        for start, rows in chunks:
            parts.append(_score_chunk(painter, pool, read_split(data, split, rows, start), start, report))
    scores, baselines = mean_over_chunks(parts, mean_color_scores)
    result = NativeEvaluation(
        model=model,
        model_sha256=model_sha256,
        data=data,
        data_hash=manifest.content_hash,
        split=split,
        num_images=total,
        image_size=manifest.image_size,
        style=style,
        tracks=scores,
        baselines=baselines,
        cross_truth="second_view" if all(part.has_cross for part in parts) else "recolored",
        grid=None if out is None else str(out / "grid.png"),
    )
    if out is not None:
        write_evaluation(out, result.to_json(), parts[0].shown)
    return result


def _score_chunk(
    painter: Painter, pool: ThreadPoolExecutor, rows: SplitRows, start: int, report: Callable[[int], None]
) -> ChunkScores:
    """Color and score rows on both tracks; `report` gets the number of colored pictures."""
    chunks = fixed_chunks({key: value for key, value in rows.items() if key != "id"}, start)
    inputs = [one for chunk in chunks for one in zip(*chunk.pictures[:2], chunk.seeds, strict=True)]
    pictures = []
    for picture in pool.map(painter, *zip(*inputs, strict=True)):
        pictures.append(picture)
        report(len(pictures))
    sizes = [len(chunk.seeds) for chunk in chunks]
    tracks = as_tracks(chunks, list(torch.split(torch.from_numpy(np.stack(pictures)), sizes)))
    # Off the lines, the baseline `sketch` is white paper.
    return score_tracks(tracks, start, _measure, has_cross=bool(rows["has_cross"].all()), skipped="sketch")


def _measure(images: Images, track: Track) -> PerImage:
    return color_scores_each(images, track.truth, track.sketch)
