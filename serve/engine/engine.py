"""Continuous batching: requests with different steps, guidance, samplers and arrival times share one running batch.

An *engine step* is one network evaluation for every running request, each at its own time t. It is not a sampler step:
a sampler step of heun takes two engine steps. New requests join at the next engine step; finished, canceled and late
requests leave. Language-model servers use the same method. The code is plain Python and torch.

    engine = Engine(load_bundle(folder))
    future = engine.submit(Request(sketch=sketch, references=(reference,), options=SamplerOptions(seed=7)))
    picture = future.result()           # uint8 [S, S, 3]; future.cancel() frees the slot within one engine step

Guarantees:
- A result depends on its own inputs and seed. Other requests in the batch change it only by rounding, by at most one
  8-bit level in float32.
- A request runs in consecutive engine steps. A canceled request leaves the batch at the next one.
- The batch has `max_batch` slots, one for each row of the network. A guided request takes two slots, because it is
  evaluated with and without its reference.
- Keys share the slots evenly, and no key starves: fair_queue.py states the bound.
- A request that would miss its deadline even if every step took only as long as the fastest recent step gets no slot,
  or frees its slots.
- If an evaluation fails, the engine retries it in halves, so that only the requests that cause the error fail.
- If the device fails permanently, every request fails with UnavailableError, and `is_alive` becomes false.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import torch
from numpy.typing import NDArray

from animediffusion.models.bundle import Bundle
from animediffusion.models.out_of_memory import is_out_of_memory
from animediffusion.platform.errors import BusyError, DeadlineError, UnavailableError
from animediffusion.serve.engine.admission import Claim, StepTimes, steps_until_done
from animediffusion.serve.engine.batch import NotFiniteError, Row, RunningBatch, new_row
from animediffusion.serve.engine.condition_cache import ConditionCache, Pair, pair_of
from animediffusion.serve.engine.fair_queue import FairQueue
from animediffusion.serve.engine.faults import for_log, for_request, is_device_lost
from animediffusion.serve.engine.network_runner import build_runner
from animediffusion.serve.engine.requests import Counts, EngineStep, Progress, Request

__all__ = ["Counts", "Engine", "EngineStep", "Progress", "Request"]

MAX_FAILED_STEPS = 3
"""The engine counts as broken after this many consecutive engine steps in which every request failed."""
WARM_UP_ROWS = (2, 1, 3)
"""torch.compile compiles one network for a single row, one for the first other batch size, and one for all sizes after
that."""
REQUEST_ERRORS = (NotFiniteError, UnavailableError)
"""Errors that do not count toward MAX_FAILED_STEPS: a picture is not finite, or memory ran out."""

log = logging.getLogger(__name__)


class Engine:
    """Colors pictures with one bundle, on its own thread.

    Args:
        bundle: the model, already on its device.
        max_batch: number of slots, that is, rows of the network in an engine step. A guided request takes two slots,
            but it runs alone in a batch of one slot.
        max_queue: number of requests that may wait, in addition to `max_batch`.
        cache_size: number of cached conditions of recent pairs of sketch and reference, and of cached references.
        own_thread: whether the engine runs on its own thread; if not, the caller runs each engine step with step().
        clock: returns the time for deadlines, in seconds.
        on_step: callback after each engine step; it runs on the engine's thread and must not block.
        sizes: batch sizes to which rows are padded, see NetworkRunner; if omitted, a few on CUDA, no padding on a CPU.
        warms_up: whether to evaluate batches of a few sizes first, so that a compiled network is compiled before the
            first request.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        max_batch: int = 8,
        max_queue: int = 32,
        cache_size: int = 64,
        own_thread: bool = True,
        clock: Callable[[], float] = time.monotonic,
        on_step: Callable[[EngineStep], None] | None = None,
        sizes: tuple[int, ...] | None = None,
        warms_up: bool = False,
    ) -> None:
        self.bundle = bundle
        self.max_batch = max_batch
        self.max_queue = max_queue
        self.counts = Counts()
        self._clock, self._on_step = clock, on_step
        self.conditions = ConditionCache(bundle.denoiser, cache_size)
        """The cached conditions, which are dropped when memory is short."""
        self._runner = build_runner(bundle.denoiser, max_batch, sizes)
        self._batch = RunningBatch(self._runner, self.conditions)
        self._waiting = FairQueue[Row](patience=2 * max_batch)
        self._running: list[Row] = []
        self._num_open = 0
        self._step_times = StepTimes()
        self._failed_steps = 0
        self._lost: str | None = None
        """The reason why the device can no longer be used; None if it can."""
        # The lock is reentrant, because the callback of a future may run while the thread holds the lock.
        self._changed = threading.Condition(threading.RLock())
        self._closing = False
        self._prepare(WARM_UP_ROWS if warms_up else ())
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True) if own_thread else None
        if self._thread is not None:
            self._thread.start()

    def submit(self, request: Request) -> Future[NDArray[np.uint8]]:
        """Queue a request and return the future of its picture: uint8 [S, S, 3].

        The future may raise DeadlineError, NotFiniteError (a ValueError), UnavailableError if the device has failed or
        has too little memory, or BusyError if the engine is closed without draining.

        Raises:
            ValueError: the settings or shapes are not usable.
            BusyError: the engine has max_batch + max_queue unfinished requests already, or so much work that this
                request would miss its deadline, or is closing.
            UnavailableError: the device has failed.
        """
        with self._changed:
            self._reject_if_unable()  # Check before the request is prepared, to save that work.
        row = self._new_row(request)
        with self._changed:
            self._reject_if_unable()
            self._reject_if_late(row)
            self._num_open += 1
            row.number, self.counts.submitted = self.counts.submitted, self.counts.submitted + 1
            row.future.add_done_callback(lambda _: self._count_end(row))
            if not self._end_if_late(row):
                self._waiting.add(row, request.key)
                self._changed.notify()
        return row.future

    def step(self) -> bool:
        """Run one engine step; return False if no request is running. For callers with `own_thread=False`."""
        try:
            return self._step()
        except Exception as error:  # After a device error or a bug, no request may wait forever.
            self._fail_requests(error)
            return True

    @property
    def num_steps(self) -> int:
        """Number of engine steps since the start."""
        return self.counts.steps

    @property
    def num_running(self) -> int:
        """Number of requests in the batch."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Number of requests that wait for a slot."""
        return len(self._waiting)

    @property
    def work_left(self) -> int:
        """Rows of the network to evaluate until all present requests are finished. Autoscaling counts this work."""
        with self._changed:
            return sum(row.work_left for row in [*self._waiting, *self._running])

    @property
    def is_alive(self) -> bool:
        """Whether the engine works; false if its thread has ended, the device has failed, or every request fails."""
        runs = self._thread is None or self._thread.is_alive()
        return runs and self._lost is None and self._failed_steps < MAX_FAILED_STEPS

    @property
    def lost(self) -> str | None:
        """The reason why this process can no longer use the device; None if it can."""
        return self._lost

    def close(self, *, drain: bool = True, timeout_s: float = 60) -> None:
        """Reject new requests, finish the present requests (or fail them if `drain` is False), and end the thread.

        Args:
            drain: whether to finish the present requests.
            timeout_s: how long to wait for the end of the thread.
        """
        with self._changed:
            self._closing = True
            if not drain:
                for row in [*self._waiting, *self._running]:
                    row.fail(BusyError("this engine was closed"))
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _prepare(self, warm_up_rows: tuple[int, ...]) -> None:
        with torch.inference_mode():
            for num_rows in warm_up_rows:
                conditions = self.conditions.get([self._blank(number) for number in range(num_rows)])
                size = self.bundle.config.image_size
                x, t = (torch.zeros(num_rows, *shape, device=self._runner.device) for shape in ((3, size, size), ()))
                self._runner(x, t + 0.5, self._runner.join(conditions))
                self.conditions.clear()
            self._runner.prepare(lambda: self.conditions.get([self._blank(0)])[0])

    def _blank(self, number: int) -> Pair:
        """Return a pair of uniform pictures, a different pair for each number."""
        size = self.bundle.config.image_size
        return pair_of(torch.full((1, size, size), 1 - number / 8), [torch.full((3, size, size), number / 8)])

    def _new_row(self, request: Request) -> Row:
        size = self.bundle.config.image_size
        shapes = {reference.shape for reference in request.references}
        if request.sketch.shape != (1, size, size) or shapes - {(3, size, size)}:
            found = f"{tuple(request.sketch.shape)} and {', '.join(str(tuple(shape)) for shape in shapes)}"
            raise ValueError(f"sketch and reference must be [1, {size}, {size}] and [3, {size}, {size}], got {found}")
        self.bundle.denoiser.network.check_count(len(request.references))
        return new_row(self.bundle.denoiser, request, self.bundle.config.sampler)

    def _reject_if_unable(self) -> None:
        if self._lost is not None:
            raise UnavailableError(self._lost)
        if self._closing:
            self._reject("this engine is closing")
        if self._num_open >= self.max_batch + self.max_queue:
            steps = self._steps_until_done(list(self._waiting), (1, 0))
            self._reject(f"{len(self._waiting)} requests are already waiting", steps * self._step_times.typical)

    def _reject_if_late(self, row: Row) -> None:
        """Reject a request that would be late because of the work before it.

        A request that would be late even without that work is accepted here; _end_if_late fails it with DeadlineError.
        """
        if row.request.deadline is not None:
            steps = self._steps_until_done(self._waiting.before(row.request.key), row.claim)
            wait_s, left_s = steps * self._step_times.typical, row.request.deadline - self._clock()
            if wait_s > left_s > row.num_left * self._step_times.fastest:
                self._reject(f"it would take {wait_s:.1f} s, but only {left_s:.1f} s are left", wait_s - left_s)

    def _reject(self, why: str, retry_after_s: float = 1.0) -> None:
        self.counts.rejected += 1
        raise BusyError(why, retry_after_s)

    def _steps_until_done(self, before: list[Row], own: Claim) -> int:
        running = [row.claim for row in self._running]
        return steps_until_done(self.max_batch, running, [row.claim for row in before], own)

    def _count_end(self, row: Row) -> None:
        """Count the end of a request. Its future calls this once, on the thread that completes or cancels it."""
        with self._changed:
            self._num_open -= 1
            self._waiting.remove(row)
            error = None if row.future.cancelled() else row.future.exception()
            self.counts.cancelled += row.future.cancelled()
            self.counts.late += isinstance(error, DeadlineError)
            self.counts.failed += error is not None and not isinstance(error, DeadlineError)
            self.counts.finished += not row.future.cancelled() and error is None

    def _work(self) -> None:
        while self._wait_for_work():
            self.step()

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not len(self._waiting) and not self._running and not self._closing and self._lost is None:
                self._changed.wait()
            return self._lost is None and bool(len(self._waiting) or self._running)

    def _step(self) -> bool:
        begun = self._clock()
        with torch.inference_mode():
            failed = self._change_batch()
            numbers = tuple(row.number for row in self._running if row.error is None)
            if not numbers and not failed:
                return False
            ended = self._batch.step() if numbers else []
            self._runner.wait()  # Asynchronous errors of the device surface here, also those of a failed join.
        done = [*failed, *ended]
        broken = [row for row in done if row.error is not None and not isinstance(row.error, REQUEST_ERRORS)]
        self._failed_steps = self._failed_steps + 1 if len(broken) == len(failed) + len(numbers) else 0
        self._complete(done)
        if numbers:
            self._report_progress()
            self._record_step(begun, numbers)
        return True

    def _end_if_late(self, row: Row) -> bool:
        """Fail a request that missed or cannot meet its deadline; return whether the request has ended."""
        if row.request.deadline is not None:
            if self._clock() > row.request.deadline:
                row.fail(DeadlineError("not finished by its deadline"))
            elif self._clock() + row.num_left * self._step_times.fastest > row.request.deadline:
                row.fail(DeadlineError("cannot be finished by its deadline"))
        return row.future.done()

    def _change_batch(self) -> list[Row]:
        """Remove ended requests from the batch and add the next ones; return the rows that failed to join."""
        with self._changed:
            gone = [row for row in self._running if self._end_if_late(row)]
            for row in list(self._waiting):
                if self._end_if_late(row):
                    self._waiting.remove(row)
            self._running = [row for row in self._running if row not in gone]
            joining = self._take_next()
            self._running = [*self._running, *joining]
        self._batch.leave(gone)
        self._batch.join(joining)
        return [row for row in joining if row.error is not None]

    def _take_next(self) -> list[Row]:
        """Take requests for the free slots from the queue.

        If the next request needs more slots than are free, no further request is taken, because smaller requests could
        pass it forever.
        """
        taken: list[Row] = []
        slots = Counter[str]()
        for row in self._running:
            slots[row.request.key] += row.slots
        while found := self._waiting.peek(slots):
            (row, key), used = found, slots.total()
            if used and used + row.slots > self.max_batch:
                break
            taken.append(self._waiting.take(slots))
            slots[key] += row.slots
        return taken

    def _fail_requests(self, error: Exception) -> None:
        """Fail the running requests; if the device has failed, also the waiting and all future requests."""
        log.error("an engine step failed, and its requests with it: %s", for_log(error))
        with self._changed:
            if is_device_lost(error):
                self._lost = str(for_request(error))
            self._failed_steps += not is_out_of_memory(error)
            rows = [*self._running, *(self._waiting if self._lost else ())]
            self._running = []
        self._batch.clear()
        self.conditions.clear()
        for row in rows:
            if row.picture is not None:
                row.finish(row.picture)
            else:
                row.fail(for_request(error))

    def _complete(self, ended: list[Row]) -> None:
        """Complete the futures of the ended rows with their pictures or errors."""
        with self._changed:
            self._running = [row for row in self._running if row not in ended]
        for row in ended:
            if row.picture is not None:
                row.finish(row.picture)
            elif row.error is not None:
                row.fail(row.error)

    def _report_progress(self) -> None:
        for row in self._running:
            if row.preview is not None and row.request.on_progress is not None:
                try:
                    row.request.on_progress(row.steps_done, row.settings.steps, row.preview)
                except Exception as error:  # A failing callback must not affect other requests.
                    row.fail(error)

    def _record_step(self, begun: float, numbers: tuple[int, ...]) -> None:
        seconds = self._clock() - begun
        self._step_times.add(seconds)
        with self._changed:
            counts = self.counts
            counts.steps += 1
            counts.step_seconds += seconds
            counts.rows_evaluated += self._batch.num_evaluated
            counts.reference_hits, counts.reference_misses = self.conditions.hits, self.conditions.misses
            waiting = tuple(row.number for row in self._waiting)
        if self._on_step is not None:
            self._on_step(EngineStep(counts.steps, seconds, numbers, waiting, self._batch.num_evaluated))
