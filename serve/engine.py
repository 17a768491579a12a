"""Continuous batching: requests with different steps, guidance, samplers and arrival times share one running batch.

A *turn* is one network evaluation for every running request, each at its own time t. New requests join at the next
turn; finished, cancelled and late ones leave. The idea that made language-model servers fast. Plain Python and torch.

    engine = Engine(load_bundle(folder))
    future = engine.submit(Request(sketch, reference, seed=7))
    picture = future.result()           # uint8 [S, S, 3]; future.cancel() frees the place within one turn

A result depends on its own inputs and seed; neighbours move it by rounding only, at most one 8-bit level in float32.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from animediffusion.models.bundle import Bundle, SamplerDefaults
from animediffusion.models.colorize import noise_for
from animediffusion.models.condition import Condition, cat_conditions
from animediffusion.models.guidance import mix
from animediffusion.models.images import to_uint8
from animediffusion.models.sampler import Sampler, State, build_sampler, sample_times

Progress = Callable[[int, int, NDArray[np.uint8]], None]
"""(steps done, steps in all, estimate of the picture); called on the engine's thread, so it must return at once."""

log = logging.getLogger(__name__)


class QueueFullError(Exception):
    """Too many requests wait already."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        """When what is here now should be done."""


class DeadlineError(Exception):
    """The request was not finished by its deadline."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One picture to make. What is None comes from the bundle's sampler defaults."""

    sketch: Tensor
    """[1, S, S] in [-1, 1]."""
    reference: Tensor
    """[3, S, S] in [-1, 1]."""
    seed: int
    steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    deadline: float | None = None
    """Give up at this time of time.monotonic()."""
    key: str = ""
    """Who asks; places in the batch are shared fairly between keys."""
    on_progress: Progress | None = None


class Turn(NamedTuple):
    """What happened in a turn."""

    seconds: float
    num_evaluated: int
    """Rows of the network, guidance included."""


@dataclass
class Counts:
    """What an engine has done since it was made."""

    turns: int = 0
    turn_seconds: float = 0.0
    rows_evaluated: int = 0
    """Rows of the network in all turns."""
    reference_hits: int = 0
    """Conditions that were encoded already."""
    reference_misses: int = 0


@dataclass(eq=False)
class _Ticket:
    """A request from submission to its end."""

    request: Request
    settings: SamplerDefaults
    work_left: int
    """Rows of the network until it is finished; guidance doubles them."""
    future: Future[NDArray[np.uint8]] = field(default_factory=Future)

    def is_over(self) -> bool:
        """True once nobody waits for it any more; a late one is told so."""
        if self.request.deadline is not None and time.monotonic() > self.request.deadline:
            self.fail(DeadlineError("not finished by its deadline"))
        return self.future.done()

    def fail(self, error: Exception) -> None:
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)

    def finish(self, picture: NDArray[np.uint8]) -> None:
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_result(picture)


@dataclass(eq=False)
class _Row:
    """A ticket in the running batch."""

    ticket: _Ticket
    sampler: Sampler
    state: State
    condition: Condition
    null: Condition | None
    """The sketch without the reference, where guidance needs it."""


