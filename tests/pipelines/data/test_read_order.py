"""Order of rows: every row once per epoch, the same again after a resume."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from animediffusion.pipelines.data.read_order import (
    Mixture,
    ReadBlock,
    Stream,
    choose_block_rows,
    groups,
    order,
    read_blocks,
)

SHARDS = st.lists(st.integers(1, 70), min_size=1, max_size=5).map(tuple)


def positions_of_rank(
    stream: Stream | Mixture, rank: int, world_size: int, num_rows: int, start_rows: int = 0
) -> list[int]:
    """What streaming_split(equal=True) gives one rank: every world_size-th block."""
    table = read_blocks(stream.block_rows, world_size, num_rows, start_rows)
    return np.concatenate([stream.rows(block)[0] for block in table[rank::world_size]])[:num_rows].tolist()


@given(SHARDS, st.integers(1, 100), st.integers(0, 3))
def test_every_row_comes_once_per_epoch(shards: tuple[int, ...], block_rows: int, epoch: int) -> None:
    stream = Stream(shards, seed=1, block_rows=block_rows)
    size = stream.num_rows
    needed = range((epoch + 1) * size // block_rows + 1)
    rows = np.concatenate([stream.rows(ReadBlock(number))[1] for number in needed])

    assert sorted(rows[epoch * size : (epoch + 1) * size]) == list(range(size))


@given(SHARDS, st.integers(1, 100), st.integers(1, 4), st.integers(0, 300))
def test_a_resume_continues_each_rank_where_it_was(
    shards: tuple[int, ...], block_rows: int, world_size: int, taken: int
) -> None:
    stream = Stream(shards, seed=3, block_rows=block_rows)

    for rank in range(world_size):
        whole = positions_of_rank(stream, rank, world_size, taken + 50)
        assert positions_of_rank(stream, rank, world_size, 50, start_rows=taken) == whole[taken:]


@given(st.integers(1, 100), st.integers(1, 4), st.integers(1, 500), st.integers(0, 300))
def test_all_ranks_get_the_same_number_of_rows_and_enough(
    block_rows: int, world_size: int, num_rows: int, taken: int
) -> None:
    table = read_blocks(block_rows, world_size, num_rows, taken)

    given_rows = [sum(block_rows - block.skip for block in table[rank::world_size]) for rank in range(world_size)]
    assert len(set(given_rows)) == 1
    assert num_rows <= given_rows[0] < num_rows + block_rows


def test_groups_stay_inside_their_shard() -> None:
    starts, stops = groups([20, 5])

    assert starts.tolist() == [0, 16, 20]
    assert stops.tolist() == [16, 20, 25]


def test_seed_and_epoch_change_the_order() -> None:
    first, again, epoch, seed = (order([160], *key)[0].tolist() for key in ((0, 0), (0, 0), (0, 1), (1, 0)))

    assert first == again
    assert first != epoch
    assert first != seed


def test_a_read_block_reads_few_groups() -> None:
    stream = Stream((256, 256, 200), seed=0, block_rows=64)

    touched = {int(row) // 8 for row in stream.rows(ReadBlock(2))[1]}  # groups of 16 start at multiples of 8 here
    assert len(touched) <= 2 * (64 // 16 + 2)


def test_read_blocks_are_bounded_in_rows_and_bytes() -> None:
    assert choose_block_rows(16, 16_000, 2) == 64
    assert choose_block_rows(500, 5_000_000, 2) == 250
    assert choose_block_rows(100_000, 500_000_000, 2) == 4096
    assert 3000 < choose_block_rows(100_000, 1_000_000_000, 2) < 4096
    assert choose_block_rows(100_000, 100_000 * 10**7, 2) == 16


def test_a_stream_of_nothing_raises_value_error() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Stream((), seed=0, block_rows=64)


SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=3)


@given(SIZES, SIZES, st.integers(1, 40), st.integers(1, 40), st.integers(1, 20))
def test_every_batch_of_a_mixture_has_the_share_of_each_stream(
    first: list[int], second: list[int], rows: int, others: int, batch: int
) -> None:
    streams = (Stream(tuple(first), 1, rows), Stream(tuple(second), 1, others))
    mixed = Mixture(streams)
    blocks = [mixed.rows(ReadBlock(number)) for number in range(4)]
    numbers = np.concatenate([found for _, found in blocks])
    is_second = numbers >= sum(first)

    assert np.concatenate([positions for positions, _ in blocks]).tolist() == list(range(4 * mixed.block_rows))
    for start in range(0, len(numbers) - batch + 1, batch):
        wanted = batch * others / (rows + others)
        assert abs(is_second[start : start + batch].sum() - wanted) <= 2  # one row, and one at a border of blocks
    for part, stream, base in ((~is_second, streams[0], 0), (is_second, streams[1], sum(first))):
        alone = [stream.rows(ReadBlock(number))[1] for number in range(4)]
        assert (numbers[part] - base).tolist() == np.concatenate(alone).tolist()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3), st.integers(0, 200))
def test_a_resumed_mixture_continues_each_rank_where_it_was(
    rows: int, others: int, world_size: int, taken: int
) -> None:
    mixed = Mixture((Stream((7, 30), 3, rows), Stream((50,), 3, others)))

    for rank in range(world_size):
        whole = positions_of_rank(mixed, rank, world_size, taken + 50)
        assert positions_of_rank(mixed, rank, world_size, 50, start_rows=taken) == whole[taken:]
