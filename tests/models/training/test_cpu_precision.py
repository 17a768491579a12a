import pytest
import torch

from animediffusion.models.training.cpu_precision import has_bfloat16


@pytest.mark.parametrize(("capability", "there"), [((7, 5), False), ((8, 0), True), ((8, 9), True), ((12, 0), True)])
def test_a_gpu_has_bfloat16_from_ampere_on(monkeypatch, capability, there):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    assert has_bfloat16(torch.device("cuda")) is there


def test_a_cpu_has_bfloat16_where_onednn_has_kernels_for_it():
    kernels = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert has_bfloat16(torch.device("cpu")) is kernels
