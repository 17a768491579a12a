"""Folders of small pictures to ingest, and an ingest that runs without a cluster."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from animediffusion.pipelines.data.ingest import IngestJob
from animediffusion.pipelines.data.manifest import Manifest


def picture(seed: int, size: tuple[int, int] = (24, 20), kind: str = "PNG", mode: str = "RGB") -> bytes:
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    low = 200 if mode == "L" else 0
    pixels = np.random.default_rng(seed).integers(low, 256, shape, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def lined() -> bytes:
    """A PNG that is a drawing and a reference: gray with two dark lines."""
    pixels = np.full((48, 48, 3), 230, np.uint8)
    pixels[12:15], pixels[:, 30:33] = 20, 20
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def fill(folder: Path, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return str(folder)


def in_this_process(
    work: Callable[..., dict[str, list[str]]], table: list[dict[str, Any]], where: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Run the functions of an ingest in this process, as Ray Data runs them on workers."""
    for row in table:
        made = work({name: np.array([value], dtype=object) for name, value in row.items()}, **where)
        yield {name: values[0] for name, values in made.items()}


def without_ray(job: IngestJob) -> Manifest:
    return job.run(spread=in_this_process)
