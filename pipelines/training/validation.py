"""Score checkpoints while training continues: on CPUs in a separate task, on GPUs on all ranks between two steps.

A score measures the first rows of `val` on both tracks, colored with the sampler that the bundle will have. It is
written into the checkpoint (score.json) and to MLflow (score/METRIC, and the image `samples`), and reported to the
driver. pipelines/evaluation/evaluate.py defines the tracks, and pipelines/training/checkpoints.py keeps the best
checkpoint.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import ray
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from animediffusion.models.bundle import Bundle, BundleConfig
from animediffusion.models.colorize import colorize
from animediffusion.models.out_of_memory import is_out_of_memory
from animediffusion.models.tensors import to_uint8
from animediffusion.models.training.loop import Snapshot, TrainState, averaged_weights, write
from animediffusion.pipelines.evaluation.evaluate import (
    SplitRows,
    Track,
    TrackChunk,
    as_tracks,
    fixed_chunks,
    grid,
    run_tracks,
)
from animediffusion.pipelines.evaluation.metrics import score
from animediffusion.pipelines.training.checkpoints import (
    CheckpointScore,
    CheckpointWriter,
    Save,
    Take,
    best_step,
    fetch,
    read_scores,
    write_score,
)
from animediffusion.platform.errors import StorageError

if TYPE_CHECKING:
    from animediffusion.platform.tracking.tracking import Run

SCORING_S = 120.0
"""Seconds that a run waits at its end for each score that is still missing."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Score of a checkpoint, and an image of some rows that its weights colored."""

    score: CheckpointScore
    image: NDArray[np.uint8]

    @classmethod
    def written(cls, place: str, step: int, tracks: dict[str, Track]) -> Self:
        """Score colored rows, and write the score into the checkpoint."""
        cross, same = (score(tracks[name].result, tracks[name].truth) for name in ("cross", "same"))
        found = CheckpointScore(cross.psnr, cross.ssim, cross.ciede2000, psnr_same=same.psnr)
        write_score(place, step, found)
        return cls(found, grid(tracks))

    def log(self, run: Run, step: int) -> None:
        """Log the score and the image to MLflow."""
        run.log({f"score/{key}": value for key, value in asdict(self.score).items()}, step)
        run.log_image(self.image, "samples", step)


class SharedColorizer:
    """Colors the scoring rows on the training devices, between two steps; each rank colors a share.

    A CPU core would take minutes for large networks. The thread that writes the checkpoint computes the metrics, so the
    ranks do not wait for them.

    Args:
        config: configuration of the bundle that the run produces.
        rows: rows of val.
    """

    def __init__(self, config: BundleConfig, rows: SplitRows) -> None:
        self._config, self._chunks = config, fixed_chunks(rows)

    def color(self, state: TrainState, rank: int, world_size: int) -> dict[str, Track] | None:
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
        """Color this rank's share; return None if memory is short: an error would leave the other ranks waiting."""
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


@dataclass(frozen=True, slots=True)
class ScoringTask:
    """What a scoring task needs."""

    config: BundleConfig
    """Configuration of the bundle that the run produces."""
    rows: SplitRows
    """Rows of val."""


@ray.remote(num_cpus=0, max_retries=1)
def _score(place: str, step: int, task: ScoringTask) -> Scored | None:
    torch.set_num_threads(1)  # the task shares the cores with the workers and must not slow them down
    denoiser = task.config.build()
    with tempfile.TemporaryDirectory() as folder:
        try:
            fetch(place, step, Path(folder))
        except (StorageError, ValueError):
            return None  # e.g. newer checkpoints have replaced this one
        denoiser.load_state_dict(averaged_weights(Path(folder)))
    bundle = Bundle(task.config, denoiser.eval().requires_grad_(False), {}, "", Path())
    return Scored.written(place, step, run_tracks(bundle, task.rows))


