"""Filling up, and the buffers of a graph, with "run it again" in the place of a CUDA graph's replay."""

import pytest
import torch

from animediffusion.models.bundle import Bundle
from animediffusion.models.condition import cat_conditions, select
from animediffusion.serve.evaluator import Evaluator, few_sizes

SIZE = 32


def inputs(bundle: Bundle, rows: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x, sketch, reference = (torch.rand(rows, c, SIZE, SIZE, generator=generator) * 2 - 1 for c in (3, 1, 3))
    condition = bundle.denoiser.encode(sketch, reference)
    rows_of_it = [select(condition, slice(number, number + 1)) for number in range(rows)]
    return x, torch.rand(rows, generator=generator), rows_of_it


def again(run):
    """A capture whose replay computes anew, from the same buffers into the same result."""
    result = run()
    return lambda: result.copy_(run()), result


def failing(_run):
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize(
    ("largest", "sizes"),
    [(1, (1,)), (3, (1, 2, 3)), (4, (1, 2, 4)), (8, (1, 2, 4, 8)), (9, (1, 2, 4, 8, 16)), (24, (1, 2, 4, 8, 16, 24))],
)
def test_sizes_are_few_and_hold_all_rows(largest, sizes):
    assert few_sizes(largest) == sizes


@pytest.mark.parametrize("capture", [None, again, failing])
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_rows_are_filled_up_and_come_out_as_they_are(bundle: Bundle, capture, rows):
    evaluator = Evaluator(bundle.denoiser, (2, 4), capture)
    for seed in range(3):
        x, t, conditions = inputs(bundle, rows, seed)
        joined = evaluator.join(conditions)
        assert len(joined.features) == {1: 2, 3: 4, 5: 5}[rows]
        for _ in range(2):
            expected = bundle.denoiser(x, t, cat_conditions(conditions))
            torch.testing.assert_close(evaluator(x, t, joined), expected, atol=1e-5, rtol=1e-4)
            x = x.flip(0)


def test_a_result_survives_the_next_replay(bundle: Bundle):
    evaluator = Evaluator(bundle.denoiser, (2,), again)
    x, t, conditions = inputs(bundle, 2)
    joined = evaluator.join(conditions)
    first = evaluator(x, t, joined)
    kept = first.clone()
    evaluator(-x, t, joined)
    assert torch.equal(first, kept)


def test_every_size_is_captured_before_the_first_turn(bundle: Bundle):
    captured = []
    evaluator = Evaluator(bundle.denoiser, (1, 2, 4), lambda run: captured.append(1) or again(run))
    x, t, conditions = inputs(bundle, 3)
    evaluator.prepare(lambda: conditions[0])
    evaluator(x, t, evaluator.join(conditions))
    assert len(captured) == 3
