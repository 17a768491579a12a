"""Continuous batching: requests with different steps, guidance, samplers and arrival times share one running batch.

A *turn* is one network evaluation for every running request, each at its own time t. New requests join at the next
turn; finished, cancelled and late ones leave. The idea that made language-model servers fast. Plain Python and torch.

    engine = Engine(load_bundle(folder))
    future = engine.submit(Request(sketch, reference, seed=7))
    picture = future.result()           # uint8 [S, S, 3]; future.cancel() frees the place within one turn

What is promised:
- A result depends on its own inputs and seed; neighbours move it by rounding only: at most one 8-bit level in float32.
- A request runs in consecutive turns from its first to its last; one that nobody waits for is gone by the next turn.
- `max_batch` counts rows of the network: a guided request, evaluated with and without its reference, takes two places.
- Keys share the places evenly, and none starves: fair.py states the bound.
- A request that could not make its deadline at the fastest recent pace takes no place, or gives it back.
- An evaluation that fails is tried in halves, so that only the requests that cause it fail.
- A device that fails for good fails every request with EngineError, and the engine is not alive any more.
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
from animediffusion.serve.engine.admission import Claim, TurnTimes, turns_until_done
from animediffusion.serve.engine.batch import NotFiniteError, Row, RunningBatch, new_row
from animediffusion.serve.engine.condition_cache import ConditionCache, Pair, pair_of
from animediffusion.serve.engine.fair_queue import FairQueue
from animediffusion.serve.engine.faults import EngineError, for_log, for_request, is_lost, is_out_of_memory
from animediffusion.serve.engine.network_runner import build_evaluator
from animediffusion.serve.engine.requests import (
    Counts,
    DeadlineError,
    Progress,
    QueueFullError,
    Request,
    Ticket,
    Turn,
    settings_for,
)

__all__ = [
    "Counts",
    "DeadlineError",
    "Engine",
    "EngineError",
    "Progress",
    "QueueFullError",
    "Request",
    "Turn",
    "settings_for",
]

MAX_FAILED_TURNS = 3
"""After this many turns in a row without a request that survived, the engine is taken for broken."""
WARM_UP_ROWS = (2, 1, 3)
"""torch.compile makes one network for a single row, one for the first other number, and one for all others."""
EXCUSED = (NotFiniteError, EngineError)
"""Errors of a request that say nothing against the engine: the model's picture, or too little memory for it."""

log = logging.getLogger(__name__)


