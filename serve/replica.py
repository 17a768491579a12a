"""One replica: the versions that are loaded in this process, an engine for each, and which of them gets what share.

A version is loaded and tried in the caller's thread while the others go on working; only then may traffic move to it.
One that gets no traffic any more finishes what it has and leaves. One that fails changes nothing. No Ray in it.
Not here: which versions should be there, see serve/versions.py.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from animediffusion.models.attention import attention_used
from animediffusion.models.bundle import Bundle, load_bundle, smoke_sample
from animediffusion.models.images import to_tensor
from animediffusion.models.sampler import build_sampler
from animediffusion.platform.images import letterbox
from animediffusion.serve.engine import DeadlineError, Engine, Progress, QueueFullError, Request
from animediffusion.serve.lines import Pixels, for_network
from animediffusion.serve.measures import REQUESTS, SWAPS, Gauges, Measures
from animediffusion.serve.messages import Answer, BusyError, Job, LateError, NoModelError, Preview, UnusableError
from animediffusion.serve.pace import retry_after_s
from animediffusion.serve.routing import draw, point

STUCK_S = 300.0
"""An engine whose turn takes longer than this hangs; the first turn on a GPU may take a minute."""


@dataclass(eq=False)
class _Hosted:
    """A version that is loaded."""

    version: str
    engine: Engine
    progress: tuple[int, float] = field(default_factory=lambda: (0, time.monotonic()))
    """Turns at the last look, and when they last grew or none was to be done."""


class Replica:
    """Answers jobs with the versions it hosts; usable as an api.Backend in one process.

    Args:
        max_batch: requests that run at the same time, per version.
        max_queue: requests that may wait beside those, per version.
        device: where the models live; CUDA where there is some by default.
        name: how /v1/models calls this replica.
    """

    def __init__(
        self, *, max_batch: int = 8, max_queue: int = 32, device: str | None = None, name: str = "local"
    ) -> None:
        self.max_batch = max_batch
        self.max_queue = max_queue
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.name = name
        self.measures = Measures()
        self.error: str | None = None
        """Why what is wanted is not what answers."""
        # Both are replaced and never changed, so that a request reads them without a lock.
        self._hosted: dict[str, _Hosted] = {}
        self._shares: dict[str, float] = {}
        self._retiring: list[_Hosted] = []
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
            bundle = load_bundle(folder, device=self.device)
            if sha256 and bundle.sha256 != sha256:
                raise ValueError(f"sha256 is {bundle.sha256[:12]}, not the registered {sha256[:12]}")
            smoke_sample(bundle)
        except BaseException:
            self.measures.count(SWAPS, version, "failed")
            raise
        engine = Engine(
            bundle,
            max_batch=self.max_batch,
            max_queue=self.max_queue,
            on_turn=lambda turn: self.measures.turn(version, turn.seconds),
        )
        with self._lock:
            self._hosted = {**self._hosted, version: _Hosted(version, engine)}
        self.measures.count(SWAPS, version, "ok")

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
            self._retiring += leaving
        for hosted in leaving:
            threading.Thread(target=self._drain, args=(hosted,), name="drain", daemon=True).start()

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

    async def colorize(self, job: Job) -> Answer:
        """The network's picture for a job; see messages.Backend."""
        version, future = await asyncio.to_thread(self._submit, job, None)
        return Answer(picture=await self._result(future), model_version=version)

    async def stream(self, job: Job) -> AsyncIterator[Preview | Answer]:
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

    async def is_ready(self) -> bool:
        """True if a version is loaded."""
        return bool(self._shares)

    def describe(self) -> dict[str, Any]:
        """This replica's entry in /v1/models."""
        all_hosted = self._all()
        return {
            "id": self.name,
            "versions": list(dict.fromkeys(hosted.version for hosted in all_hosted)),
            "state": "ready" if self._shares else ("failed" if self.error else "loading"),
            "device": self.device,
            "attention": attention_used(),
            "running": sum(hosted.engine.num_running for hosted in all_hosted),
            "queued": sum(hosted.engine.num_waiting for hosted in all_hosted),
            "error": self.error,
        }

    def gauges(self) -> list[Gauges]:
        """How busy each version is now; brings `measures` up to date, too."""
        found = []
        for hosted in self._all():
            engine = hosted.engine
            self.measures.collect(hosted.version, engine)
            share = self._shares.get(hosted.version, 0.0) if hosted.version in self._hosted else 0.0
            found.append(
                Gauges(
                    version=hosted.version,
                    share=share,
                    running=engine.num_running,
                    queued=engine.num_waiting,
                    max_batch=engine.max_batch,
                )
            )
        return found

    def pending_pictures(self) -> float:
        """The work that is here, in pictures at their model's default settings: one half done counts 0.5."""
        work = 0.0
        for hosted in self._all():
            work += hosted.engine.work_left / _default_work(hosted.engine.bundle)
        return work

    def check(self) -> None:
        """Raise RuntimeError if an engine's thread has ended, or hangs in a turn."""
        for version, hosted in self._hosted.items():
            engine = hosted.engine
            if not engine.is_alive:
                raise RuntimeError(f"the engine's thread of version {version} has ended")
            turns, since = hosted.progress
            if engine.num_turns != turns or not engine.num_running:
                hosted.progress = (engine.num_turns, time.monotonic())
            elif time.monotonic() - since > STUCK_S:
                raise RuntimeError(f"the engine of version {version} has been in one turn for {STUCK_S:.0f} s")

    def close(self) -> None:
        """Give up what is running."""
        for hosted in self._all():
            hosted.engine.close(drain=False)

    def _all(self) -> list[_Hosted]:
        return [*self._hosted.values(), *self._retiring]

    def _submit(self, job: Job, on_progress: Progress | None) -> tuple[str, Future[Pixels]]:
        hosted, shares = self._hosted, self._shares
        if not shares:
            raise NoModelError(self.error or "the model is being loaded")
        version = draw(shares, point(job))
        if version not in hosted:  # the shares moved between the two reads above
            return self._submit(job, on_progress)
        engine = hosted[version].engine
        try:
            future = engine.submit(_request(job, engine, on_progress))
        except QueueFullError as error:
            if version not in self._hosted or self._hosted[version].engine is not engine:  # retired a moment ago
                return self._submit(job, on_progress)
            self.measures.count(REQUESTS, version, "busy")
            raise BusyError(str(error), retry_after_s(error.retry_after_s)) from error
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

    def _drain(self, hosted: _Hosted) -> None:
        """Let a version finish what it has, then leave."""
        hosted.engine.close()
        self.measures.collect(hosted.version, hosted.engine, last=True)
        with self._lock:
            self._retiring.remove(hosted)


def _default_work(bundle: Bundle) -> int:
    """Rows of the network for a picture at the model's default settings."""
    defaults = bundle.config.sampler
    evaluations = build_sampler(defaults.name, bundle.denoiser.path).num_evaluations(defaults.steps)
    return evaluations * (1 if defaults.guidance_scale == 1 else 2)


def _outcome(error: BaseException | None) -> str:
    if error is None:
        return "ok"
    return "late" if isinstance(error, DeadlineError) else "failed"


def _request(job: Job, engine: Engine, on_progress: Progress | None) -> Request:
    size = engine.bundle.config.image_size
    sketch = for_network(job.lines, size)
    reference = letterbox(job.reference, size)[0]
    return Request(
        sketch=to_tensor(torch.from_numpy(np.ascontiguousarray(sketch))[None])[0],
        reference=to_tensor(torch.from_numpy(np.ascontiguousarray(reference))[None])[0],
        seed=job.seed,
        steps=job.steps,
        guidance_scale=job.guidance_scale,
        sampler=job.sampler,
        deadline=time.monotonic() + job.timeout_s,
        key=job.key,
        on_progress=on_progress,
    )
