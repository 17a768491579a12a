"""Checkpoints of a run: written atomically, verified by hash, readable with safetensors and JSON alone.

    PLACE/step-00000500/{state.safetensors, state.json, checksums.json[, score.json]}

On a local disk, a checkpoint appears by one rename. In an object store, checksums.json is written last: a folder
without it is not a checkpoint. The newest few checkpoints and the one with the best score are kept.

Ray Train's own checkpoint registry is not used: it rewrites one snapshot in place, so a kill or an outage at that
moment ends the run; it reads only what the same version of Ray wrote; and it has no hashes.
models/training/loop.py defines the state, pipelines/training/validation.py computes the score.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from animediffusion.platform.errors import StorageError
from animediffusion.platform.storage import storage

CHECKSUMS, SCORE = "checksums.json", "score.json"
OUTAGE_S = 300.0
"""Seconds for which a run retries what it cannot skip: reading its last checkpoint and writing its result."""
PAUSE_S = 5.0
"""Seconds between two such attempts."""

_NAME = re.compile(r"step-(\d{8,})")
T = TypeVar("T")
Save = Callable[[Path], None]
"""Function that writes the files of a copied state into a folder; it runs outside the training thread."""
Take = Callable[[], Save]
"""Function that copies the current state, so that training can continue while the copy is written."""


@dataclass(frozen=True, slots=True)
class CheckpointScore:
    """Quality of a checkpoint on the first rows of `val`."""

    psnr: float
    """PSNR of the cross track in dB."""
    ssim: float
    """SSIM of the cross track, at most 1."""
    ciede2000: float
    """Color difference (CIEDE2000) on the cross track; the checkpoint with the lowest is the best."""
    psnr_same: float
    """PSNR of the same track in dB."""


def step_name(step: int) -> str:
    """Return the name of the folder that holds a step's checkpoint."""
    return f"step-{step:08d}"


def _files(place: str) -> dict[int, set[str]]:
    """Return the file names of each complete checkpoint at `place`, by step, from one listing."""
    found: dict[int, set[str]] = {}
    for path in storage.list_files(place) if storage.exists(place) else []:
        folder, _, name = path.partition("/")
        if match := _NAME.fullmatch(folder):
            found.setdefault(int(match[1]), set()).add(name)
    return {step: names for step, names in found.items() if CHECKSUMS in names}


def list_steps(place: str) -> list[int]:
    """Return the steps of the complete checkpoints at `place`, ascending."""
    return sorted(_files(place))


def latest_step(place: str) -> int:
    """Return the step of the newest checkpoint at `place`, or 0 if `place` has no checkpoint."""
    return max(list_steps(place), default=0)


def fetch(place: str, step: int, folder: Path) -> None:
    """Copy a checkpoint into a local folder and verify its hashes.

    Raises:
        ValueError: a file is missing or differs from its hash.
        StorageError: the store fails.
    """
    from animediffusion.models.bundle import file_sha256  # here, because torch takes seconds to import

    source = storage.join(place, step_name(step))
    storage.download_folder(source, folder)
    try:
        expected = json.loads((folder / CHECKSUMS).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}/{CHECKSUMS} is damaged") from error
    for name, sha256 in expected.items():
        path = folder / name
        if not path.is_file() or file_sha256(path) != sha256:
            raise ValueError(f"{source}/{name} was changed after it was written (sha256 differs)")


def fetch_newest(place: str, folder: Path, warn: Callable[[str], None]) -> int:
    """Fetch the newest undamaged checkpoint and return its step, or 0 if there is none.

    The checksums.json of a damaged checkpoint is deleted, so that the folder no longer counts as a checkpoint. Its
    other files stay for inspection.
    """
    for step in reversed(list_steps(place)):
        shutil.rmtree(folder, ignore_errors=True)
        try:
            fetch(place, step, folder)
        except ValueError as error:
            warn(f"{error}; using the checkpoint before it")
            storage.delete(storage.join(place, step_name(step), CHECKSUMS))
        else:
            return step
    shutil.rmtree(folder, ignore_errors=True)
    return 0


def read_scores(place: str) -> dict[int, CheckpointScore]:
    """Return the scores of all scored checkpoints, by step, ascending."""
    scored = sorted(step for step, names in _files(place).items() if SCORE in names)
    files = {step: storage.read_bytes(storage.join(place, step_name(step), SCORE)) for step in scored}
    return {step: CheckpointScore(**json.loads(content)) for step, content in files.items()}


def write_score(place: str, step: int, score: CheckpointScore) -> None:
    """Write a score into the folder of its checkpoint."""
    storage.write_bytes(storage.join(place, step_name(step), SCORE), json.dumps(asdict(score)).encode() + b"\n")


def best_step(scores: dict[int, CheckpointScore]) -> int | None:
    """Return the step with the lowest CIEDE2000 (the later step of a tie), or None without scores."""
    return min(scores, key=lambda step: (scores[step].ciede2000, -step), default=None)


