"""Score a checkpoint while training goes on: a task of its own, on whatever node has room.

The first rows of `val`, both tracks, the sampler the bundle will have. Written beside the checkpoint (score.json), to
MLflow (score/TRACK/METRIC, and the pictures `samples`), and told to the driver. Not here: the tracks, see
pipelines/evaluate.py; which checkpoint is kept for its score, see pipelines/checkpoints.py.
"""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import Any

import ray
import torch

from animediffusion.models.bundle import Bundle
from animediffusion.models.training import averaged_weights
from animediffusion.pipelines.checkpoints import fetch, write_score
from animediffusion.pipelines.evaluate import grid, run_tracks
from animediffusion.pipelines.metrics import score
from animediffusion.pipelines.recipe import TrainConfig
from animediffusion.platform.errors import StorageError
from animediffusion.platform.tracking import Run

Score = dict[str, float]
"""psnr, ssim, ciede2000 on the cross track, and psnr_same."""


def score_state(folder: Path, run: TrainConfig, image_size: int, rows: dict[str, Any]) -> tuple[Score, Any]:
    """Color `rows` (see read_split) with the averaged weights of a saved state.

    Returns:
        the score, and sketch | reference | result | truth of some rows, uint8 [H, W, 3].
    """
    config = run.bundle_config(image_size)
    denoiser = config.build()
    denoiser.load_state_dict(averaged_weights(folder))
    bundle = Bundle(config, denoiser.eval().requires_grad_(False), {}, "", folder)
    tracks = run_tracks(bundle, rows)
    cross, same = (score(tracks[name].result, tracks[name].truth) for name in ("cross", "same"))
    kept = {key: float(cross[key] or 0.0) for key in ("psnr", "ssim", "ciede2000")}
    return {**kept, "psnr_same": float(same["psnr"] or 0.0)}, grid(tracks)


SEND_S = 3.0
"""How long a score waits for MLflow; the driver sends what is left."""


@ray.remote(num_cpus=0, max_retries=1)
def _score(place: str, step: int, shared: dict[str, Any]) -> Score | None:
    torch.set_num_threads(1)  # beside the workers, not before them
    run = TrainConfig.check(shared["run"])
    with tempfile.TemporaryDirectory() as folder:
        try:
            fetch(place, step, Path(folder))
        except (StorageError, ValueError):
            return None  # newer ones have taken its place
        found, picture = score_state(Path(folder), run, shared["image_size"], shared["samples"])
    write_score(place, step, found)
    log = Run.attach(shared["tracking_uri"], shared["mlflow_run_id"], unsent=Path(shared["unsent"]))
    log.log({f"score/{key}": value for key, value in found.items()}, step)
    log.log_image(picture, "samples", step)
    log.leave(SEND_S)
    return found


class Scorer:
    """Starts a task for each checkpoint, one at a time, and tells what came out.

    Args:
        place: where the checkpoints are.
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

    def start(self, step: int) -> None:
        """Score this checkpoint as soon as the one before is done; one that still waits is left out."""
        with self._lock:
            self._next = step
        self.look(0)

    def look(self, timeout_s: float) -> None:
        """Take the result that is there, and start what waits."""
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
        """Wait for what runs and what waits, for so long each."""
        self.look(timeout_s)
        self.look(timeout_s)

    def _take(self, step: int, task: Any) -> None:
        try:
            found = ray.get(task)
        except ray.exceptions.RayError:
            return  # a score is worth having, not worth a run
        if found is not None:
            self.scores[step] = found
