"""Measure a model as its users see it: at the size of the drawings, off the lines.

pipelines/evaluation/evaluate.py measures the network's own pictures; here they are also rendered, so that the pictures
of a model for 64 px can be compared with truths of 512 px. The tracks are those of evaluate.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from animediffusion.models.tensors import to_uint8
from animediffusion.pipelines.data.manifest import Manifest
from animediffusion.pipelines.data.stream import read_split
from animediffusion.pipelines.evaluation.evaluate import as_tracks, fixed_chunks, grid
from animediffusion.pipelines.evaluation.metrics import ColorScores, Images, color_scores, trivial_results
from animediffusion.platform.images.codec import encode_png

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
    rows = {key: value for key, value in read_split(data, split, limit).items() if key != "id"}
    chunks = fixed_chunks(rows)
    sizes = [len(chunk.seeds) for chunk in chunks]

    def inputs() -> Iterator[tuple[Images, Images, int]]:
        for chunk in chunks:
            sketches = to_uint8(chunk.batch.sketch.expand(-1, 3, -1, -1)).numpy()
            yield from zip(sketches, to_uint8(chunk.batch.reference).numpy(), chunk.seeds, strict=True)

    pictures = []
    with ThreadPoolExecutor(threads) as pool:
        for picture in pool.map(lambda one: painter(*one), inputs()):
            pictures.append(picture)
            if progress is not None:
                progress(len(pictures), sum(sizes))
    tracks = as_tracks(chunks, list(torch.split(torch.from_numpy(np.stack(pictures)), sizes)))
    baselines: dict[str, dict[str, ColorScores]] = {}
    for name, track in tracks.items():
        for baseline, images in trivial_results(track.sketch, track.reference).items():
            if baseline != "sketch":  # off the lines, a sketch is white paper
                baselines.setdefault(baseline, {})[name] = color_scores(images, track.truth, track.sketch)
    result = NativeEvaluation(
        model=model,
        model_sha256=model_sha256,
        data=data,
        data_hash=manifest.content_hash,
        split=split,
        num_images=len(rows["target"]),
        image_size=manifest.image_size,
        style=style,
        tracks={name: color_scores(track.result, track.truth, track.sketch) for name, track in tracks.items()},
        baselines=baselines,
        cross_truth="second_view" if rows["has_cross"].all() else "recolored",
        grid=None if out is None else str(out / "grid.png"),
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "grid.png").write_bytes(encode_png(grid(tracks)))
        (out / "metrics.json").write_text(json.dumps(result.to_json(), indent=1) + "\n")
    return result