def prune(place: str, keep: int, awaited: Collection[int] = ()) -> None:
    """Delete all checkpoints except the newest `keep`, the best, and the steps in `awaited`, which await a score."""
    old = [step for step in list_steps(place)[:-keep] if step not in awaited]
    if old:
        best = best_step(read_scores(place))
        for step in old:
            if step != best:
                # Delete the checksums first: a folder without them, which a kill may leave, is not a checkpoint.
                storage.delete(storage.join(place, step_name(step), CHECKSUMS))
                storage.delete(storage.join(place, step_name(step)))


def retry_outage(call: Callable[[], T], seconds: float = OUTAGE_S) -> T:
    """Return the result of `call`, retried on StorageError for up to `seconds`; then raise that error.

    Use it only for calls that a run cannot skip: each call of a storage function already retries by itself.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            return call()
        except StorageError:
            if time.monotonic() + PAUSE_S > end:
                raise
            time.sleep(PAUSE_S)


class CheckpointWriter:
    """Background writer of one run's checkpoints; it also deletes the old ones.

    `save` returns as soon as the state is copied; a thread writes, hashes and uploads the copy while training
    continues. At most two copies exist, one being written and one waiting: a new state replaces the waiting one.
    A failed save only causes a warning: training continues, and the next save tries again.

    Args:
        place: URI of the folder for the checkpoints.
        keep: number of newest checkpoints to keep.
        warn: called with one line for each failed save.
        saved: called with step and state after each successful save, in the thread that wrote it.
        awaited: returns the steps whose checkpoints must stay because they await a score.
    """

    def __init__(
        self,
        place: str,
        keep: int,
        warn: Callable[[str], None],
        saved: Callable[[int, Save], None] = lambda _step, _state: None,
        awaited: Callable[[], Collection[int]] = tuple,
    ) -> None:
        self.place, self.keep, self.warn, self.saved, self.awaited = place, keep, warn, saved, awaited
        self._remote = storage.is_remote(place)
        self._changed = threading.Condition()
        self._next: tuple[int, Save] | None = None
        self._busy = False
        self._newest = 0
        if not self._remote:
            self._clear()

    def save(self, step: int, take: Take) -> None:
        """Copy the state now and save it in the background; a full disk or a failing store never raises here."""
        with self._changed:
            self._next = None  # before copying: memory suffices for two copies, and one may be being written
        state = take()
        with self._changed:
            self._next = (step, state)
            if not self._busy:
                self._busy = True
                threading.Thread(target=self._save_all, name="checkpoints", daemon=True).start()

    def finish(self, step: int, take: Take) -> None:
        """Save the last state and wait until it is written; retry for up to OUTAGE_S.

        Raises:
            StorageError: the state could not be saved within OUTAGE_S.
        """

        def attempt() -> None:
            if self._newest < step:
                self.save(step, take)
                self.wait()
            if self._newest < step:
                raise StorageError(
                    self.place,
                    f"the state of step {step} cannot be saved",
                    "free disk space or check that the store is reachable",
                )

        retry_outage(attempt)

    def prune(self) -> None:
        """Delete the checkpoints that are not to be kept; if the store fails, they stay, which does no harm."""
        with suppress(StorageError):
            prune(self.place, self.keep, self.awaited())

    def wait(self) -> None:
        """Wait until no checkpoint is being written or waiting."""
        with self._changed:
            self._changed.wait_for(lambda: not self._busy)

    def _write(self, step: int, state: Save) -> Path:
        """Write the files of a checkpoint, checksums included, into a local folder and return the folder."""
        from animediffusion.models.bundle import file_sha256  # here, because torch takes seconds to import

        if self._remote:
            folder = Path(tempfile.mkdtemp(prefix="checkpoint-"))
        else:
            folder = Path(self.place) / f".{step_name(step)}.part"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        try:
            state(folder)
            sums = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
            (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n")
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return folder

    def _save_all(self) -> None:
        while True:
            with self._changed:
                if self._next is None:
                    self._busy = False
                    self._changed.notify_all()
                    return
                (step, state), self._next = self._next, None
            try:
                self._commit(step, self._write(step, state))
                self.saved(step, state)
                self.prune()
            except Exception as error:  # whatever the error is, the loop must continue, so that wait() returns
                self._failed(step, error)
            del state

    def _commit(self, step: int, folder: Path) -> None:
        target = storage.join(self.place, step_name(step))
        try:
            if self._remote:
                for name in sorted((path.name for path in folder.iterdir()), key=lambda name: name == CHECKSUMS):
                    storage.write_bytes(storage.join(target, name), (folder / name).read_bytes())
            else:
                _to_disk(folder)
                shutil.rmtree(target, ignore_errors=True)
                folder.rename(target)
                _to_disk(Path(self.place))
            self._newest = step
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _failed(self, step: int, error: Exception) -> None:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        self.warn(f"the checkpoint of step {step} could not be saved ({reason}); training continues")

    def _clear(self) -> None:
        """Delete the partial checkpoints of a killed process."""
        for path in Path(self.place).glob(".step-*.part"):
            shutil.rmtree(path, ignore_errors=True)


def _to_disk(folder: Path) -> None:
    """Flush a folder's files and the folder's own entry list to disk (fsync)."""
    for path in [*(entry for entry in folder.iterdir() if entry.is_file()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
