"""One replica: the versions that are loaded in this process, an engine for each, and which of them gets what share.

A version is loaded and tried in the caller's thread while the others go on working; only then may traffic move to it.
One that gets no traffic any more finishes what it has and leaves. One that fails changes nothing. No Ray in it.
Not here: which versions should be there, see serve/replica/versions.py.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from animediffusion.models.network.attention import attention_used
from animediffusion.serve.engine.engine import DeadlineError, EngineError, Progress, QueueFullError
from animediffusion.serve.engine.faults import is_lost, summary
from animediffusion.serve.protocol import (
    Answer,
    BusyError,
    ColorizeJob,
    LateError,
    NoModelError,
    Preview,
    UnavailableError,
    UnusableError,
)
from animediffusion.serve.rendering.sketch import Pixels
from animediffusion.serve.replica.device import Precision, precision_on
from animediffusion.serve.replica.loaded_model import Hosted
from animediffusion.serve.replica.stats import REQUESTS, SWAPS, Measures, ReplicaStats
from animediffusion.serve.replica.traffic_split import draw, point
from animediffusion.serve.retry_after import retry_after_s


class Replica:
    """Answers jobs with the versions it hosts; usable as an api.Backend in one process.

    Args:
        max_batch: places in a running batch, per version; a guided request takes two.
        max_queue: requests that may wait beside those, per version.
        device: where the models live; CUDA where there is some by default.
        name: how /v1/models calls this replica.
        precision: of the network; see device.precision_on.
        compile: whether networks are compiled; see Hosted.
    """

    def __init__(
        self,
        *,
        max_batch: int = 8,
        max_queue: int = 32,
        device: str | None = None,
        name: str = "local",
        precision: Precision = "auto",
        compile: bool = False,
    ) -> None:
        self.max_batch = max_batch
        self.max_queue = max_queue
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.name = name
        self.measures = Measures()
        self.precision = precision_on(torch.device(self.device), precision)
        self.compile = compile
        self.error: str | None = None
        """Why what is wanted is not what answers."""
        self._lost: str | None = None
        """Why the device cannot be used any more, if a version that was loaded met it."""
        # Both are replaced and never changed, so that a request reads them without a lock.
        self._hosted: dict[str, Hosted] = {}
        self._shares: dict[str, float] = {}
        self._retiring: list[Hosted] = []
        self._lock = threading.Lock()

    @property
    def version(self) -> str | None:
        """The version that gets most of the traffic."""
        return max(self._shares, key=lambda version: self._shares[version], default=None)

    @property
    def versions(self) -> list[str]:
        """The versions that can get traffic."""
        return list(self._hosted)

    @property
    def shares(self) -> dict[str, float]:
        """Version -> share of new requests; empty where nothing is loaded."""
        return dict(self._shares)

    def host(self, version: str, folder: Path, sha256: str | None = None) -> None:
        """Load and try a version. It gets no traffic yet; whatever is wrong with it, nothing else changes.

        Args:
            version: as X-Model-Version names it.
            folder: of the bundle.
            sha256: the identity it must have, if known.

        Raises:
            ValueError: damaged, not the one registered, or its sample is not finite.
        """
        try:
            hosted = Hosted(
                version,
                folder,
                device=self.device,
                dtype=getattr(torch, self.precision),
                compile=self.compile,
                max_batch=self.max_batch,
                max_queue=self.max_queue,
                sha256=sha256,
                on_turn=lambda turn: self.measures.turn(version, turn.seconds),
            )
        except BaseException as error:
            self.measures.count(SWAPS, version, "failed")
            if is_lost(error):
                self._lost = summary(error)
            raise
        with self._lock:
            before = self._hosted.get(version)
            self._hosted = {**self._hosted, version: hosted}
        self.measures.count(SWAPS, version, "ok")
        if before is not None:
            self._retire(before)

    def route(self, shares: Mapping[str, float]) -> None:
        """Give each hosted version its share of new requests; hosted versions that are not named retire.

        Raises:
            ValueError: a version that is not hosted.
        """
        with self._lock:
            unknown = set(shares) - set(self._hosted)
            if unknown:
                raise ValueError(f"version {', '.join(sorted(unknown))} is not loaded here")
            leaving = [hosted for version, hosted in self._hosted.items() if version not in shares]
            self._shares = dict(shares)
            self._hosted = {version: hosted for version, hosted in self._hosted.items() if version in shares}
        for hosted in leaving:
            self._retire(hosted)

    def load(self, version: str, folder: Path) -> bool:
        """Host a version and give it all of the traffic. False, with `error` set, if it does not work."""
        try:
            self.host(version, folder)
        except Exception as error:  # whatever is wrong with it, the old version stays
            self.error = f"version {version}: {error}"
            return False
        self.route({version: 1.0})
        self.error = None
        return True

    async def colorize(self, job: ColorizeJob) -> Answer:
        """The network's picture for a job; see messages.Backend."""
        version, future = await asyncio.to_thread(self._submit, job, None)
        return Answer(picture=await self._result(future), model_version=version)

    async def stream(self, job: ColorizeJob) -> AsyncIterator[Preview | Answer]:
        """Previews while the picture is made, then the answer."""
        loop, previews = asyncio.get_running_loop(), asyncio.Queue[Preview | None]()

        def on_progress(step: int, total: int, picture: Pixels) -> None:
            loop.call_soon_threadsafe(previews.put_nowait, Preview(step=step, total=total, picture=picture))

        version, future = await asyncio.to_thread(self._submit, job, on_progress)
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(previews.put_nowait, None))
        try:
            while (preview := await previews.get()) is not None:
                yield preview
            yield Answer(picture=await self._result(future), model_version=version)
        finally:
            future.cancel()  # a listener that left frees its place

    async def models(self) -> dict[str, Any]:
        """The body of /v1/models, for this replica alone."""
        desired = {"champion": self.version, "challenger": None}
        return {"desired": desired, "traffic": self.shares, "replicas": [self.describe()]}

    @property
    def lost(self) -> str | None:
        """Why the device cannot be used any more in this process; None where it can."""
        return next((hosted.engine.lost for hosted in self._hosted.values() if hosted.engine.lost), self._lost)

    @property
    def can_answer(self) -> bool:
        """True if a version is loaded, on a device that works."""
        return bool(self._shares) and self.lost is None

    async def is_ready(self) -> bool:
        """See can_answer."""
        return self.can_answer

    def describe(self) -> dict[str, Any]:
        """This replica's entry in /v1/models."""
        all_hosted, error = self._all(), self.lost or self.error
        return {
            "id": self.name,
            "versions": list(dict.fromkeys(hosted.version for hosted in all_hosted)),
            "state": "ready" if self.can_answer else ("failed" if error else "loading"),
            "device": self.device,
            "attention": attention_used(),
            "running": sum(hosted.engine.num_running for hosted in all_hosted),
            "queued": sum(hosted.engine.num_waiting for hosted in all_hosted),
            "error": error,
        }

    def gauges(self) -> list[ReplicaStats]:
        """How busy each version is now; brings `measures` up to date, too."""
        found = []
        for hosted in self._all():
            engine = hosted.engine
            self.measures.collect(hosted.version, engine)
            share = self._shares.get(hosted.version, 0.0) if hosted.version in self._hosted else 0.0
            found.append(
                ReplicaStats(
                    version=hosted.version,
                    share=share,
                    running=engine.num_running,
                    queued=engine.num_waiting,
                    max_batch=engine.max_batch,
                )
            )
        return found

    def pending_pictures(self) -> float:
        """The work that is here; see Hosted."""
        return sum(hosted.pending_pictures for hosted in self._all())

    def check(self) -> None:
        """Raise RuntimeError if the device has failed, or if an engine has ended or hangs in a turn."""
        if self.lost is not None:
            raise RuntimeError(self.lost)
        for hosted in self._hosted.values():
            hosted.check()

    def close(self) -> None:
        """Give up what is running."""
        for hosted in self._all():
            hosted.engine.close(drain=False)

    def _all(self) -> list[Hosted]:
        return [*self._hosted.values(), *self._retiring]

    def _submit(self, job: ColorizeJob, on_progress: Progress | None) -> tuple[str, Future[Pixels]]:
        hosted, shares = self._hosted, self._shares
        if not shares:
            raise NoModelError(self.error or "the model is being loaded")
        version = draw(shares, point(job))
        if version not in hosted:  # the shares moved between the two reads above
            return self._submit(job, on_progress)
        chosen = hosted[version]
        try:
            future = chosen.submit(job, on_progress)
        except QueueFullError as error:
            if self._hosted.get(version) is not chosen:  # retired a moment ago
                return self._submit(job, on_progress)
            self.measures.count(REQUESTS, version, "busy")
            raise BusyError(str(error), retry_after_s(error.retry_after_s)) from error
        except EngineError as error:
            raise UnavailableError(str(error)) from error
        except ValueError as error:
            raise UnusableError("parameters", str(error), "see /docs") from error
        future.add_done_callback(lambda done: self._count(version, done))
        return version, future

    def _count(self, version: str, done: Future[Pixels]) -> None:
        self.measures.count(REQUESTS, version, "cancelled" if done.cancelled() else _outcome(done.exception()))

    async def _result(self, future: Future[Pixels]) -> Pixels:
        try:
            return await asyncio.wrap_future(future)
        except DeadlineError as error:
            raise LateError(str(error)) from error
        except QueueFullError as error:
            raise BusyError(str(error)) from error
        except EngineError as error:
            raise UnavailableError(str(error)) from error

    def _retire(self, hosted: Hosted) -> None:
        """Let a version finish what it has, then leave."""

        def drain() -> None:
            hosted.engine.close()
            self.measures.collect(hosted.version, hosted.engine)
            with self._lock:
                self._retiring.remove(hosted)

        with self._lock:
            self._retiring.append(hosted)
        threading.Thread(target=drain, name="drain", daemon=True).start()


def _outcome(error: BaseException | None) -> str:
    if error is None:
        return "ok"
    return "late" if isinstance(error, DeadlineError) else "failed"