class Engine:
    """Colors pictures with one bundle on one thread of its own.

    Args:
        bundle: the model, already on its device.
        max_batch: places, that is, rows of the network in a turn. A guided request takes two; alone it runs even where
            there is one.
        max_queue: requests that may wait beside those.
        cache_size: conditions kept of recent pairs of sketch and reference, and references beside them.
        own_thread: False where the caller makes the turns, one call of turn() each.
        clock: of deadlines, in seconds.
        on_turn: called after each turn on its thread; must return at once.
        sizes: see Evaluator; a few on CUDA, all on a CPU if left out.
        warms_up: evaluate batches of a few sizes first, so that a network that compiles itself does so before requests
            come.
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
        """Why the device cannot be used any more."""
        self._changed = threading.Condition(threading.RLock())  # futures end, and call back, inside of it
        self._closing = False
        self._prepare(WARM_UP_ROWS if warms_up else ())
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True) if own_thread else None
        if self._thread is not None:
            self._thread.start()

    def submit(self, request: Request) -> Future[NDArray[np.uint8]]:
        """The picture to come: uint8 [S, S, 3], or QueueFullError, DeadlineError, ValueError (not finite).

        Raises:
            ValueError: for unusable settings or shapes.
            QueueFullError: if max_batch + max_queue requests are here already, or so much work that this one would
                miss its deadline.
            EngineError: if the device has failed. The future raises it, too, for a request that the device's failure or
                its lack of memory ended.
        """
        with self._changed:
            self._refuse_if_unable()  # before the work of preparing it
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
        """One network evaluation for every running request; False if there is none. For `own_thread=False`."""
        try:
            return self._turn()
        except Exception as error:  # of the device, or our own bug: nobody may wait for ever because of it
            self._give_up(error)
            return True

    @property
    def num_turns(self) -> int:
        """Turns so far."""
        return self.counts.turns

    @property
    def num_running(self) -> int:
        """Requests in the batch."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a place."""
        return len(self._waiting)

    @property
    def work_left(self) -> int:
        """Rows of the network until all that is here is done: what autoscaling should count."""
        with self._changed:
            return sum(ticket.row.work_left for ticket in [*self._waiting, *self._running.values()])

    @property
    def is_alive(self) -> bool:
        """False if the thread has ended, as it does on close(), if the device has failed, or if every request fails."""
        runs = self._thread is None or self._thread.is_alive()
        return runs and self._lost is None and self._failed_turns < MAX_FAILED_TURNS

    @property
    def lost(self) -> str | None:
        """Why the device cannot be used any more in this process; None where it can."""
        return self._lost

    def close(self, *, drain: bool = True, timeout_s: float = 60) -> None:
        """Take no more requests; finish those that are here, or fail them when `drain` is False."""
        with self._changed:
            self._closing = True
            if not drain:
                for ticket in [*self._waiting, *self._running.values()]:
                    ticket.fail(QueueFullError("this engine was closed"))
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
        """A pair of pictures without content; each number gives another."""
        size = self.bundle.config.image_size
        return pair_of(torch.full((1, size, size), 1 - number / 8), torch.full((3, size, size), number / 8))

    def _ticket(self, request: Request) -> Ticket:
        settings = settings_for(
            self.bundle, sampler=request.sampler, steps=request.steps, guidance_scale=request.guidance_scale
        )
        size = self.bundle.config.image_size
        if request.sketch.shape != (1, size, size) or request.reference.shape != (3, size, size):
            found = f"{tuple(request.sketch.shape)} and {tuple(request.reference.shape)}"
            raise ValueError(f"sketch and reference must be [1, {size}, {size}] and [3, {size}, {size}], got {found}")
        pair, previews = pair_of(request.sketch, request.reference), request.on_progress is not None
        row = new_row(self.bundle.denoiser, pair, settings, request.seed, previews)
        return Ticket(request, row)

    def _refuse_if_unable(self) -> None:
        if self._lost is not None:
            raise EngineError(self._lost)
        if self._closing:
            self._refuse("this engine is closing")
        if self._num_open >= self.max_batch + self.max_queue:
            turns = self._turns_until_done(list(self._waiting), (1, 0))
            self._refuse(f"{len(self._waiting)} requests wait already", turns * self._pace.typical)

    def _refuse_if_late(self, ticket: Ticket) -> None:
        """If it would be late for the work before it; one that is late by itself is told so, see _is_over."""
        if ticket.request.deadline is not None:
            turns = self._turns_until_done(self._waiting.before(ticket.request.key), ticket.claim)
            wait_s, left_s = turns * self._pace.typical, ticket.request.deadline - self._clock()
            if wait_s > left_s > ticket.row.num_left * self._pace.fastest:
                self._refuse(f"it would take {wait_s:.1f} s, and {left_s:.1f} s are left", wait_s - left_s)

    def _refuse(self, why: str, retry_after_s: float = 1.0) -> None:
        self.counts.refused += 1
        raise QueueFullError(why, retry_after_s)

    def _turns_until_done(self, before: list[Ticket], own: Claim) -> int:
        running = [ticket.claim for ticket in self._running.values()]
        return turns_until_done(self.max_batch, running, [ticket.claim for ticket in before], own)

    def _count_end(self, ticket: Ticket) -> None:
        """Called once, when the future is done, on whatever thread made it so."""
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
            self._evaluator.wait()  # an accelerator's error shows here, that of a request that could not join as well
        broken = [row for row in [*refused, *ended] if row.error is not None and not isinstance(row.error, EXCUSED)]
        self._failed_turns = self._failed_turns + 1 if len(broken) == len(refused) + len(numbers) else 0
        self._answer([*refused, *ended])
        if numbers:
            self._show_progress()
            self._note(begun, numbers)
        return True

    def _is_over(self, ticket: Ticket) -> bool:
        """True once nobody waits for it any more, or in vain; the latter is told so."""
        if ticket.request.deadline is not None:
            if self._clock() > ticket.request.deadline:
                ticket.fail(DeadlineError("not finished by its deadline"))
            elif self._clock() + ticket.row.num_left * self._pace.fastest > ticket.request.deadline:
                ticket.fail(DeadlineError("cannot be finished by its deadline"))
        return ticket.future.done()

    def _change_batch(self) -> list[Row]:
        """Let requests that are over leave and the next ones join; the rows that could not, with their errors."""
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
        """Tickets for the free places. One that needs more than there are holds them: else it might wait for ever."""
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
        """Fail the requests that run; if the device is lost, also those that wait and those that will come."""
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
        """Give results and errors to those that wait for them."""
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
                except Exception as error:  # a listener that is gone must not hurt its neighbours
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
