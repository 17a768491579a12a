"""One network evaluation of many rows, at few different batch sizes.

A batch that requests join and leave has every size in turn. What is prepared per size (CUDA graphs; kernels chosen by
shape) needs few sizes, so rows are filled up to the next of them. On CUDA each size is captured once as a graph: the
network is then one launch in the place of 170 or more. The sampler's operations, 59 (euler) to 144 (guided heun) in a
turn, are launched one by one: the shapes of its state change whenever a request joins or leaves. A CPU gains nothing by
filling up, so it does not by default.

Not run on a GPU yet: capture itself is untested, the buffers around it are tested on a CPU.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from animediffusion.models.diffusion.denoiser import Denoiser
from animediffusion.models.network.condition import Condition, cat_conditions, select
from animediffusion.serve.engine.faults import for_log, is_out_of_memory

log = logging.getLogger(__name__)

Output = Callable[[Tensor, Tensor, Condition], Tensor]
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""From a function of fixed tensors to (what does its work again, the tensor its result is then in)."""

WARM_UP_RUNS = 3
"""Before a capture, as torch's notes on CUDA graphs ask: libraries allocate and choose kernels in the first calls."""


def few_sizes(largest: int) -> tuple[int, ...]:
    """1, 2, 4, 8, then multiples of 8, up to the first that holds `largest` rows."""
    small = [size for size in (1, 2, 4) if size < largest]
    return (*small, *range(8, largest + 8, 8)) if largest > 4 else (*small, largest)


def build_evaluator(denoiser: Denoiser, max_batch: int, sizes: Sequence[int] | None = None) -> Evaluator:
    """With graphs of few sizes on CUDA; every size as it is on a CPU, unless `sizes` says otherwise."""
    if next(denoiser.parameters()).device.type != "cuda":
        return Evaluator(denoiser, sizes)
    # A guided request alone takes two places even of one.
    return Evaluator(denoiser, sizes or few_sizes(max(2, max_batch)), cuda_capture())


class Evaluator:
    """The estimates of x_0 of a batch.

    Args:
        denoiser: the model on its device, in eval mode.
        sizes: rising numbers of rows to fill up to; None takes every number as it is. More rows than the last of them
            are evaluated as they are.
        capture: makes graphs; None calls the network each time.
    """

    def __init__(self, denoiser: Denoiser, sizes: Sequence[int] | None = None, capture: Capture | None = None) -> None:
        self.denoiser = denoiser
        self.device = next(denoiser.parameters()).device
        self._sizes = sizes
        self._capture = capture
        self._graphs: _Graphs | None = None

    def padded(self, num_rows: int) -> int:
        """How many rows are evaluated for so many."""
        if self._sizes is None or num_rows > self._sizes[-1]:
            return num_rows
        return self._sizes[bisect_left(self._sizes, num_rows)]

    def join(self, conditions: Sequence[Condition]) -> Condition:
        """One row each, filled up, for calls with as many rows."""
        missing = self.padded(len(conditions)) - len(conditions)
        return cat_conditions([*conditions, *[conditions[-1]] * missing])

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """x_0 [B, 3, S, S] in float32 for x_t, t [B] and what `join` made of B conditions."""
        output = self._replayed(x, t, condition)
        if output is None:
            missing = len(condition.features) - len(x)
            padded_x, padded_t = (torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) for part in (x, t))
            output = self.denoiser.output(padded_x, padded_t, condition)[: len(x)]
        return self.denoiser.to_x0(output, x, t)

    def wait(self) -> None:
        """Until the device is done: a host that runs ahead would see neither how long turns take nor who has left."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def prepare(self, make_condition: Callable[[], Condition]) -> None:
        """Capture all sizes now, for conditions like the one that is made, so that no turn has to wait for it.

        The largest is the first: smaller graphs then find the memory that they need in its pool.
        """
        if self._capture is not None and self._sizes is not None:
            condition = make_condition()
            for size in reversed(self._sizes):
                self._captured(size, condition)

    def _replayed(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor | None:
        """The network's output from a graph; None where there is none for so many rows."""
        graphs = self._captured(len(condition.features), condition)
        return graphs(x, t, condition) if graphs is not None else None

    def _captured(self, size: int, like: Condition) -> _Graphs | None:
        """Graphs that can evaluate so many rows; None where they cannot."""
        if self._capture is None or self._sizes is None or size not in self._sizes:
            return None
        try:
            graphs = self._graphs or _Graphs(self.denoiser.output, self._capture, self._sizes[-1], like)
            graphs.capture(size)
        except RuntimeError as error:
            log.warning("no CUDA graph for %d rows: %s", size, for_log(error))
            # Without memory for this one, about half may fit. Whatever else is wrong, it is wrong with all of them.
            smaller = [one for one in self._sizes if 2 * one <= size] if is_out_of_memory(error) else []
            self._sizes, self._capture = (smaller, self._capture) if smaller else (self._sizes, None)
            self._graphs = None
            return None
        self._graphs = graphs
        return graphs


class _Graphs:
    """Captured evaluations, one for each number of rows.

    A graph reads and writes the tensors that it was captured with, so calls copy their own into them. All graphs share
    those of the largest, of which a smaller one takes the first rows.
    """

    def __init__(self, output: Output, capture: Capture, most: int, like: Condition) -> None:
        self._output, self._make = output, capture
        self._condition = Condition(*(part[:1].repeat(most, *[1] * (part.ndim - 1)) for part in like))
        picture = torch.zeros_like(self._condition.sketch, dtype=torch.float32)
        self._x, self._result = (picture.repeat(1, 3, 1, 1) for _ in range(2))
        self._t = torch.full((most,), 0.5, device=picture.device)
        self._holds: Condition | None = None
        self._replays: dict[int, Callable[[], None]] = {}

    def capture(self, size: int) -> None:
        """Make the graph for so many rows, unless it is there."""
        if size not in self._replays:
            x, t, result = self._x[:size], self._t[:size], self._result[:size]
            condition = select(self._condition, slice(size))
            self._replays[size], _ = self._make(lambda: result.copy_(self._output(x, t, condition)))

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        size, num_rows = len(condition.features), len(x)
        self._x[:num_rows].copy_(x)  # what fills up may be anything
        self._t[:num_rows].copy_(t)
        if condition is not self._holds:  # most turns have the batch of the turn before
            self._holds = None
            for own, new in zip(self._condition, condition, strict=True):
                own[:size].copy_(new)
            self._holds = condition
        self._replays[size]()
        return self._result[:num_rows].clone()


def cuda_capture() -> Capture:
    """A Capture for CUDA, all of whose graphs share one pool of memory, since they never run at once."""
    pool = torch.cuda.graph_pool_handle()

    def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        before = torch.cuda.current_stream()
        try:
            return _captured(run, pool)
        finally:
            # torch.cuda.graph leaves the thread on its own stream if the capture fails.
            torch.cuda.set_stream(before)

    return capture


def _captured(run: Callable[[], Tensor], pool: Any) -> tuple[Callable[[], None], Tensor]:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_RUNS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other engines of this process continue to use the device meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = run()
    return graph.replay, result
