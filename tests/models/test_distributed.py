"""A step on two processes against the same step on one. Run as a script, this file is one of the two."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from animediffusion.models.augmentation.augment import Batch
from animediffusion.models.bundle import SamplerDefaults
from animediffusion.models.diffusion.denoiser import Denoiser
from animediffusion.models.diffusion.path import PathConfig
from animediffusion.models.network.unet import UNetConfig
from animediffusion.models.training.loop import step_generator
from animediffusion.models.training.objective import DenoisingConfig, ObjectiveConfig

PHASES = ("denoising", "reconstruction")
SIZE, STEP, SEED = 16, 5, 1


def new_objective(phase):
    network = UNetConfig(
        base_channels=32,
        channel_multipliers=(1,),
        num_res_blocks=1,
        patch_size=2,
        attention_levels=(0,),
        head_channels=32,
        reference_channels=32,
        detail_channels=4,
    )
    torch.manual_seed(0)
    config = ObjectiveConfig(name=phase, denoising=DenoisingConfig(drop_reference=0.3))
    return config.build(Denoiser(network, PathConfig()), SamplerDefaults(steps=3), SEED)


def half(rank):
    """The rows of one rank."""
    generator = torch.Generator().manual_seed(100 + rank)
    return Batch(*(torch.rand(2, channels, SIZE, SIZE, generator=generator) * 2 - 1 for channels in (3, 1, 3)))


def gradients(objective, rank):
    objective.zero_grad()
    objective(half(rank), step_generator(SEED, STEP, rank), STEP).total.backward()
    return {name.removeprefix("module."): p.grad.clone() for name, p in objective.named_parameters()}


def one_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for phase in PHASES:
        objective = torch.nn.parallel.DistributedDataParallel(new_objective(phase))
        torch.save(gradients(objective, rank), Path(folder) / f"{phase}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_average_the_gradients_of_one_in_both_phases(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], env=environment) for rank in range(2)
    ]
    assert [process.wait(timeout=240) for process in ranks] == [0, 0]
    for phase in PHASES:
        on_ranks = [torch.load(tmp_path / f"{phase}-{rank}.pt") for rank in range(2)]
        objective = new_objective(phase)
        halves = [gradients(objective, rank) for rank in range(2)]
        assert on_ranks[0].keys() == on_ranks[1].keys() == halves[0].keys()
        for name in halves[0]:
            assert torch.equal(on_ranks[0][name], on_ranks[1][name]), name
            expected = (halves[0][name] + halves[1][name]) / 2
            torch.testing.assert_close(on_ranks[0][name], expected, rtol=1e-4, atol=1e-7)
        apart = [name for name in halves[0] if not torch.allclose(halves[0][name], halves[1][name])]
        assert len(apart) > 10  # the ranks did see different rows and noise


if __name__ == "__main__":
    one_rank(int(sys.argv[1]), sys.argv[2])
