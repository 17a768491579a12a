"""Our Muon against torch's, and on two ranks against one. Run as a script, this file is one of the two."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from animediffusion.models.training import muon
from animediffusion.models.training.loop import OptimizerConfig, TrainState
from animediffusion.models.training.muon import Muon, orthogonalize

SHAPES = ((24, 24), (16, 40), (40, 16), (8, 5, 3, 3), (8, 5, 3, 3), (24, 24), (16, 40))
SETTINGS = {"lr": 0.02, "weight_decay": 0.01}
STEPS = 5


def new_weights():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def give_gradients(weights, step):
    generator = torch.Generator().manual_seed(1 + step)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)


def train(dtype):
    """The weights after some steps, and their momentum."""
    weights = new_weights()
    optimizer = Muon(weights, SETTINGS["weight_decay"], dtype)
    for step in range(STEPS):
        give_gradients(weights, step)
        optimizer.step(SETTINGS["lr"])
    return [weight.detach() for weight in weights], [optimizer.momentum[weight] for weight in weights]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2**29])
def test_it_goes_where_torchs_goes(monkeypatch, dtype, batch):
    monkeypatch.setitem(muon.BATCH_BYTES, "cpu", batch)
    theirs = new_weights()
    matrices = [weight.detach().flatten(1) for weight in theirs]
    optimizer = torch.optim.Muon(matrices, **SETTINGS)
    for step in range(STEPS):
        give_gradients(theirs, step)
        for weight, matrix in zip(theirs, matrices, strict=True):
            matrix.grad = weight.grad.flatten(1)
        optimizer.step()
    weights, memories = train(dtype)
    for our, their, start, memory, matrix in zip(weights, theirs, new_weights(), memories, matrices, strict=True):
        moved = (their - start).norm()
        assert moved > 0.1
        assert (our - their).norm() < 0.02 * moved  # bfloat16 has 8 bits
        expected = optimizer.state[matrix]["momentum_buffer"]
        assert (memory.float() - expected).norm() < 0.01 * expected.norm()


def test_orthogonalized_singular_values_are_near_one():
    matrices = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrices))
    assert values.min() > 0.5
    assert values.max() < 1.3


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_the_ranks_share_the_products(new_denoiser, ranks):
    optimizer = Muon(new_denoiser().network.hidden_weights(), 0.0, torch.float32)
    owners = optimizer.owners(ranks)
    costs = [group.cost for group in optimizer.groups for _ in group.matrices]
    shares = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(ranks)]
    assert owners == sorted(owners)
    assert sum(shares) == sum(costs)
    assert max(shares) <= sum(costs) / ranks + max(costs)


def one_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {dtype: train(dtype) for dtype in (torch.float32, torch.bfloat16)}
    found["mixed"] = train(torch.bfloat16 if rank else torch.float32)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_do_what_one_does_and_agree_where_one_has_no_bfloat16(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], env=environment) for rank in range(2)
    ]
    assert [process.wait(timeout=240) for process in ranks] == [0, 0]
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for dtype in (torch.float32, torch.bfloat16):
        for one, first, second in zip(train(dtype), found[0][dtype], found[1][dtype], strict=True):
            for alone, here, there in zip(one, first, second, strict=True):
                assert torch.equal(here, there)
                torch.testing.assert_close(here, alone, rtol=1e-2, atol=1e-3)
    wide, _ = found[0][torch.float32]
    for mixed, _ in (found[0]["mixed"], found[1]["mixed"]):
        assert all(torch.equal(one, other) for one, other in zip(mixed, wide, strict=True))


@pytest.mark.parametrize("there", [True, False])
def test_a_cpu_without_bfloat16_orthogonalizes_in_float32(new_denoiser, monkeypatch, there):
    monkeypatch.setattr("animediffusion.models.training.loop.has_bfloat16", lambda _device: there)
    state = TrainState(new_denoiser(), OptimizerConfig(muon_learning_rate=0.02), 5)
    assert state.muon.dtype == (torch.bfloat16 if there else torch.float32)


if __name__ == "__main__":
    one_rank(int(sys.argv[1]), sys.argv[2])
