"""Continuous batching: requests with different steps, guidance, samplers and arrival times share one running batch.

A *turn* is one network evaluation for every running request, each at its own time t. New requests join at the next
turn; finished, canceled and late requests leave. Language-model servers use the same method. The code is plain Python
and torch.

    engine = Engine(load_bundle(folder))
    future = engine.submit(Request(sketch=sketch, reference=reference, options=SamplerOptions(seed=7)))
    picture = future.result()           # uint8 [S, S, 3]; future.cancel() frees the slot within one turn

Guarantees:
- A result depends on its own inputs and seed. Other requests in the batch change it only by rounding, by at most one
  8-bit level in float32.
- A request runs in consecutive turns from its first to its last. A canceled request leaves the batch at the next turn.
- The batch has `max_batch` slots, one for each row of the network. A guided request takes two slots, because it is
  evaluated with and without its reference.
- Keys share the slots evenly, and no key starves: fair_queue.py states the bound.
- A request that cannot meet its deadline at the fastest recent duration of a turn gets no slot, or frees its slots.
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
from animediffusion.serve.engine.admission import Claim, TurnTimes, turns_until_done
from animediffusion.serve.engine.batch import NotFiniteError, Row, RunningBatch, new_row
from animediffusion.serve.engine.condition_cache import ConditionCache, Pair, pair_of
from animediffusion.serve.engine.fair_queue import FairQueue
from animediffusion.serve.engine.faults import for_log, for_request, is_lost
from animediffusion.serve.engine.network_runner import build_evaluator
from animediffusion.serve.engine.requests import (
    Counts,
    Progress,
    Request,
    Ticket,
    Turn,
)

__all__ = ["Counts", "Engine", "Progress", "Request", "Turn"]

MAX_FAILED_TURNS = 3
"""The engine counts as broken after this many consecutive turns in which every request failed."""
WARM_UP_ROWS = (2, 1, 3)
"""torch.compile compiles one network for a single row, one for the first other batch size, and one for all sizes after
that."""
EXCUSED = (NotFiniteError, UnavailableError)
"""Errors of a request after which the engine does not count as broken: a picture is not finite, or memory ran out."""

log = logging.getLogger(__name__)


class Engine:
    """Colors pictures with one bundle, on its own thread.

    Args:
        bundle: the model, already on its device.
        max_batch: number of slots, that is, rows of the network in a turn. A guided request takes two slots, but it
            runs alone in a batch of one slot.
        max_queue: number of requests that may wait, in addition to `max_batch`.
        cache_size: number of cached conditions of recent pairs of sketch and reference, and of cached references.
        own_thread: whether the engine runs turns on its own thread; if not, the caller runs each turn with turn().
        clock: returns the time for deadlines, in seconds.
        on_turn: callback after each turn; it runs on the engine's thread and must not block.
        sizes: batch sizes to which rows are padded, see Evaluator; if left out, a few on CUDA, no padding on a CPU.
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
        on_turn: Callable[[Turn], None] | None = None,
        sizes: tuple[int, ...] | None = None,
        warms_up: bool = False,
    ) -> None:
        self.bundle = bundle
        self.max_batch = max_batch
        self.max_queue = max_queue
        self.counts = Counts()
        self._clock, self._on_turn = clock, on_turn
        self._conditions = ConditionCache(bundle.denoiser, cache_size)
        self._evaluator = build_evaluator(bundle.denoiser, max_batch, sizes)
        self._batch = RunningBatch(self._evaluator, self._conditions)
        self._waiting = FairQueue[Ticket](patience=2 * max_batch)
        self._running: dict[Row, Ticket] = {}
        self._num_open = 0
        self._pace = TurnTimes()
        self._failed_turns = 0
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
            self._refuse_if_unable()  # Check before the request is prepared, to save that work.
        ticket = self._ticket(request)
        with self._changed:
            self._refuse_if_unable()
            self._refuse_if_late(ticket)
            self._num_open += 1
            ticket.number, self.counts.submitted = self.counts.submitted, self.counts.submitted + 1
            ticket.future.add_done_callback(lambda _: self._count_end(ticket))
            if not self._is_over(ticket):
                self._waiting.add(ticket, request.key)
                self._changed.notify()
        return ticket.future

    def turn(self) -> bool:
        """Run one turn; return False if no request is running. Callers use this only with `own_thread=False`."""
        try:
            return self._turn()
        except Exception as error:  # After a device error or a bug, no request may wait forever.
            self._give_up(error)
            return True

    @property
    def num_turns(self) -> int:
        """Number of turns since the start."""
        return self.counts.turns

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
            return sum(ticket.row.work_left for ticket in [*self._waiting, *self._running.values()])

    @property
    def is_alive(self) -> bool:
        """Whether the engine works; false if its thread has ended, the device has failed, or every request fails."""
        runs = self._thread is None or self._thread.is_alive()
        return runs and self._lost is None and self._failed_turns < MAX_FAILED_TURNS

    @property
    def lost(self) -> str | None:
        """The reason why this process can no longer use the device; None if it can."""
        return self._lost

    def close(self, *, drain: bool = True, timeout_s: float = 60) -> None:
        """Refuse new requests, finish the present requests (or fail them if `drain` is False), and end the thread.

        Args:
            drain: whether to finish the present requests.
            timeout_s: how long to wait for the end of the thread.
        """
        with self._changed:
            self._closing = True
            if not drain:
                for ticket in [*self._waiting, *self._running.values()]:
                    ticket.fail(BusyError("this engine was closed"))
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _prepare(self, warm_up_rows: tuple[int, ...]) -> None:
        with torch.inference_mode():
            for num_rows in warm_up_rows:
                conditions = self._conditions.get([self._blank(number) for number in range(num_rows)])
                size = self.bundle.config.image_size
                x, t = (torch.zeros(num_rows, *shape, device=self._evaluator.device) for shape in ((3, size, size), ()))
                self._evaluator(x, t + 0.5, self._evaluator.join(conditions))
                self._conditions.clear()
            self._evaluator.prepare(lambda: self._conditions.get([self._blank(0)])[0])

    def _blank(self, number: int) -> Pair:
        """Return a pair of uniform pictures, a different pair for each number."""
        size = self.bundle.config.image_size
        return pair_of(torch.full((1, size, size), 1 - number / 8), torch.full((3, size, size), number / 8))

    def _ticket(self, request: Request) -> Ticket:
        settings = request.options.apply_to(self.bundle.config.sampler)
        size = self.bundle.config.image_size
        if request.sketch.shape != (1, size, size) or request.reference.shape != (3, size, size):
            found = f"{tuple(request.sketch.shape)} and {tuple(request.reference.shape)}"
            raise ValueError(f"sketch and reference must be [1, {size}, {size}] and [3, {size}, {size}], got {found}")
        pair, previews = pair_of(request.sketch, request.reference), request.on_progress is not None
        row = new_row(self.bundle.denoiser, pair, settings, request.options.seed, previews)
        return Ticket(request, row)

    def _refuse_if_unable(self) -> None:
        if self._lost is not None:
            raise UnavailableError(self._lost)
        if self._closing:
            self._refuse("this engine is closing")
        if self._num_open >= self.max_batch + self.max_queue:
            turns = self._turns_until_done(list(self._waiting), (1, 0))
            self._refuse(f"{len(self._waiting)} requests wait already", turns * self._pace.typical)

    def _refuse_if_late(self, ticket: Ticket) -> None:
        """Refuse a request that would be late because of the work before it.

        A request that would be late even without that work is accepted here; _is_over fails it with DeadlineError.
        """
        if ticket.request.deadline is not None:
            turns = self._turns_until_done(self._waiting.before(ticket.request.key), ticket.claim)
            wait_s, left_s = turns * self._pace.typical, ticket.request.deadline - self._clock()
            if wait_s > left_s > ticket.row.num_left * self._pace.fastest:
                self._refuse(f"it would take {wait_s:.1f} s, and {left_s:.1f} s are left", wait_s - left_s)

    def _refuse(self, why: str, retry_after_s: float = 1.0) -> None:
        self.counts.refused += 1
        raise BusyError(why, retry_after_s)

    def _turns_until_done(self, before: list[Ticket], own: Claim) -> int:
        running = [ticket.claim for ticket in self._running.values()]
        return turns_until_done(self.max_batch, running, [ticket.claim for ticket in before], own)

    def _count_end(self, ticket: Ticket) -> None:
        """Count the end of a request. Its future calls this once, on the thread that completes or cancels it."""
        with self._changed:
            self._num_open -= 1
            self._waiting.remove(ticket)
            error = None if ticket.future.cancelled() else ticket.future.exception()
            self.counts.cancelled += ticket.future.cancelled()
            self.counts.late += isinstance(error, DeadlineError)
            self.counts.failed += error is not None and not isinstance(error, DeadlineError)
            self.counts.finished += not ticket.future.cancelled() and error is None

    def _work(self) -> None:
        while self._wait_for_work():
            self.turn()

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not len(self._waiting) and not self._running and not self._closing and self._lost is None:
                self._changed.wait()
            return self._lost is None and bool(len(self._waiting) or self._running)

    def _turn(self) -> bool:
        begun = self._clock()
        with torch.inference_mode():
            refused = self._change_batch()
            numbers = tuple(ticket.number for row, ticket in self._running.items() if row.error is None)
            if not numbers and not refused:
                return False
            ended = self._batch.turn() if numbers else []
            self._evaluator.wait()  # Asynchronous errors of the device surface here, also those of a failed join.
        broken = [row for row in [*refused, *ended] if row.error is not None and not isinstance(row.error, EXCUSED)]
        self._failed_turns = self._failed_turns + 1 if len(broken) == len(refused) + len(numbers) else 0
        self._answer([*refused, *ended])
        if numbers:
            self._show_progress()
            self._note(begun, numbers)
        return True

    def _is_over(self, ticket: Ticket) -> bool:
        """Return whether a request has ended; fail it with DeadlineError if it missed or cannot meet its deadline."""
        if ticket.request.deadline is not None:
            if self._clock() > ticket.request.deadline:
                ticket.fail(DeadlineError("not finished by its deadline"))
            elif self._clock() + ticket.row.num_left * self._pace.fastest > ticket.request.deadline:
                ticket.fail(DeadlineError("cannot be finished by its deadline"))
        return ticket.future.done()

    def _change_batch(self) -> list[Row]:
        """Remove ended requests from the batch and add the next ones; return the rows that failed to join."""
        with self._changed:
            gone = [row for row, ticket in self._running.items() if self._is_over(ticket)]
            for row in gone:
                del self._running[row]
            for ticket in list(self._waiting):
                if self._is_over(ticket):
                    self._waiting.remove(ticket)
            joining = self._take_next()
            self._running |= {ticket.row: ticket for ticket in joining}
        self._batch.leave(gone)
        self._batch.join([ticket.row for ticket in joining])
        return [ticket.row for ticket in joining if ticket.row.error is not None]

    def _take_next(self) -> list[Ticket]:
        """Take requests for the free slots from the queue.

        If the next request needs more slots than are free, no further request is taken, because smaller requests could
        pass it forever.
        """
        taken: list[Ticket] = []
        places = Counter[str]()
        for ticket in self._running.values():
            places[ticket.request.key] += ticket.row.places
        while found := self._waiting.peek(places):
            (ticket, key), used = found, places.total()
            if used and used + ticket.row.places > self.max_batch:
                break
            taken.append(self._waiting.take(places))
            places[key] += ticket.row.places
        return taken

    def _give_up(self, error: Exception) -> None:
        """Fail the running requests; if the device has failed, also the waiting and all future requests."""
        log.error("a turn failed, its requests are given up: %s", for_log(error))
        with self._changed:
            if is_lost(error):
                self._lost = str(for_request(error))
            self._failed_turns += not is_out_of_memory(error)
            tickets = [*self._running.values(), *(self._waiting if self._lost else ())]
            self._running = {}
        self._batch.clear()
        self._conditions.clear()
        for ticket in tickets:
            if ticket.row.picture is not None:
                ticket.finish(ticket.row.picture)
            else:
                ticket.fail(for_request(error))

    def _answer(self, ended: list[Row]) -> None:
        """Complete the futures of the ended rows with their pictures or errors."""
        with self._changed:
            tickets = [(row, self._running.pop(row)) for row in ended]
        for row, ticket in tickets:
            if row.picture is not None:
                ticket.finish(row.picture)
            elif row.error is not None:
                ticket.fail(row.error)

    def _show_progress(self) -> None:
        for row, ticket in self._running.items():
            if row.preview is not None and ticket.request.on_progress is not None:
                try:
                    ticket.request.on_progress(row.steps_done, row.settings.steps, row.preview)
                except Exception as error:  # A failing callback must not affect other requests.
                    ticket.fail(error)

    def _note(self, begun: float, numbers: tuple[int, ...]) -> None:
        seconds = self._clock() - begun
        self._pace.add(seconds)
        with self._changed:
            counts = self.counts
            counts.turns += 1
            counts.turn_seconds += seconds
            counts.rows_evaluated += self._batch.num_evaluated
            counts.reference_hits, counts.reference_misses = self._conditions.hits, self._conditions.misses
            waiting = tuple(ticket.number for ticket in self._waiting)
        if self._on_turn is not None:
            self._on_turn(Turn(counts.turns, seconds, numbers, waiting, self._batch.num_evaluated))
