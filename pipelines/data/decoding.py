"""Decode rows of Ray Data into tensors on the training device, in Ray Data's threads, during the previous step.

    batches = shard.iter_torch_batches(batch_size=16, prefetch_batches=2, collate_fn=Decode(device))

Ray Data keeps the order of the batches with any number of decoding threads, and the iterator raises the errors of those
threads. pipelines/data/read_order.py defines the order of the rows; models/augmentation/augment.py makes training
batches of the tensors.
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
    """Ids and pictures of a batch, on the training device."""

    ids: list[str]
    tensors: dict[str, Tensor]
    """The flags, which say what a row has, stay on the host, where a step asks for them."""


class Decode(NumpyBatchCollateFn):
    """Convert encoded rows to a `Decoded` batch; Ray Data calls it in several threads.

    Args:
        device: the device that receives the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __call__(self, batch: dict[str, NDArray[Any]]) -> Decoded:
        """Return the ids and pictures of the rows."""
        arrays = decode_rows(batch)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        flags = {name: tensors.pop(name) for name in list(tensors) if name.startswith("has_")}
        return Decoded([str(name) for name in batch["id"]], {**self._on_device(tensors), **flags})

    def _on_device(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._copies is None:
            return tensors
        # A copy from pinned memory on a separate stream runs in parallel with the training step.
        with torch.cuda.stream(self._copies):
            copies = {name: tensor.pin_memory().to(self.device, non_blocking=True) for name, tensor in tensors.items()}
        self._copies.synchronize()
        training = torch.cuda.default_stream(self.device)
        for copy in copies.values():
            copy.record_stream(training)  # a later copy must not reuse this memory before the step has read it
        return copies
