"""One network evaluation of many rows, at few different batch sizes.

A batch that requests join and leave has every size in turn. What is prepared per size (CUDA graphs; kernels chosen by
shape) wants few sizes, so rows are filled up to the next of them. On CUDA each size is captured once as a graph: a turn
is then one launch in the place of hundreds. A CPU gains nothing by filling up, so it does not by default.

Not run on a GPU yet: capture itself is untested, the buffers around it are tested on a CPU.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from animediffusion.models.condition import Condition, cat_conditions
from animediffusion.models.denoiser import Denoiser

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
        capture: makes graphs; None evaluates anew each time.
    """

    def __init__(self, denoiser: Denoiser, sizes: Sequence[int] | None = None, capture: Capture | None = None) -> None:
        self.denoiser = denoiser
        self.device = next(denoiser.parameters()).device
        self._sizes = sizes
        self._capture = capture
        self._graphs: dict[int, _Graph] = {}

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
        missing = len(condition.features) - len(x)
        padded_x, padded_t = (torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) for part in (x, t))
        output = self._output(padded_x, padded_t, condition)[: len(x)]
        return self.denoiser.to_x0(output, x, t)

    def wait(self) -> None:
        """Until the device is done: a host that runs ahead would see neither how long turns take nor who has left."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def prepare(self, make_condition: Callable[[], Condition]) -> None:
        """Capture all sizes now, for conditions like the one that is made, so that no turn has to wait for it."""
        if self._capture is None or self._sizes is None:
            return
        condition = make_condition()
        picture = torch.zeros_like(condition.sketch[:1]).float().expand(1, 3, -1, -1)
        for size in self._sizes:
            t = torch.full((size,), 0.5, device=self.device)
            self._output(picture.repeat(size, 1, 1, 1), t, cat_conditions([condition] * size))

    def _output(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        size = len(x)
        if self._capture is None or self._sizes is None or size not in self._sizes:
            return self.denoiser.output(x, t, condition)
        try:
            if size not in self._graphs:
                self._graphs[size] = _Graph(self.denoiser.output, x, t, condition, self._capture)
        except RuntimeError:
            log.exception("no CUDA graph for %d rows; going on without graphs", size)
            self._capture = None
            return self.denoiser.output(x, t, condition)
        return self._graphs[size](x, t, condition)


class _Graph:
    """A captured evaluation: it reads its own buffers, so calls copy what they are about into them."""

    def __init__(self, output: Output, x: Tensor, t: Tensor, condition: Condition, capture: Capture) -> None:
        self._x, self._t = x.clone(), t.clone()
        self._condition = Condition(*(part.clone() for part in condition))
        self._holds: Condition | None = None
        self._replay, self._result = capture(lambda: output(self._x, self._t, self._condition))

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self._x.copy_(x)
        self._t.copy_(t)
        if condition is not self._holds:  # most turns have the batch of the turn before
            for own, new in zip(self._condition, condition, strict=True):
                own.copy_(new)
            self._holds = condition
        self._replay()
        return self._result.clone()


def cuda_capture() -> Capture:
    """A Capture for CUDA, all of whose graphs share one pool of memory, since they never run at once."""
    pool = torch.cuda.graph_pool_handle()

    def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other engines of this process go on using the device meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = run()
        return graph.replay, result

    return capture
