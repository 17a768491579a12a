"""Filling up, and the buffers of a graph, with "run it again" in the place of a CUDA graph's replay."""

import gc
from contextlib import contextmanager

import pytest
import torch

from animediffusion.models.bundle import Bundle
from animediffusion.models.network.condition import cat_conditions, select
from animediffusion.serve.engine.network_runner import NetworkRunner, batch_sizes, cuda_capture

SIZE = 32


def inputs(bundle: Bundle, rows: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x, sketch, reference = (torch.rand(rows, c, SIZE, SIZE, generator=generator) * 2 - 1 for c in (3, 1, 3))
    condition = bundle.denoiser.encode(sketch, reference)
    rows_of_it = [select(condition, slice(number, number + 1)) for number in range(rows)]
    return x, torch.rand(rows, generator=generator), rows_of_it


def again(run):
    """A capture whose replay computes again, from the same buffers into the same result."""
    result = run()
    return lambda: result.copy_(run()), result


def failing(_run):
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize(
    ("largest", "sizes"),
    [(1, (1,)), (3, (1, 2, 3)), (4, (1, 2, 4)), (8, (1, 2, 4, 8)), (9, (1, 2, 4, 8, 16)), (24, (1, 2, 4, 8, 16, 24))],
)
def test_sizes_are_few_and_hold_all_rows(largest, sizes):
    assert batch_sizes(largest) == sizes


@pytest.mark.parametrize("capture", [None, again, failing])
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_rows_are_filled_up_and_come_out_as_they_are(bundle: Bundle, capture, rows):
    runner = NetworkRunner(bundle.denoiser, (2, 4), capture)
    for seed in range(3):
        x, t, conditions = inputs(bundle, rows, seed)
        joined = runner.join(conditions)
        assert len(joined.features) == {1: 2, 3: 4, 5: 5}[rows]
        for _ in range(2):
            expected = bundle.denoiser(x, t, cat_conditions(conditions))
            torch.testing.assert_close(runner(x, t, joined), expected, atol=1e-5, rtol=1e-4)
            x = x.flip(0)


def test_a_result_survives_the_next_replay(bundle: Bundle):
    runner = NetworkRunner(bundle.denoiser, (2,), again)
    x, t, conditions = inputs(bundle, 2)
    joined = runner.join(conditions)
    first = runner(x, t, joined)
    kept = first.clone()
    runner(-x, t, joined)
    assert torch.equal(first, kept)


def test_every_size_is_captured_before_the_first_engine_step(bundle: Bundle):
    captured = []
    runner = NetworkRunner(bundle.denoiser, (1, 2, 4), lambda run: captured.append(1) or again(run))
    x, t, conditions = inputs(bundle, 3)
    runner.prepare(lambda: conditions[0])
    runner(x, t, runner.join(conditions))
    assert len(captured) == 3


class Captures:
    """A capture that notes what it is called for, and has memory for so many rows."""

    def __init__(self, most: int = 256) -> None:
        self.most = most
        self.rows: list[int] = []
        self.results: list[torch.Tensor] = []

    def __call__(self, run):
        replay, result = again(run)
        self.rows.append(len(result))
        if len(result) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        self.results.append(result)
        return replay, result


def tensors_in_memory() -> dict[int, int]:
    """The size of each storage of a tensor in bytes, by its place."""
    gc.collect()
    storages = [one.untyped_storage() for one in gc.get_objects() if type(one) is torch.Tensor]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def test_graphs_of_all_sizes_share_the_tensors_of_the_largest(bundle: Bundle):
    captures, before = Captures(), tensors_in_memory()
    x, t, (condition,) = inputs(bundle, 1)
    runner = NetworkRunner(bundle.denoiser, batch_sizes(32), captures)
    runner.prepare(lambda: condition)
    assert captures.rows == sorted(batch_sizes(32), reverse=True)  # smaller graphs fit into the largest's memory
    assert len({result.untyped_storage().data_ptr() for result in captures.results}) == 1
    own = {part.untyped_storage().data_ptr() for part in (*condition, x, t)}
    held = {place: size for place, size in tensors_in_memory().items() if place not in before.keys() | own}
    one = sum(part.nbytes for part in (*condition, x, t)) + 4 * 3 * SIZE**2
    assert sum(held.values()) == 32 * one


def test_sizes_in_any_order_do_not_disturb_each_other(bundle: Bundle):
    runner = NetworkRunner(bundle.denoiser, (2, 4, 8), Captures())
    batches = [inputs(bundle, rows, rows) for rows in (7, 2, 3, 1, 8)]
    joined = [runner.join(conditions) for _, _, conditions in batches]
    for number in (0, 1, 0, 2, 2, 4, 1, 3, 0, 3):
        x, t, conditions = batches[number]
        found = runner(x, t, joined[number])
        torch.testing.assert_close(found, bundle.denoiser(x, t, cat_conditions(conditions)), atol=1e-5, rtol=1e-4)


def test_sizes_without_memory_for_a_graph_are_evaluated_as_they_are(bundle: Bundle, caplog):
    captures = Captures(most=4)
    runner = NetworkRunner(bundle.denoiser, (1, 2, 4, 8, 16), captures)
    runner.prepare(lambda: inputs(bundle, 1)[2][0])
    assert captures.rows == [16, 8, 4, 2, 1]
    assert len(caplog.records) == 2
    assert [runner.padded(rows) for rows in (3, 5, 9)] == [4, 5, 9]
    for rows in (3, 5):
        x, t, conditions = inputs(bundle, rows)
        found = runner(x, t, runner.join(conditions))
        torch.testing.assert_close(found, bundle.denoiser(x, t, cat_conditions(conditions)), atol=1e-5, rtol=1e-4)
    assert len(captures.rows) == 5
    assert all("out of memory" in record.getMessage() for record in caplog.records)


def test_a_failed_capture_gives_its_memory_back(bundle: Bundle):
    condition, seen = inputs(bundle, 1)[2][0], []

    def failing_late(run):
        seen.append(tensors_in_memory().keys())
        failing(run)

    before = tensors_in_memory().keys()
    runner = NetworkRunner(bundle.denoiser, (1, 2), failing_late)
    runner.prepare(lambda: condition)
    assert seen[0] - before
    assert not tensors_in_memory().keys() - before


@pytest.mark.parametrize("moment", ["begin", "run", "end"])
def test_a_failed_capture_leaves_its_thread_on_the_stream_it_was_on(monkeypatch, moment):
    streams = ["before"]

    def stream(name):
        @contextmanager
        def on():
            streams.append(name)
            yield
            streams.pop()  # as torch: only if nothing was raised

        return on()

    @contextmanager
    def graph(_graph, pool, capture_error_mode):
        streams.append("capture")
        if moment == "begin":
            raise RuntimeError("CUDA error: operation not permitted")
        yield
        if moment == "end":
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    class Stream:
        def wait_stream(self, _other) -> None:
            pass

    def current():
        found = Stream()
        found.name = streams[-1]
        return found

    def run():
        if moment == "run" and streams[-1] == "capture":
            raise RuntimeError("operation not permitted when stream is capturing")
        return torch.zeros(1)

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "current_stream", current)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda found: streams.append(found.name))
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: stream("warm up"))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    with pytest.raises(RuntimeError):
        cuda_capture()(run)
    assert streams[-1] == "before"