class Engine:
    """Colors pictures with one bundle on one thread of its own.

    Args:
        bundle: the model, already on its device.
        max_batch: requests that run at the same time.
        max_queue: requests that may wait beside those.
        cache_size: conditions kept of recent (sketch, reference) pairs: another seed costs no second encoding.
        on_turn: called after each turn on its thread; must return at once.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        max_batch: int = 8,
        max_queue: int = 32,
        cache_size: int = 64,
        on_turn: Callable[[Turn], None] | None = None,
    ) -> None:
        self.bundle = bundle
        self.max_batch = max_batch
        self.max_queue = max_queue
        self.counts = Counts()
        self._on_turn = on_turn
        self._conditions = _ConditionCache(bundle, cache_size)
        self._device = next(bundle.denoiser.parameters()).device
        self._waiting: list[_Ticket] = []
        self._rows: list[_Row] = []
        self._num_open = 0
        self._joined: tuple[list[_Row], Condition] | None = None
        self._changed = threading.Condition(threading.RLock())  # futures end, and call back, inside of it
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Future[NDArray[np.uint8]]:
        """The picture to come: uint8 [S, S, 3], or QueueFullError, DeadlineError, ValueError (not finite).

        Raises:
            ValueError: for unusable settings or shapes.
            QueueFullError: if max_batch + max_queue requests are here already.
        """
        settings = settings_for(
            self.bundle, sampler=request.sampler, steps=request.steps, guidance_scale=request.guidance_scale
        )
        self._check_shapes(request)
        steps = build_sampler(settings.name, self.bundle.denoiser.path).num_evaluations(settings.steps)
        ticket = _Ticket(request, settings, steps * (1 if settings.guidance_scale == 1 else 2))
        with self._changed:
            if self._closing:
                raise QueueFullError("this engine is closing")
            if self._num_open >= self.max_batch + self.max_queue:
                wait_s = self.counts.turn_seconds / max(1, self.counts.turns) * self.work_left / self.max_batch
                raise QueueFullError(f"{len(self._waiting)} requests wait already", wait_s)
            self._num_open += 1
            self._waiting.append(ticket)
            self._changed.notify()
        ticket.future.add_done_callback(self._count_down)
        return ticket.future

    @property
    def num_turns(self) -> int:
        """Turns so far."""
        return self.counts.turns

    @property
    def num_running(self) -> int:
        """Requests in the batch."""
        return len(self._rows)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a place."""
        return len(self._waiting)

    @property
    def work_left(self) -> int:
        """Rows of the network until all that is here is done: what autoscaling should count."""
        return sum(ticket.work_left for ticket in [*self._waiting, *(row.ticket for row in list(self._rows))])

    @property
    def is_alive(self) -> bool:
        """False if the thread has ended, which it does on close() only."""
        return self._thread.is_alive()

    def close(self, *, drain: bool = True, timeout_s: float = 60) -> None:
        """Take no more requests; finish those that are here, or fail them when `drain` is False."""
        with self._changed:
            self._closing = True
            if not drain:
                for ticket in [*self._waiting, *(row.ticket for row in self._rows)]:
                    ticket.fail(QueueFullError("this engine was closed"))
            self._changed.notify()
        self._thread.join(timeout_s)

    def _count_down(self, _: Future[NDArray[np.uint8]]) -> None:
        with self._changed:
            self._num_open -= 1

    def _check_shapes(self, request: Request) -> None:
        size = self.bundle.config.image_size
        if request.sketch.shape != (1, size, size) or request.reference.shape != (3, size, size):
            found = f"{tuple(request.sketch.shape)} and {tuple(request.reference.shape)}"
            raise ValueError(f"sketch and reference must be [1, {size}, {size}] and [3, {size}, {size}], got {found}")

    def _work(self) -> None:
        while self._wait_for_work():
            try:
                with torch.inference_mode():
                    self._turn()
            except Exception as error:
                log.exception("a turn failed; its requests are given up")
                for row in self._rows:
                    row.ticket.fail(error)

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not self._waiting and not self._rows and not self._closing:
                self._changed.wait()
            return bool(self._waiting or self._rows)

    def _turn(self) -> None:
        """One network evaluation for every running request."""
        self._rows = [row for row in self._rows if not row.ticket.is_over()]
        for ticket in self._next_tickets():
            self._join(ticket)
        if not self._rows:
            return
        began, num_evaluated = time.perf_counter(), len(self._rows) + sum(row.null is not None for row in self._rows)
        for row, x_0 in zip(self._rows, self._estimates(), strict=True):
            row.state = row.sampler.advance(row.state, x_0)
            row.ticket.work_left -= 1 if row.null is None else 2
            _report(row)
        self._note(Turn(time.perf_counter() - began, num_evaluated))
        self._rows = [row for row in self._rows if not row.ticket.future.done()]

    def _note(self, turn: Turn) -> None:
        self.counts.turns += 1
        self.counts.turn_seconds += turn.seconds
        self.counts.rows_evaluated += turn.num_evaluated
        self.counts.reference_hits, self.counts.reference_misses = self._conditions.hits, self._conditions.misses
        if self._on_turn is not None:
            self._on_turn(turn)

    def _next_tickets(self) -> list[_Ticket]:
        """Tickets for the free places: first come first served, but keys with fewer running requests before others."""
        chosen: list[_Ticket] = []
        with self._changed:
            self._waiting = [ticket for ticket in self._waiting if not ticket.is_over()]
            running = Counter(row.ticket.request.key for row in self._rows)
            while self._waiting and len(self._rows) + len(chosen) < self.max_batch:
                ticket = min(self._waiting, key=lambda waiting: running[waiting.request.key])
                self._waiting.remove(ticket)
                running[ticket.request.key] += 1
                chosen.append(ticket)
        return chosen

    def _join(self, ticket: _Ticket) -> None:
        request, settings = ticket.request, ticket.settings
        try:
            condition, null = self._conditions.get(request, guided=settings.guidance_scale != 1)
            sampler = build_sampler(settings.name, self.bundle.denoiser.path)
            noise = noise_for(request.seed, request.sketch.shape[-1])[None].to(self._device)
            times = sample_times(self.bundle.denoiser.path, settings.steps, shift=settings.shift).to(self._device)
            self._rows.append(_Row(ticket, sampler, sampler.start(noise, times), condition, null))
        except Exception as error:  # this request's own fault: the others go on
            ticket.fail(error)

    def _estimates(self) -> list[Tensor]:
        """x_0 of every row, [1, 3, S, S] each, from one call of the network."""
        rows, guided = self._rows, [row for row in self._rows if row.null is not None]
        queries = {id(row): row.sampler.query(row.state) for row in rows}
        x, t = (torch.cat([queries[id(row)][part] for row in [*rows, *guided]]) for part in (0, 1))
        estimates = list(self.bundle.denoiser(x, t, self._batch_condition(rows, guided)).split(1))
        for row, without in zip(guided, estimates[len(rows) :], strict=True):
            number = rows.index(row)
            scale = torch.full_like(t[number : number + 1], row.ticket.settings.guidance_scale)
            interval = row.ticket.settings.guidance_interval
            estimates[number] = mix(without, estimates[number], scale, t[number : number + 1], interval)
        return estimates[: len(rows)]

    def _batch_condition(self, rows: list[_Row], guided: list[_Row]) -> Condition:
        """The conditions of all rows, joined anew only when the batch has changed."""
        if self._joined is None or self._joined[0] != rows:
            nulls = [row.null for row in guided if row.null is not None]
            self._joined = (list(rows), cat_conditions([*(row.condition for row in rows), *nulls]))
        return self._joined[1]


