import pytest
import torch

from animediffusion.models.bfloat16 import Float32Muon, orthogonalize
from animediffusion.models.training import OptimizerConfig, TrainState

COEFFICIENTS = (3.4445, -4.775, 2.0315)


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_muon_in_float32_goes_where_torchs_goes(shape):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    values = {"lr": 0.02, "weight_decay": 0.01}
    pairs = [(ours, Float32Muon([ours], **values)), (theirs, torch.optim.Muon([theirs], **values))]
    for _ in range(5):
        gradient = torch.randn(shape, generator=generator)
        for parameter, optimizer in pairs:
            parameter.grad = gradient.clone()
            optimizer.step()
    moved = (theirs - start).norm()
    assert moved > 0.1
    assert (ours - theirs).norm() < 0.02 * moved  # bfloat16 has 8 bits
    memory = [optimizer.state[parameter]["momentum_buffer"] for parameter, optimizer in pairs]
    assert torch.equal(*memory)


def test_orthogonalized_singular_values_are_near_one():
    matrix = torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrix, COEFFICIENTS, 5, 1e-7))
    assert values.min() > 0.5
    assert values.max() < 1.3


@pytest.mark.parametrize("there", [True, False])
def test_a_cpu_without_bfloat16_trains_in_float32(new_denoiser, monkeypatch, there):
    monkeypatch.setattr("animediffusion.models.training.has_bfloat16", lambda _device: there)
    state = TrainState(new_denoiser(), OptimizerConfig(muon_learning_rate=0.02), 5)
    assert isinstance(state.muon, Float32Muon) is not there
