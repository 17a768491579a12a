"""Score a checkpoint while training continues: on CPUs in a separate task, on GPUs on all ranks between two steps.

A score measures the first rows of `val` on both tracks, colored with the sampler that the bundle will have. It is
written into the checkpoint (score.json) and to MLflow (score/METRIC, and the image `samples`), and reported to the
driver. pipelines/evaluation/evaluate.py defines the tracks, and pipelines/training/checkpoints.py keeps the best
checkpoint.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch
import torch.distributed as dist

from animediffusion.models.bundle import Bundle
from animediffusion.models.colorize import colorize
from animediffusion.models.out_of_memory import is_out_of_memory
from animediffusion.models.tensors import to_uint8
from animediffusion.models.training.loop import TrainState, averaged_weights
from animediffusion.pipelines.evaluation.evaluate import Track, TrackChunk, as_tracks, fixed_chunks, grid, run_tracks
from animediffusion.pipelines.evaluation.metrics import score
from animediffusion.pipelines.training.checkpoints import fetch, write_score
from animediffusion.pipelines.training.recipe import TrainConfig
from animediffusion.platform.errors import StorageError

if TYPE_CHECKING:
    from animediffusion.platform.tracking.run import Run

Score = dict[str, float]
"""The psnr, ssim and ciede2000 of the cross track, and psnr_same, the PSNR of the same track."""


def record_score(place: str, step: int, tracks: dict[str, Track], log: Run) -> Score:
    """Score colored rows, write the score into the checkpoint, and log it to MLflow with an image of some rows."""
    cross, same = (score(tracks[name].result, tracks[name].truth) for name in ("cross", "same"))
    kept = {key: float(cross[key] or 0.0) for key in ("psnr", "ssim", "ciede2000")}
    found = {**kept, "psnr_same": float(same["psnr"] or 0.0)}
    write_score(place, step, found)
    log.log({f"score/{key}": value for key, value in found.items()}, step)
    log.log_image(grid(tracks), "samples", step)
    return found


class SharedPainter:
    """Colorizer of the scoring rows on the training devices, between two steps; each rank colors a share.

    A CPU core would take minutes for large networks. The thread that writes the checkpoint computes the metrics, so the
    ranks do not wait for them.

    Args:
        run: settings of the run.
        image_size: side of the images in pixels.
        rows: rows of val, as read_split returns them.
    """

    def __init__(self, run: TrainConfig, image_size: int, rows: dict[str, Any]) -> None:
        self._config, self._chunks = run.bundle_config(image_size), fixed_chunks(rows)

    def paint(self, state: TrainState, rank: int, world_size: int) -> dict[str, Track] | None:
        """Color the rows with the averaged weights; all ranks must call this, and each gets all rows.

        Returns None on all ranks if one of them has no memory for it, so that a missing score does not end the run.
        """
        own = self._own(state, slice(rank, None, world_size))
        shares: list[Any] = [own]
        if world_size > 1:
            shares = [None] * world_size
            dist.all_gather_object(shares, own)
        if any(share is None for share in shares):
            return None
        return as_tracks(self._chunks, [_interleave(parts) for parts in zip(*shares, strict=True)])

    def _own(self, state: TrainState, own: slice) -> list[torch.Tensor] | None:
        """This rank's share; None where memory is short. An error would leave the other ranks waiting."""
        try:
            bundle = Bundle(self._config, state.averaged(), {}, "", Path())
            return [self._share(bundle, chunk, own) for chunk in self._chunks]
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        return None

    def _share(self, bundle: Bundle, chunk: TrackChunk, own: slice) -> torch.Tensor:
        sketch, reference, seeds = chunk.batch.sketch[own], chunk.batch.reference[own], chunk.seeds[own]
        return to_uint8(colorize(bundle, sketch, reference, seeds=seeds) if seeds else reference).cpu()


def _interleave(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Merge n parts: rows 0, n, 2n, ... come from the first part, rows 1, n + 1, ... from the second, and so on."""
    rows = torch.empty((sum(map(len, parts)), *parts[0].shape[1:]), dtype=parts[0].dtype)
    for number, part in enumerate(parts):
        rows[number :: len(parts)] = part
    return rows


SEND_S = 3.0
"""Seconds that a scoring task waits for MLflow; the driver sends the remaining records."""


@ray.remote(num_cpus=0, max_retries=1)
def _score(place: str, step: int, shared: dict[str, Any]) -> Score | None:
    from animediffusion.platform.tracking.run import Run  # here, because MLflow takes seconds to import

    torch.set_num_threads(1)  # the task shares the cores with the workers and must not slow them down
    config = TrainConfig.check(shared["run"]).bundle_config(shared["image_size"])
    denoiser = config.build()
    with tempfile.TemporaryDirectory() as folder:
        try:
            fetch(place, step, Path(folder))
        except (StorageError, ValueError):
            return None  # e.g. newer checkpoints have replaced this one
        denoiser.load_state_dict(averaged_weights(Path(folder)))
    bundle = Bundle(config, denoiser.eval().requires_grad_(False), {}, "", Path())
    log = Run.attach(shared["tracking_uri"], shared["mlflow_run_id"], unsent=Path(shared["unsent"]))
    found = record_score(place, step, run_tracks(bundle, shared["samples"]), log)
    log.leave(SEND_S)
    return found


class Scorer:
    """Queue of checkpoints to score in Ray tasks, one at a time; `scores` collects the results.

    Args:
        place: URI of the folder with the checkpoints.
        shared: run (TrainConfig as a dictionary), image_size, tracking_uri, mlflow_run_id, unsent, samples
            (rows of val).
    """

    def __init__(self, place: str, shared: dict[str, Any]) -> None:
        self.place, self.scores = place, dict[int, Score]()
        wanted = ("run", "image_size", "tracking_uri", "mlflow_run_id", "unsent", "samples")
        self._shared = ray.put({key: shared[key] for key in wanted})
        self._lock = threading.Lock()
        self._running: tuple[int, Any] | None = None
        self._next: int | None = None

    def awaited(self) -> set[int]:
        """Return the steps whose checkpoints are being scored or are queued."""
        with self._lock:
            running = {self._running[0]} if self._running is not None else set()
            return running | ({self._next} if self._next is not None else set())

    def start(self, step: int) -> None:
        """Queue a checkpoint for scoring; it replaces the one that is still queued, if any."""
        with self._lock:
            self._next = step
        self.look(0)

    def look(self, timeout_s: float) -> None:
        """Collect the running task's result if it is ready within `timeout_s`, and start the queued task."""
        with self._lock:
            if self._running is not None:
                step, task = self._running
                if not ray.wait([task], timeout=timeout_s)[0]:
                    return
                self._running = None
                self._take(step, task)
            if self._next is not None:
                self._running = (self._next, _score.remote(self.place, self._next, self._shared))
                self._next = None

    def finish(self, timeout_s: float) -> None:
        """Wait for the running and the queued task, up to `timeout_s` each."""
        self.look(timeout_s)
        self.look(timeout_s)

    def _take(self, step: int, task: Any) -> None:
        try:
            found = ray.get(task)
        except ray.exceptions.RayError:
            return  # a missing score must not end the run
        if found is not None:
            self.scores[step] = found
