"""The optimizer Muon (Jordan et al. 2024): momentum, then an update whose singular values are all near 1.

Matrices of equal shape are orthogonalized together. Under DDP each rank orthogonalizes a share of the matrices, because
all ranks need the same updates; torch.optim.Muon orthogonalizes one matrix at a time, and all of them on every rank. A
kernel [out, in, k, k] is treated as a matrix with `out` rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, chain, groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the first, third and fifth power in the quintic Newton-Schulz iteration."""
ITERATIONS = 5
EPSILON = 1e-7
BATCH_BYTES = {"cpu": 2**21, "cuda": 2**29}
"""Largest batch of matrices by device type: on a CPU it should fit the cache, on a GPU it limits memory use."""


class Muon:
    """The Muon optimizer.

    Args:
        weights: the matrices and kernels to train, contiguous and on one device.
        weight_decay: decoupled weight decay, as in AdamW.
        dtype: type of the orthogonalization; bfloat16 is precise enough. If one rank asks for float32, all use it.
    """

    def __init__(self, weights: Sequence[nn.Parameter], weight_decay: float, dtype: torch.dtype) -> None:
        self.weight_decay, self.dtype = weight_decay, dtype
        self._agreed = False
        ordered = sorted(weights, key=lambda weight: weight.flatten(1).shape)
        self.groups = [
            _ShapeGroup(list(group)) for _, group in groupby(ordered, lambda weight: weight.flatten(1).shape)
        ]

    @property
    def matrices(self) -> dict[nn.Parameter, Tensor]:
        """A view of each weight as a matrix that shares its memory."""
        return {weight: matrix for group in self.groups for weight, matrix in group.matrices.items()}

    @property
    def momentum(self) -> dict[nn.Parameter, Tensor]:
        """The momentum of each weight, bfloat16 [rows, columns]."""
        pairs = (zip(group.matrices, group.momentum, strict=True) for group in self.groups)
        return dict(chain.from_iterable(pairs))

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update the weights from their gradients; equal gradients on all ranks give equal weights on all ranks."""
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if _distributed() else (0, 1)
        if ranks > 1 and not self._agreed:
            self._agree()
        owners = self.owners(ranks)
        sizes = [group.momentum[0].numel() for group in self.groups for _ in group.matrices]
        device = self.groups[0].momentum.device
        updates = torch.empty(sum(sizes), dtype=self.dtype, device=device)
        parts = list(self._parts(updates))
        first = 0
        for group, part in zip(self.groups, parts, strict=True):
            mine = [n for n in range(len(part)) if owners[first + n] == rank]
            group.update(part, slice(mine[0], mine[-1] + 1) if mine else slice(0))
            first += len(part)
        if ranks > 1:
            _exchange(updates, sizes, owners)
        for group, part in zip(self.groups, parts, strict=True):
            group.apply(part, learning_rate, self.weight_decay)

    def _agree(self) -> None:
        """Agree with the other ranks on one dtype, because they exchange updates and may have different GPUs."""
        wide = torch.tensor(int(self.dtype == torch.float32), device=self.groups[0].momentum.device)
        dist.all_reduce(wide, dist.ReduceOp.MAX)
        self.dtype, self._agreed = (torch.float32 if wide else self.dtype), True

    def _parts(self, updates: Tensor) -> Iterator[Tensor]:
        """Yield each group's part of a flat tensor, as [matrices, rows, columns]."""
        sizes = [group.momentum.numel() for group in self.groups]
        for group, part in zip(self.groups, torch.split(updates, sizes), strict=True):
            yield part.view(group.momentum.shape)

    def owners(self, ranks: int) -> list[int]:
        """Assign each matrix to a rank, in rising order, so that all ranks have about equal work."""
        costs = [group.cost for group in self.groups for _ in group.matrices]
        return [int(ranks * (end - cost / 2) / sum(costs)) for end, cost in zip(accumulate(costs), costs, strict=True)]


class _ShapeGroup:
    """Weights of equal shape."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self.matrices = {weight: weight.detach().flatten(1) for weight in weights}
        rows, columns = next(iter(self.matrices.values())).shape
        # bfloat16 is enough: gradients are noisier, and the orthogonalization may run in bfloat16 too.
        self.momentum = torch.zeros(len(weights), rows, columns, dtype=torch.bfloat16, device=weights[0].device)
        self.scale = math.sqrt(max(1, rows / columns))
        smaller, larger = sorted((rows, columns))
        self.cost = smaller**2 * (2 * larger + smaller)

    def update(self, into: Tensor, mine: slice) -> None:
        """Update the momentum of all matrices, and write the updates of the matrices `mine` into `into`."""
        grads = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in self.matrices]
        gradient = torch.stack([grad.flatten(1) for grad in grads])
        momentum = self.momentum.float().lerp_(gradient, 1 - MOMENTUM)
        self.momentum.copy_(momentum)
        nesterov = gradient[mine].lerp_(momentum[mine], MOMENTUM).to(into.dtype)
        size = max(1, BATCH_BYTES.get(into.device.type, 2**29) // (self.momentum[0].numel() * into.element_size()))
        for batch, output in zip(torch.split(nesterov, size), torch.split(into[mine], size), strict=True):
            output.copy_(orthogonalize(batch))

    def apply(self, update: Tensor, learning_rate: float, weight_decay: float) -> None:
        """Decay the weights and add their updates."""
        matrices = list(self.matrices.values())
        torch._foreach_mul_(matrices, 1 - learning_rate * weight_decay)
        torch._foreach_add_(matrices, list(update.float().unbind()), alpha=-learning_rate * self.scale)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Bring the singular values of matrices [B, rows, columns] near 1 by a Newton-Schulz iteration."""
    if len(matrices) == 1:  # A CPU multiplies two matrices up to twice as fast as a batch of one.
        return _iterate(matrices[0], torch.addmm)[None]
    return _iterate(matrices, torch.baddbmm)


def _iterate(matrices: Tensor, add_product: Callable[..., Tensor]) -> Tensor:
    tall = matrices.shape[-2] > matrices.shape[-1]
    wide = matrices.mT if tall else matrices  # Makes wide @ wide.mT the smaller of the two possible products.
    wide = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=EPSILON)
    first, third, fifth = COEFFICIENTS
    for _ in range(ITERATIONS):
        square = wide @ wide.mT
        wide = add_product(wide, add_product(square, square, square, beta=third, alpha=fifth), wide, beta=first)
    return wide.mT if tall else wide


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _exchange(updates: Tensor, sizes: list[int], owners: list[int]) -> None:
    """Broadcast each rank's updates to all ranks; the updates of one rank are contiguous."""
    waiting = []
    ends = [0, *accumulate(sizes)]
    for rank, numbers in groupby(range(len(owners)), lambda number: owners[number]):
        own = list(numbers)
        part = updates[ends[own[0]] : ends[own[-1] + 1]]
        waiting.append(dist.broadcast(part, src=rank, async_op=True))
    for work in waiting:
        work.wait()
