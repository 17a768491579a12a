"""Folders of small pictures to ingest, and an ingest that runs without a cluster."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar
from unittest.mock import patch

import numpy as np
from PIL import Image

from animediffusion.pipelines.data import ingest
from animediffusion.pipelines.data.ingest import IngestJob, Progress
from animediffusion.pipelines.data.ingest_task import pack, run_packed
from animediffusion.pipelines.data.manifest import Manifest
from animediffusion.platform.errors import StorageError

T = TypeVar("T")


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


def in_this_process(tasks: Iterable[Callable[[], T]], note: Callable[[str], None]) -> Iterator[T]:
    """Run the tasks of an ingest in this process; each is packed as for a worker."""
    for task in tasks:
        result = pickle.loads(run_packed({"task": np.array([pack(task)], dtype=object)})["result"][0])
        if isinstance(result, StorageError):
            raise result
        yield result


def without_ray(job: IngestJob, progress: Progress | None = None) -> Manifest:
    with patch.object(ingest, "run_tasks", in_this_process):
        return job.run(progress)