class Scorer:
    """Queue of checkpoints to score in Ray tasks, one at a time; `scores` collects the results.

    The tasks do not log to MLflow themselves, because it takes seconds to import.

    Args:
        place: URI of the folder with the checkpoints.
        log: the run in MLflow.
        task: what the tasks need.
    """

    def __init__(self, place: str, log: Run, task: ScoringTask) -> None:
        self.place, self.scores = place, dict[int, CheckpointScore]()
        self._log = log
        self._task = ray.put(task)
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
        self.poll()

    def poll(self, timeout_s: float = 0.0) -> None:
        """Collect the running task's result if it is ready within `timeout_s`, and start the queued task."""
        with self._lock:
            if self._running is not None:
                step, task = self._running
                if not ray.wait([task], timeout=timeout_s)[0]:
                    return
                self._running = None
                self._collect(step, task)
            if self._next is not None:
                self._running = (self._next, _score.remote(self.place, self._next, self._task))
                self._next = None

    def finish(self, timeout_s: float) -> None:
        """Wait for the running and the queued task, up to `timeout_s` each."""
        self.poll(timeout_s)
        self.poll(timeout_s)

    def _collect(self, step: int, task: Any) -> None:
        try:
            found: Scored | None = ray.get(task)
        except ray.exceptions.RayError:
            return  # a missing score must not end the run
        if found is not None:
            self.scores[step] = found.score
            found.log(self._log, step)


@dataclass(frozen=True)
class _ColoredState:
    """A copied state that is to be saved, and the scoring rows as that state colored them, if it did."""

    snapshot: Snapshot
    tracks: dict[str, Track] | None

    def __call__(self, folder: Path) -> None:
        write(self.snapshot, folder)


class ScoredCheckpoints:
    """Checkpoints of a run, written in the background and then scored.

    Args:
        place: URI of the folder with the checkpoints.
        keep: number of newest checkpoints to keep.
        log: the run in MLflow.
        warn: called with one line for each checkpoint that could not be saved.
        task: what a scoring task needs; None if the ranks color the rows, or nothing is scored.
    """

    def __init__(
        self, place: str, keep: int, log: Run, warn: Callable[[str], None], task: ScoringTask | None = None
    ) -> None:
        self._place, self._log = place, log
        self._scorer = Scorer(place, log, task) if task is not None else None
        awaited = self._scorer.awaited if self._scorer is not None else tuple
        self._writer = CheckpointWriter(place, keep, warn, self._score, awaited)
        self._scores: dict[int, CheckpointScore] = {}

    def resume(self) -> None:
        """Read the scores of the checkpoints that are there."""
        self._scores = read_scores(self._place)

    def save(self, state: TrainState, tracks: dict[str, Track] | None = None) -> None:
        """Save the state in the background, and score it afterwards; a failure only causes a warning.

        Args:
            state: the state to copy now.
            tracks: the scoring rows as this state colored them; None if a task colors them.
        """
        self._writer.save(state.step, self._copier(state, tracks))

    def save_last(self, state: TrainState, tracks: dict[str, Track] | None = None) -> None:
        """Save the last state and wait until it is written.

        Raises:
            StorageError: the state could not be saved.
        """
        self._writer.finish(state.step, self._copier(state, tracks))

    def poll(self) -> None:
        """Collect the results of scoring tasks that have ended."""
        if self._scorer is not None:
            self._scorer.poll()

    def wait_for_scores(self) -> None:
        """Wait for the missing scores, up to SCORING_S each, and delete the checkpoints that are not to be kept."""
        if self._scorer is not None:
            self._scorer.finish(SCORING_S)
            self._writer.prune()

    def wait(self) -> None:
        """Wait until no checkpoint is being written."""
        self._writer.wait()

    def best(self) -> tuple[int, CheckpointScore] | tuple[None, None]:
        """Return the step and the score of the best checkpoint so far, or None twice without scores."""
        scores = {**self._scores, **(self._scorer.scores if self._scorer is not None else {})}
        step = best_step(scores)
        return (None, None) if step is None else (step, scores[step])

    def _copier(self, state: TrainState, tracks: dict[str, Track] | None) -> Take:
        return lambda: _ColoredState(state.snapshot(), tracks)

    def _score(self, step: int, saved: Save) -> None:
        """Score a saved checkpoint; called in the thread that wrote it."""
        if self._scorer is not None:
            self._scorer.start(step)
        if isinstance(saved, _ColoredState) and saved.tracks is not None:
            with suppress(StorageError):  # a missing score must not end the run
                found = Scored.written(self._place, step, saved.tracks)
                self._scores[step] = found.score
                found.log(self._log, step)
