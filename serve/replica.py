"""One replica: the versions that are loaded in this process, an engine for each, and which one gets the traffic.

A version is loaded and tried in the caller's thread while the old one goes on working; only then does traffic move, and
the old engine finishes what it has. A version that fails changes nothing but `error`. No Ray in it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from animediffusion.models.attention import attention_used
from animediffusion.models.bundle import load_bundle, smoke_sample
from animediffusion.models.images import to_tensor
from animediffusion.platform.images import letterbox
from animediffusion.serve.engine import DeadlineError, Engine, Progress, QueueFullError, Request
from animediffusion.serve.lines import Pixels, for_network
from animediffusion.serve.messages import Answer, BusyError, Job, LateError, NoModelError, Preview, UnusableError

Precision = Literal["float32", "bfloat16"]


class Replica:
    """Answers jobs with the version that is current; usable as an api.Backend in one process.

    Args:
        max_batch: places in a running batch; a guided request takes two.
        max_queue: requests that may wait beside those.
        device: where the models live; CUDA where there is some by default.
        name: how /v1/models calls this replica.
        precision: float32, or bfloat16: about twice as fast where the hardware has it, and pictures differ by some
            8-bit levels.
    """

    def __init__(
        self,
        *,
        max_batch: int = 8,
        max_queue: int = 32,
        device: str | None = None,
        name: str = "local",
        precision: Precision = "float32",
    ) -> None:
        self.max_batch = max_batch
        self.max_queue = max_queue
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.name = name
        self.dtype = getattr(torch, precision)
        self.error: str | None = None
        """Why the version asked for last is not the one that answers."""
        self._current: tuple[str, Engine] | None = None
        self._retiring: dict[str, Engine] = {}
        self._lock = threading.Lock()

    @property
    def version(self) -> str | None:
        """The version that gets the traffic."""
        return self._current[0] if self._current is not None else None

    def load(self, version: str, folder: Path) -> bool:
        """Load and try a version, then give it the traffic. False, with `error` set, if it does not work."""
        with self._lock:
            try:
                bundle = load_bundle(folder, self.device, self.dtype)
                smoke_sample(bundle)
            except Exception as error:  # whatever is wrong with it, the old version stays
                self.error = f"version {version}: {error}"
                return False
            before = self._current
            self._current = (version, Engine(bundle, max_batch=self.max_batch, max_queue=self.max_queue))
            self.error = None
        if before is not None:
            self._retire(*before)
        return True

    async def colorize(self, job: Job) -> Answer:
        """The network's picture for a job; see messages.Backend."""
        version, future = await asyncio.to_thread(self._submit, job, None)
        return Answer(picture=await _result(future), model_version=version)

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
            yield Answer(picture=await _result(future), model_version=version)
        finally:
            future.cancel()  # a listener that left frees its place

    async def models(self) -> dict[str, Any]:
        """The body of /v1/models, for this replica alone."""
        traffic = {self.version: 1.0} if self.version else {}
        desired = {"champion": self.version, "challenger": None}
        return {"desired": desired, "traffic": traffic, "replicas": [self.describe()]}

    async def is_ready(self) -> bool:
        """True if a version is loaded."""
        return self._current is not None

    def describe(self) -> dict[str, Any]:
        """This replica's entry in /v1/models."""
        engines = [self._current[1]] if self._current else []
        engines += self._retiring.values()
        return {
            "id": self.name,
            "versions": [*([self.version] if self.version else []), *self._retiring],
            "state": "ready" if self._current else ("failed" if self.error else "loading"),
            "device": self.device,
            "attention": attention_used(),
            "running": sum(engine.num_running for engine in engines),
            "queued": sum(engine.num_waiting for engine in engines),
            "error": self.error,
        }

    def check(self) -> None:
        """Raise RuntimeError if the engine's thread has ended."""
        if self._current is not None and not self._current[1].is_alive:
            raise RuntimeError("the engine's thread has ended")

    def close(self) -> None:
        """Give up what is running."""
        for engine in [*([self._current[1]] if self._current else []), *self._retiring.values()]:
            engine.close(drain=False)

    def _submit(self, job: Job, on_progress: Progress | None) -> tuple[str, Future[Pixels]]:
        if self._current is None:
            raise NoModelError(self.error or "the model is being loaded")
        version, engine = self._current
        try:
            return version, engine.submit(_request(job, engine, on_progress))
        except QueueFullError as error:
            if self._current[1] is not engine:  # it was retired between the two lines above
                return self._submit(job, on_progress)
            raise BusyError(str(error)) from error
        except ValueError as error:
            raise UnusableError("parameters", str(error), "see /docs") from error

    def _retire(self, version: str, engine: Engine) -> None:
        def drain() -> None:
            engine.close()
            self._retiring.pop(version, None)

        self._retiring[version] = engine
        threading.Thread(target=drain, name="drain", daemon=True).start()


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


async def _result(future: Future[Pixels]) -> Pixels:
    try:
        return await asyncio.wrap_future(future)
    except DeadlineError as error:
        raise LateError(str(error)) from error
    except QueueFullError as error:
        raise BusyError(str(error)) from error
