"""Network evaluations of many rows, padded to a few batch sizes and replayed as CUDA graphs.

The batch size changes whenever a request joins or leaves. CUDA graphs and kernels chosen by shape are prepared for each
batch size, so the rows are padded to the next of a few sizes. On CUDA, each size is captured once as a graph, and the
network is then one launch in place of 170 or more. The operations of the sampler, 59 (euler) to 144 (guided heun) in an
engine step, are launched one by one, because the shapes of its state change whenever a request joins or leaves. On a
CPU, padding has no benefit and is off by default.

The capture itself has not been tested on a GPU yet; tests on a CPU cover the buffers around it.
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
from animediffusion.models.out_of_memory import is_out_of_memory
from animediffusion.serve.engine.faults import for_log

log = logging.getLogger(__name__)

Output = Callable[[Tensor, Tensor, Condition], Tensor]
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Function that captures a function of fixed tensors; it returns (replay function, tensor that receives the result)."""

WARM_UP_RUNS = 3
"""Calls before a capture, which torch's notes on CUDA graphs require: libraries allocate memory and choose kernels in
the first calls."""


def batch_sizes(largest: int) -> tuple[int, ...]:
    """Return the batch sizes 1, 2, 4, 8, then multiples of 8, up to the first that holds `largest` rows.

    If `largest` is at most 4, the last size is `largest`.
    """
    small = [size for size in (1, 2, 4) if size < largest]
    return (*small, *range(8, largest + 8, 8)) if largest > 4 else (*small, largest)


def build_runner(denoiser: Denoiser, max_batch: int, sizes: Sequence[int] | None = None) -> NetworkRunner:
    """Return a NetworkRunner: on CUDA with graphs for a few sizes, on a CPU without padding unless `sizes` is given."""
    if next(denoiser.parameters()).device.type != "cuda":
        return NetworkRunner(denoiser, sizes)
    # A guided request needs two rows even if max_batch is 1.
    return NetworkRunner(denoiser, sizes or batch_sizes(max(2, max_batch)), cuda_capture())


class NetworkRunner:
    """Evaluates the network for a batch and returns its estimates of x_0.

    Args:
        denoiser: the model on its device, in eval mode.
        sizes: ascending batch sizes to which rows are padded; None disables padding. A batch with more rows than the
            last size is not padded.
        capture: captures CUDA graphs; None calls the network directly.
    """

    def __init__(self, denoiser: Denoiser, sizes: Sequence[int] | None = None, capture: Capture | None = None) -> None:
        self.denoiser = denoiser
        self.device = next(denoiser.parameters()).device
        self._sizes = sizes
        self._capture = capture
        self._graphs: _Graphs | None = None

    def padded(self, num_rows: int) -> int:
        """Return the number of rows that are evaluated for `num_rows` rows, padding included."""
        if self._sizes is None or num_rows > self._sizes[-1]:
            return num_rows
        return self._sizes[bisect_left(self._sizes, num_rows)]

    def join(self, conditions: Sequence[Condition]) -> Condition:
        """Concatenate conditions of one row each and pad them, for calls with as many rows."""
        missing = self.padded(len(conditions)) - len(conditions)
        return cat_conditions([*conditions, *[conditions[-1]] * missing])

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return x_0 [B, 3, S, S] in float32 for x_t, t [B] and the condition that `join` made of B conditions."""
        output = self._replayed(x, t, condition)
        if output is None:
            missing = len(condition.features) - len(x)
            padded_x, padded_t = (torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) for part in (x, t))
            output = self.denoiser.output(padded_x, padded_t, condition)[: len(x)]
        return self.denoiser.to_x0(output, x, t)

    def wait(self) -> None:
        """Wait for the device; a host that ran ahead could neither time steps nor notice canceled requests."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def prepare(self, make_condition: Callable[[], Condition]) -> None:
        """Capture all sizes now, for conditions shaped like that of `make_condition`, so that no engine step has to.

        The largest size is captured first, so that smaller graphs reuse the memory of its pool.
        """
        if self._capture is not None and self._sizes is not None:
            condition = make_condition()
            for size in reversed(self._sizes):
                self._captured(size, condition)

    def _replayed(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor | None:
        """Return the network's output from a graph; None if no graph has this number of rows."""
        graphs = self._captured(len(condition.features), condition)
        return graphs(x, t, condition) if graphs is not None else None

    def _captured(self, size: int, like: Condition) -> _Graphs | None:
        """Return the graphs, with one of `size` rows; None if there cannot be a graph of this size."""
        if self._capture is None or self._sizes is None or size not in self._sizes:
            return None
        if self._graphs is not None and not self._graphs.fits(like):
            return None  # The graphs are for one reference.
        try:
            graphs = self._graphs or _Graphs(self.denoiser.output, self._capture, self._sizes[-1], like)
            graphs.capture(size)
        except RuntimeError as error:
            log.warning("no CUDA graph for %d rows: %s", size, for_log(error))
            # If memory ran out, graphs of half the size may fit. Any other error would occur with all sizes.
            smaller = [one for one in self._sizes if 2 * one <= size] if is_out_of_memory(error) else []
            self._sizes, self._capture = (smaller, self._capture) if smaller else (self._sizes, None)
            self._graphs = None
            return None
        self._graphs = graphs
        return graphs


class _Graphs:
    """CUDA graphs of network evaluations, one for each number of rows.

    A graph reads and writes the tensors that it was captured with, so each call copies its inputs into them. All graphs
    share the tensors of the largest graph, and a smaller graph uses their first rows.
    """

    def __init__(self, output: Output, capture: Capture, most: int, like: Condition) -> None:
        self._output, self._make = output, capture
        self._condition = Condition(*(part[:1].repeat(most, *[1] * (part.ndim - 1)) for part in like))
        picture = torch.zeros_like(self._condition.sketch, dtype=torch.float32)
        self._x, self._result = (picture.repeat(1, 3, 1, 1) for _ in range(2))
        self._t = torch.full((most,), 0.5, device=picture.device)
        self._holds: Condition | None = None
        self._replays: dict[int, Callable[[], None]] = {}

    def fits(self, condition: Condition) -> bool:
        """Return whether the condition has as many reference tokens as those of the graphs."""
        return condition.tokens.shape[1:] == self._condition.tokens.shape[1:]

    def capture(self, size: int) -> None:
        """Capture the graph of `size` rows unless it exists already."""
        if size not in self._replays:
            x, t, result = self._x[:size], self._t[:size], self._result[:size]
            condition = select(self._condition, slice(size))
            self._replays[size], _ = self._make(lambda: result.copy_(self._output(x, t, condition)))

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        size, num_rows = len(condition.features), len(x)
        self._x[:num_rows].copy_(x)  # The padding rows may have any values.
        self._t[:num_rows].copy_(t)
        if condition is not self._holds:  # The batch, and with it the condition, is unchanged in most engine steps.
            self._holds = None
            for own, new in zip(self._condition, condition, strict=True):
                own[:size].copy_(new)
            self._holds = condition
        self._replays[size]()
        return self._result[:num_rows].clone()


def cuda_capture() -> Capture:
    """Return a Capture for CUDA. Its graphs share one memory pool, because they never run at the same time."""
    pool = torch.cuda.graph_pool_handle()

    def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        before = torch.cuda.current_stream()
        try:
            return _captured(run, pool)
        finally:
            # If the capture fails, torch.cuda.graph does not restore the thread's previous stream.
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
    # "thread_local" lets other engines of this process use the device during the capture.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = run()
    return graph.replay, result
