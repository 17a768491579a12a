"""Batches decoded ahead: the same rows in the same order, while the step before runs."""

import time

import numpy as np
import pytest
import torch

from animediffusion.pipelines.data import decoding
from animediffusion.pipelines.data.decoding import Decode
from animediffusion.pipelines.data.stream import decode_rows, training_dataset
from animediffusion.platform.images.codec import encode_lossless

pytestmark = pytest.mark.ray
CPU = torch.device("cpu")


@pytest.fixture
def rows(ray_cluster, faces_dataset):
    """Makes the stream of one rank from its beginning."""
    return lambda: training_dataset(faces_dataset, seed=3, world_size=1, num_rows=100).iterator()


def ahead(rows, collate):
    return iter(rows.iter_torch_batches(batch_size=4, drop_last=True, prefetch_batches=2, collate_fn=collate))


def test_batches_are_those_of_a_plain_loop_in_its_order(rows):
    plain = list(rows().iter_batches(batch_size=4, drop_last=True, prefetch_batches=0))
    found = list(ahead(rows(), Decode(CPU)))
    assert [batch.ids for batch in found] == [list(batch["id"]) for batch in plain]
    assert len(found) >= 25
    for batch, encoded in zip(found, plain, strict=True):
        for name, array in decode_rows(encoded).items():
            assert torch.equal(batch.tensors[name], torch.from_numpy(array)), name


def test_the_pictures_go_to_the_device_and_the_flags_stay_where_a_step_asks_for_them(monkeypatch):
    moved, decode = {}, Decode(CPU)
    monkeypatch.setattr(decode, "_on_device", lambda tensors: moved.update(tensors) or dict.fromkeys(tensors))
    picture = encode_lossless(np.zeros((8, 8, 3), np.uint8))
    nothing = {name: [None] for name in ("sketch", "reference", "cross_reference")}
    found = decode({"id": ["train/0"], "target": [picture], **nothing}).tensors
    assert moved.keys() == {"target", "sketch", "reference", "cross_reference"}
    flags = {name: tensor.tolist() for name, tensor in found.items() if tensor is not None}
    assert flags == {"has_sketch": [False], "has_reference": [False], "has_cross": [False]}


def test_the_next_batch_is_decoded_before_it_is_asked_for(rows, monkeypatch):
    done = []
    monkeypatch.setattr(decoding, "decode_rows", lambda batch: done.append(1) or decode_rows(batch))
    batches = ahead(rows(), Decode(CPU))
    next(batches)
    deadline = time.monotonic() + 60
    while len(done) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert 2 <= len(done) <= 8, "some batches ahead, not the whole stream"
    batches.close()


def test_a_row_that_cannot_be_decoded_is_raised_where_its_batch_is_asked_for(rows, monkeypatch):
    def broken(batch):
        raise ValueError(f"row {batch['id'][0]} is damaged")

    monkeypatch.setattr(decoding, "decode_rows", broken)
    with pytest.raises(ValueError, match=r"row train/\d+ is damaged"):
        next(ahead(rows(), Decode(CPU)))
