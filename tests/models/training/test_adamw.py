"""Our AdamW against torch's."""

import torch

from animediffusion.models.training.adamw import AdamW

SHAPES = ((24, 24), (8, 5, 3, 3), (7,))
BETAS, WEIGHT_DECAY = (0.9, 0.99), 0.02
RATES = (0.0, 1e-3, 5e-3, 2e-3)


def new_weights():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    weights[1].data = weights[1].data.contiguous(memory_format=torch.channels_last)
    return weights


def give_gradients(weights, step):
    """Give the last one its first gradient in the second step."""
    generator = torch.Generator().manual_seed(1 + step)
    for weight in weights[: 2 if step == 0 else 3]:
        weight.grad = torch.randn(weight.shape, generator=generator)


def test_it_goes_exactly_where_torchs_goes():
    ours, theirs = new_weights(), new_weights()
    optimizer = AdamW(ours, BETAS, WEIGHT_DECAY)
    expected = torch.optim.AdamW(theirs, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    optimizer.step(1.0)  # without gradients, nothing happens
    for step, rate in enumerate(RATES):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step(rate)
        expected.param_groups[0]["lr"] = rate
        expected.step()
    for our, their, start in zip(ours, theirs, new_weights(), strict=True):
        assert torch.equal(our, their)
        assert not torch.equal(our, start)
        state, same = optimizer.state[our], expected.state[their]
        assert set(state) == set(same)
        assert all(torch.equal(state[name], same[name]) for name in state)
        assert all(
            state[name].dtype == same[name].dtype and state[name].stride() == same[name].stride() for name in state
        )
    assert [float(optimizer.state[weight]["step"]) for weight in ours] == [4, 4, 3]