def settings_for(
    bundle: Bundle, *, sampler: str | None = None, steps: int | None = None, guidance_scale: float | None = None
) -> SamplerDefaults:
    """The bundle's sampler defaults with what was asked for in their place.

    Raises:
        ValueError: naming the one that is out of range.
    """
    own = bundle.config.sampler
    return replace(
        own,
        name=own.name if sampler is None else sampler,
        steps=own.steps if steps is None else steps,
        guidance_scale=own.guidance_scale if guidance_scale is None else guidance_scale,
    )


class _ConditionCache:
    """Encoded conditions of the most recent pairs of sketch and reference."""

    def __init__(self, bundle: Bundle, size: int) -> None:
        self._denoiser = bundle.denoiser
        self._device = next(bundle.denoiser.parameters()).device
        self._size = size
        self.hits = self.misses = 0
        self._kept: OrderedDict[tuple[bytes, bool], Condition] = OrderedDict()

    def get(self, request: Request, *, guided: bool) -> tuple[Condition, Condition | None]:
        """The condition of a request and, for guidance, the one without its reference."""
        digest = hashlib.sha256(request.sketch.numpy().tobytes() + request.reference.numpy().tobytes()).digest()
        return self._encode(digest, request, True), self._encode(digest, request, False) if guided else None

    def _encode(self, digest: bytes, request: Request, keep_reference: bool) -> Condition:
        key = (digest, keep_reference)
        if key in self._kept:
            self.hits += 1
        else:
            self.misses += 1
            keep = torch.tensor([keep_reference], device=self._device)
            pictures = request.sketch[None].to(self._device), request.reference[None].to(self._device)
            self._kept[key] = self._denoiser.encode(*pictures, keep)
            if len(self._kept) > self._size:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


def _report(row: _Row) -> None:
    """Tell the request how far it is, or give it its result."""
    if bool(row.sampler.done(row.state).all()):
        if bool(torch.isfinite(row.state.x).all()):
            row.ticket.finish(to_uint8(row.state.x)[0].cpu().numpy())
        else:
            row.ticket.fail(ValueError("the model's picture is not finite"))
    elif row.ticket.request.on_progress is not None and bool((row.state.stage == 0).all()):
        estimate = to_uint8(row.state.x_0)[0].cpu().numpy()
        try:
            row.ticket.request.on_progress(int(row.state.step[0]), row.ticket.settings.steps, estimate)
        except Exception as error:  # a listener that is gone must not hurt its neighbours
            row.ticket.fail(error)
