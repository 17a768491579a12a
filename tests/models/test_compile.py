import pytest
import torch

from animediffusion.models.compile import compiled, plain_copy

ROWS = 2


def outputs(denoiser, batch):
    condition = denoiser.encode(batch.sketch, batch.reference, torch.tensor([True, False]))
    return denoiser(batch.target, torch.full((ROWS,), 0.5), condition) + condition.guess.mean()


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_images_and_gradients(new_denoiser, new_batch):
    batch, plain, fast = new_batch(ROWS), new_denoiser(), compiled(new_denoiser(), backend="aot_eager")
    expected, found = outputs(plain, batch), outputs(fast, batch)
    torch.testing.assert_close(found, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for loss in (expected.square().mean(), found.square().mean()):
        loss.backward()
    for one, other in zip(plain.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-7)


def test_a_copy_of_a_compiled_network_uses_its_own_weights(new_denoiser, new_batch):
    batch, fast = new_batch(ROWS), compiled(new_denoiser(), backend="eager")
    before = outputs(fast, batch).detach()
    copy = plain_copy(fast)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.mul_(0.5)
    torch.testing.assert_close(outputs(fast, batch), before)
    assert not torch.allclose(outputs(copy, batch), before)


def test_a_machine_without_a_compiler_is_named_in_one_line(new_denoiser):
    def broken(*_):
        raise RuntimeError("g++ was not found\nand more lines")

    denoiser = new_denoiser()
    with pytest.raises(ValueError, match=r"^compile on cpu: no compiler works .*install a C\+\+ compiler") as caught:
        compiled(denoiser, backend=broken)
    assert "\n" not in str(caught.value)
    assert not denoiser.network.__dict__.keys() & {"encode", "denoise"}
