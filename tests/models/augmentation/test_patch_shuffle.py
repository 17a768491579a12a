import pytest
import torch

from animediffusion.models.augmentation.patch_shuffle import CELLS, SIDES, patch_order, shuffle


def keys(rows, seed=0):
    return torch.rand(rows, CELLS**2, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("side", SIDES)
def test_the_patches_of_an_image_change_places_and_stay_whole(side):
    image = torch.arange(3 * 32 * 32.0).reshape(1, 3, 32, 32)
    mixed = shuffle(image, patch_order(torch.tensor([side]), keys(1)))
    size = 32 // side

    def patches(picture):
        return {
            tuple(p.flatten().tolist())
            for p in picture[0].unfold(1, size, size).unfold(2, size, size).permute(1, 2, 0, 3, 4).flatten(0, 1)
        }

    assert patches(mixed) == patches(image)
    assert len(patches(image)) == side**2
    assert not torch.equal(mixed, image)


def test_sorted_keys_leave_everything_in_place():
    order = patch_order(torch.tensor(SIDES), torch.linspace(0, 1, CELLS**2).expand(len(SIDES), -1))
    assert torch.equal(order, torch.arange(CELLS**2).expand(len(SIDES), -1))


def test_every_order_of_four_patches_comes_up():
    orders = patch_order(torch.full((500,), 2), keys(500))
    assert len({tuple(order.tolist()) for order in orders}) == 24


def test_an_image_that_does_not_divide_raises_value_error():
    with pytest.raises(ValueError, match="multiple of 8"):
        shuffle(torch.zeros(1, 3, 20, 20), patch_order(torch.tensor([2]), keys(1)))
