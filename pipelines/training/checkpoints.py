"""Checkpoints of a run: whole or absent, checked by hash, readable with safetensors and JSON alone.

    PLACE/step-00000500/{state.safetensors, state.json, checksums.json[, score.json]}

On a disk a checkpoint appears by one rename. In an object store checksums.json is written last; a folder without it is
no checkpoint. Kept are the newest few and the one with the best score.

Why not Ray Train's own registry: it rewrites one snapshot in place, so a kill or an outage in that moment ends the run;
it reads only what the same version of Ray wrote; and it knows no hashes.
Not here: what a state is (models/training/loop.py); who scores (pipelines/training/validation.py).
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
from pathlib import Path
from typing import TypeVar

from animediffusion.models.bundle import file_sha256
from animediffusion.platform.errors import StorageError
from animediffusion.platform.storage import files as storage

CHECKSUMS, SCORE = "checksums.json", "score.json"
BEST_BY = "ciede2000"
"""Of a score; lower is better."""
OUTLAST_S = 300.0
"""How long a run waits for a store that it cannot do without: to read its last checkpoint, and to write its result."""
PAUSE_S = 5.0

_NAME = re.compile(r"step-(\d{8,})")
T = TypeVar("T")
Save = Callable[[Path], None]
"""Writes the files of a state into a folder; called in another thread than training's."""
Take = Callable[[], Save]
"""Copies a state, so that training can change it meanwhile."""


def step_name(step: int) -> str:
    """Folder of a step's checkpoint."""
    return f"step-{step:08d}"


def _files(place: str) -> dict[int, set[str]]:
    """Names of the files of each whole checkpoint at `place`, by step, from one listing."""
    found: dict[int, set[str]] = {}
    for path in storage.list_files(place) if storage.exists(place) else []:
        folder, _, name = path.partition("/")
        if match := _NAME.fullmatch(folder):
            found.setdefault(int(match[1]), set()).add(name)
    return {step: names for step, names in found.items() if CHECKSUMS in names}


def list_steps(place: str) -> list[int]:
    """Steps of the whole checkpoints at `place`, ascending."""
    return sorted(_files(place))


def latest_step(place: str) -> int:
    """The step of the newest checkpoint at `place`, 0 if there is none."""
    return max(list_steps(place), default=0)


def fetch(place: str, step: int, folder: Path) -> None:
    """Copy a checkpoint into a local folder and check it.

    Raises:
        ValueError: a file is missing or differs from its hash.
        StorageError: the store fails.
    """
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
    """fetch() of the newest checkpoint that is as it was written; returns its step, 0 if there is none.

    A damaged one loses its checksums, so that from then on nobody takes it for a checkpoint; the rest stays to look at.
    """
    for step in reversed(list_steps(place)):
        shutil.rmtree(folder, ignore_errors=True)
        try:
            fetch(place, step, folder)
        except ValueError as error:
            warn(f"{error}; going back to the checkpoint before it")
            storage.delete(storage.join(place, step_name(step), CHECKSUMS))
        else:
            return step
    shutil.rmtree(folder, ignore_errors=True)
    return 0


def read_scores(place: str) -> dict[int, dict[str, float]]:
    """Scores of the checkpoints that have one, by step, ascending."""
    scored = sorted(step for step, names in _files(place).items() if SCORE in names)
    return {step: json.loads(storage.read_bytes(storage.join(place, step_name(step), SCORE))) for step in scored}


def write_score(place: str, step: int, score: dict[str, float]) -> None:
    """Put a score beside a checkpoint."""
    storage.write_bytes(storage.join(place, step_name(step), SCORE), json.dumps(score).encode() + b"\n")


def best_step(scores: dict[int, dict[str, float]]) -> int | None:
    """The step with the lowest cross-reference CIEDE2000, the later of equals; None without scores."""
    return min(scores, key=lambda step: (scores[step][BEST_BY], -step), default=None)


def prune(place: str, keep: int, awaited: Collection[int] = ()) -> None:
    """Delete all but the newest `keep` checkpoints, the best, and those whose score is `awaited`."""
    old = [step for step in list_steps(place)[:-keep] if step not in awaited]
    if old:
        best = best_step(read_scores(place))
        for step in old:
            if step != best:
                # First what makes it a checkpoint: a kill in between leaves none that is half there.
                storage.delete(storage.join(place, step_name(step), CHECKSUMS))
                storage.delete(storage.join(place, step_name(step)))


def outlast(call: Callable[[], T], seconds: float = OUTLAST_S) -> T:
    """The result of `call`, asked again while the store fails, for so long; then its StorageError.

    For the few things that a run cannot be without; each call has storage's own patience already.
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
    """Saves checkpoints of one run, one after the other, and deletes what is not kept.

    `save` returns when the state is copied; a thread writes, hashes and uploads the copy while training goes on. There
    are two copies at most: a state that comes while an older one is on its way takes the place of another that waits.
    What cannot be saved is a warning: training goes on, the next save tries again.

    Args:
        place: where checkpoints go.
        keep: how many of the newest stay.
        warn: gets one line for what could not be saved.
        saved: gets step and state of every checkpoint that is there; called from the thread that wrote it.
        awaited: returns the steps that stay until they have a score.
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
        """Copy a state now and save it; never raises for a disk that is full or a store that fails."""
        with self._changed:
            self._next = None  # before the copy: there is memory for two, and one may be on its way
        state = take()
        with self._changed:
            self._next = (step, state)
            if not self._busy:
                self._busy = True
                threading.Thread(target=self._save_all, name="checkpoints", daemon=True).start()

    def finish(self, step: int, take: Take) -> None:
        """Save the last state and wait until it is there, with patience.

        Raises:
            StorageError: it could not be saved in OUTLAST_S.
        """

        def attempt() -> None:
            if self._newest < step:
                self.save(step, take)
                self.wait()
            if self._newest < step:
                raise StorageError(self.place, f"the state of step {step} cannot be saved", "make room or reach it")

        outlast(attempt)

    def prune(self) -> None:
        """Delete what is not kept. If the store fails, the old checkpoints stay and do no harm."""
        with suppress(StorageError):
            prune(self.place, self.keep, self.awaited())

    def wait(self) -> None:
        """Until nothing is on its way."""
        with self._changed:
            self._changed.wait_for(lambda: not self._busy)

    def _write(self, step: int, state: Save) -> Path:
        """The files of a checkpoint in a local folder, checksums included."""
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
            except Exception as error:  # a full disk, a store that fails, any other: wait() must return
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
        self.warn(f"the checkpoint of step {step} could not be saved ({reason}); training goes on")

    def _clear(self) -> None:
        """What a killed process left half written."""
        for path in Path(self.place).glob(".step-*.part"):
            shutil.rmtree(path, ignore_errors=True)


def _to_disk(folder: Path) -> None:
    """Ask the system to write a folder's files, and its list of them, out of memory."""
    for path in [*(entry for entry in folder.iterdir() if entry.is_file()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
