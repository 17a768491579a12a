"""Rows of Ray Data as tensors on the device that trains, made in Ray Data's own threads while the step before runs.

    batches = shard.iter_torch_batches(batch_size=16, prefetch_batches=2, collate_fn=Decode(device))

Ray Data keeps the order of the batches, however many threads decode, and raises here what a thread raised. Not here:
which rows come when, see pipelines/data/read_order.py; what is made of them on the device, see
models/augmentation/augment.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from ray.data.collate_fn import NumpyBatchCollateFn
from torch import Tensor

from animediffusion.pipelines.data.stream import decode_rows


@dataclass(frozen=True)
class Decoded:
    """A batch on its device."""

    ids: list[str]
    tensors: dict[str, Tensor]


class Decode(NumpyBatchCollateFn):
    """Encoded rows to a `Decoded` batch; called in several threads.

    Args:
        device: where the tensors go.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __call__(self, batch: dict[str, NDArray[Any]]) -> Decoded:
        """The rows' ids and pictures."""
        arrays = decode_rows(batch)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return Decoded([str(name) for name in batch["id"]], self._on_device(tensors))

    def _on_device(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._copies is None:
            return tensors
        # A copy from pinned memory on its own stream runs beside the step, and neither waits for the other.
        with torch.cuda.stream(self._copies):
            copies = {name: tensor.pin_memory().to(self.device, non_blocking=True) for name, tensor in tensors.items()}
        self._copies.synchronize()
        training = torch.cuda.default_stream(self.device)
        for copy in copies.values():
            copy.record_stream(training)  # the next copy may take its memory only after the step has read it
        return copies
