"""A replica: the versions that are loaded in this process, an engine for each, and their shares of the traffic.

A version is loaded and tested in the caller's thread while the other versions answer requests, and it can get traffic
only after this test. A version without traffic finishes its requests and is then removed. A version that fails the test
changes nothing. This module does not use Ray. serve/replica/model_source.py decides which versions a replica should
load.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import Future
from pathlib import Path

import torch

from animediffusion.models.network.attention import attention_used
from animediffusion.platform.errors import BusyError, DeadlineError, NoModelError
from animediffusion.serve.engine.engine import Progress
from animediffusion.serve.engine.faults import is_device_lost, summary
from animediffusion.serve.protocol import Answer, ColorizeJob, ModelsStatus, Preview, ReplicaStatus
from animediffusion.serve.rendering.sketch import Pixels
from animediffusion.serve.replica.device import Precision, precision_on
from animediffusion.serve.replica.loaded_model import LoadedModel
from animediffusion.serve.replica.stats import REQUESTS, SWAPS, ReplicaCounters, ReplicaStats
from animediffusion.serve.replica.traffic_split import choose_version, hash_position


class Replica:
    """Answers jobs with its loaded versions; it is a protocol.Backend for one process.

    Args:
        max_batch: slots of a running batch, per version; a guided request takes two.
        max_queue: requests that may wait in addition to `max_batch`, per version.
        device: device of the models; by default CUDA if it is available, else the CPU.
        name: name of this replica in /v1/models.
        precision: precision of the network; see device.precision_on.
        compile: whether to compile networks; see LoadedModel.
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
        self.counters = ReplicaCounters()
        self.precision = precision_on(torch.device(self.device), precision)
        self.compile = compile
        self.error: str | None = None
        """The reason why a desired version does not answer; None if all do."""
        self._lost: str | None = None
        """The reason why the device can no longer be used, if it failed while a version was loaded."""
        # Both dictionaries are replaced and never changed in place, so that requests read them without the lock.
        self.loaded: dict[str, LoadedModel] = {}
        """The loaded versions, which can get traffic, by their names."""
        self._shares: dict[str, float] = {}
        self._retiring: list[LoadedModel] = []
        self._lock = threading.Lock()

    @property
    def version(self) -> str | None:
        """The version that gets most of the traffic."""
        return max(self._shares, key=lambda version: self._shares[version], default=None)

    @property
    def versions(self) -> list[str]:
        """The loaded versions, which can get traffic."""
        return list(self.loaded)

    @property
    def shares(self) -> dict[str, float]:
        """Version -> share of new requests; empty if no version is loaded."""
        return dict(self._shares)

    def add(self, version: str, folder: Path, sha256: str | None = None) -> None:
        """Load and test a version, which gets no traffic yet. If the version fails, the other versions do not change.

        Args:
            version: name of the version, as in X-Model-Version.
            folder: folder of the bundle.
            sha256: expected hash of the bundle, if known.

        Raises:
            BundleError: the bundle is damaged or is not the registered one, or a test picture is not finite.
        """
        try:
            model = LoadedModel(
                version,
                folder,
                device=self.device,
                dtype=getattr(torch, self.precision),
                compile=self.compile,
                max_batch=self.max_batch,
                max_queue=self.max_queue,
                sha256=sha256,
                on_step=lambda step: self.counters.add_step(version, step.seconds),
            )
        except BaseException as error:
            self.counters.count(SWAPS, version, "failed")
            if is_device_lost(error):
                self._lost = summary(error)
            raise
        with self._lock:
            before = self.loaded.get(version)
            self.loaded = {**self.loaded, version: model}
        self.counters.count(SWAPS, version, "ok")
        if before is not None:
            self._retire(before)

    def route(self, shares: Mapping[str, float]) -> None:
        """Set the share of new requests of each version; versions that are not in `shares` finish and are removed.

        Raises:
            ValueError: a version in `shares` is not loaded.
        """
        with self._lock:
            unknown = set(shares) - set(self.loaded)
            if unknown:
                raise ValueError(f"version {', '.join(sorted(unknown))} is not loaded here")
            leaving = [model for version, model in self.loaded.items() if version not in shares]
            self._shares = dict(shares)
            self.loaded = {version: model for version, model in self.loaded.items() if version in shares}
        for model in leaving:
            self._retire(model)

    def load(self, version: str, folder: Path) -> bool:
        """Load a version and give it all of the traffic; if it does not work, set `error` and return False."""
        try:
            self.add(version, folder)
        except Exception as error:  # The old version must continue to answer, whatever the error is.
            self.error = f"version {version}: {error}"
            return False
        self.route({version: 1.0})
        self.error = None
        return True

    async def colorize(self, job: ColorizeJob) -> Answer:
        """Return the network's picture for a job; see protocol.Backend."""
        doubts: list[Pixels] = []
        model, future = await asyncio.to_thread(self._submit, job, None, doubts)
        return _answer(job, model, await asyncio.wrap_future(future), doubts)

    async def stream(self, job: ColorizeJob) -> AsyncIterator[Preview | Answer]:
        """Yield previews while the picture is made, then the answer."""
        loop, previews = asyncio.get_running_loop(), asyncio.Queue[Preview | None]()

        def on_progress(step: int, total: int, picture: Pixels) -> None:
            loop.call_soon_threadsafe(previews.put_nowait, Preview(step=step, total=total, picture=picture))

        doubts: list[Pixels] = []
        model, future = await asyncio.to_thread(self._submit, job, on_progress, doubts)
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(previews.put_nowait, None))
        try:
            while (preview := await previews.get()) is not None:
                yield preview
            yield _answer(job, model, await asyncio.wrap_future(future), doubts)
        finally:
            future.cancel()  # If the client has disconnected, this frees the slot.

    async def models(self) -> ModelsStatus:
        """Return the body of /v1/models for this replica alone."""
        desired = {"champion": self.version, "challenger": None}
        return ModelsStatus(desired=desired, traffic=self.shares, replicas=[self.describe()])

    @property
    def lost(self) -> str | None:
        """The reason why this process can no longer use the device; None if it can."""
        return next((model.engine.lost for model in self.loaded.values() if model.engine.lost), self._lost)

    @property
    def can_answer(self) -> bool:
        """Whether a version has traffic and the device works."""
        return bool(self._shares) and self.lost is None

    async def is_ready(self) -> bool:
        """See can_answer."""
        return self.can_answer

    def describe(self) -> ReplicaStatus:
        """Return this replica's entry in /v1/models."""
        models, error = self._all(), self.lost or self.error
        return ReplicaStatus(
            id=self.name,
            versions=list(dict.fromkeys(model.version for model in models)),
            state="ready" if self.can_answer else ("failed" if error else "loading"),
            device=self.device,
            attention=attention_used(),
            running=sum(model.engine.num_running for model in models),
            queued=sum(model.engine.num_waiting for model in models),
            error=error,
        )

    def stats(self) -> list[ReplicaStats]:
        """Update `counters` and return the current load of each version."""
        found = []
        for model in self._all():
            engine = model.engine
            self.counters.collect(model.version, engine)
            share = self._shares.get(model.version, 0.0) if model.version in self.loaded else 0.0
            found.append(
                ReplicaStats(
                    version=model.version,
                    share=share,
                    running=engine.num_running,
                    queued=engine.num_waiting,
                    max_batch=engine.max_batch,
                )
            )
        return found

    def pending_pictures(self) -> float:
        """Return the pending work; see LoadedModel.pending_pictures."""
        return sum(model.pending_pictures for model in self._all())

    def check(self) -> None:
        """Raise RuntimeError if the device has failed, or if an engine has ended or hangs in an engine step."""
        if self.lost is not None:
            raise RuntimeError(self.lost)
        for model in self.loaded.values():
            model.check()

    def close(self) -> None:
        """Close all engines; their unfinished requests fail."""
        for model in self._all():
            model.engine.close(drain=False)

    def _all(self) -> list[LoadedModel]:
        return [*self.loaded.values(), *self._retiring]

    def _submit(
        self, job: ColorizeJob, on_progress: Progress | None, doubts: list[Pixels]
    ) -> tuple[LoadedModel, Future[Pixels]]:
        loaded, shares = self.loaded, self._shares
        if not shares:
            raise NoModelError(self.error or "the model is being loaded")
        version = choose_version(shares, hash_position(job))
        if version not in loaded:  # The shares changed between the two reads above.
            return self._submit(job, on_progress, doubts)
        chosen = loaded[version]
        try:
            future = chosen.submit(job, on_progress, doubts)
        except BusyError:
            if self.loaded.get(version) is not chosen:  # The version was retired in the meantime.
                return self._submit(job, on_progress, doubts)
            self.counters.count(REQUESTS, version, "busy")
            raise
        future.add_done_callback(lambda done: self._count(version, done))
        return chosen, future

    def _count(self, version: str, done: Future[Pixels]) -> None:
        self.counters.count(REQUESTS, version, "cancelled" if done.cancelled() else _outcome(done.exception()))

    def _retire(self, model: LoadedModel) -> None:
        """Remove a version after its requests are finished."""

        def drain() -> None:
            model.engine.close()
            self.counters.collect(model.version, model.engine)
            with self._lock:
                self._retiring.remove(model)

        with self._lock:
            self._retiring.append(model)
        threading.Thread(target=drain, name="drain", daemon=True).start()


def _answer(job: ColorizeJob, model: LoadedModel, picture: Pixels, doubts: list[Pixels]) -> Answer:
    return Answer(
        picture=picture,
        model_version=model.version,
        doubt=doubts[0] if doubts else None,
        saw_hints=bool(job.hints) and model.sees_hints,
    )


def _outcome(error: BaseException | None) -> str:
    if error is None:
        return "ok"
    return "late" if isinstance(error, DeadlineError) else "failed"
