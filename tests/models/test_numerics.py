import pytest
import torch

from animediffusion.models.numerics import choose_numerics


@pytest.fixture
def switches():
    """The process's settings, put back after the test."""
    before = [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark]

    def read():
        return [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark]

    yield read
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before


def test_a_gpu_gets_tf32_and_measured_convolutions_unless_exact_numbers_are_wanted(switches):
    assert choose_numerics(torch.device("cuda", 0)) == "tf32"
    assert switches() == [True, True, True]
    assert choose_numerics(torch.device("cuda", 0), exact=True) == "float32"
    assert switches() == [False, False, False]


def test_a_cpu_keeps_its_settings(switches):
    before = switches()
    assert choose_numerics(torch.device("cpu")) == "float32"
    assert switches() == before
