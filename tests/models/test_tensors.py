import pytest
import torch

from animediffusion.models.tensors import to_tensor, to_uint8


def test_every_gray_level_survives_the_way_to_tensors_and_back():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(2, 16, 16, 3)
    tensors = to_tensor(images)
    assert (tensors.shape, float(tensors.min()), float(tensors.max())) == ((2, 3, 16, 16), -1, 1)
    assert torch.equal(to_uint8(tensors), images)


def test_gray_images_get_one_channel_and_values_outside_are_cut():
    assert to_tensor(torch.zeros(2, 4, 4, dtype=torch.uint8)).shape == (2, 1, 4, 4)
    assert to_uint8(torch.tensor([-3.0, 0.0, 3.0]).reshape(1, 3, 1, 1)).flatten().tolist() == [0, 128, 255]


def test_floats_as_8_bit_images_raise_type_error():
    with pytest.raises(TypeError, match="uint8"):
        to_tensor(torch.zeros(1, 4, 4, 3))
