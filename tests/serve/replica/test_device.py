import asyncio
import time
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import ray
import torch
from ray import serve

from animediffusion.models.sampler_options import SamplerOptions
from animediffusion.platform.errors import ConfigError, UnavailableError
from animediffusion.serve import deployments
from animediffusion.serve.deployments import EngineDeployment, ServeConfig
from animediffusion.serve.protocol import ColorizeJob
from animediffusion.serve.replica.device import precision_on, usable_device


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_a_gpu_a_cpu_is_used(no_gpu):
    assert usable_device(must_be_gpu=False) == "cpu"


def test_a_gpu_is_used_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert usable_device(must_be_gpu=True) == usable_device(must_be_gpu=False) == "cuda"


def test_a_reserved_gpu_that_torch_cannot_use_raises_config_error_with_the_reason(no_gpu, monkeypatch):
    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12040).\nUpdate it at ...")

    monkeypatch.setattr(torch.cuda, "init", too_old)
    with pytest.raises(ConfigError, match=r"too old \(found version 12040\)") as refusal:
        usable_device(must_be_gpu=True)
    assert "\n" not in str(refusal.value)


def test_a_torch_for_cpus_on_a_gpu_node_raises_config_error(no_gpu):
    if torch.version.cuda is None:
        with pytest.raises(ConfigError, match="Torch not compiled with CUDA"):
            usable_device(must_be_gpu=True)


@pytest.mark.parametrize(
    ("device", "capability", "asked", "expected"),
    [
        ("cuda", (9, 0), "auto", "bfloat16"),
        ("cuda", (8, 0), "auto", "bfloat16"),
        ("cuda", (7, 5), "auto", "float32"),
        ("cuda", (9, 0), "float32", "float32"),
        ("cuda", (7, 5), "bfloat16", "bfloat16"),
        ("cpu", None, "auto", "float32"),
        ("cpu", None, "bfloat16", "bfloat16"),
    ],
)
def test_bfloat16_is_the_default_where_a_gpu_has_it(monkeypatch, device, capability, asked, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device=None: capability)
    assert precision_on(torch.device(device), asked) == expected


@pytest.fixture
def new_engine(monkeypatch, tmp_path, bundle_folder):
    """A function that starts an engine's deployment in this process, with these GPUs reserved for it."""
    engines = []

    def start(*reserved: str, **options) -> EngineDeployment:
        context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="one"))
        accelerators = SimpleNamespace(get_accelerator_ids=lambda: {"GPU": list(reserved)})
        monkeypatch.setattr(serve, "get_replica_context", lambda: context)
        monkeypatch.setattr(ray, "get_runtime_context", lambda: accelerators)
        monkeypatch.setattr(deployments, "Exporter", Mock())  # Ray's metrics need a replica
        config = ServeConfig(model=str(bundle_folder), workspace=tmp_path, **options)
        engines.append(EngineDeployment(config))
        return engines[-1]

    threads = torch.get_num_threads()
    yield start
    torch.set_num_threads(threads)
    for engine in engines:
        engine.__del__()


def test_an_engine_with_a_reserved_gpu_does_not_start_on_a_cpu(new_engine, no_gpu):
    with pytest.raises(ConfigError, match="reserved for this engine"):
        new_engine("0")
    with pytest.raises(ConfigError, match="reserved for this engine"):
        new_engine("0", engine_gpus=0.5)


def test_an_engine_without_a_gpu_runs_on_a_cpu_in_float32(new_engine, no_gpu):
    for options in ({}, {"engine_gpus": 0}):
        replica = new_engine(**options).replica
        assert (replica.device, replica.precision) == ("cpu", "float32")


def test_a_request_waits_a_moment_at_an_engine_whose_device_has_failed(new_engine, no_gpu, monkeypatch):
    async def ask(engine: EngineDeployment) -> float:
        begun = time.monotonic()
        with pytest.raises(UnavailableError):
            await engine.colorize(
                ColorizeJob(
                    lines=np.zeros((8, 8), np.uint8),
                    references=(np.zeros((8, 8, 3), np.uint8),),
                    options=SamplerOptions(),
                )
            )
        with pytest.raises(RuntimeError, match="misaligned address"):
            await engine.check_health()
        return time.monotonic() - begun

    def fail(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: misaligned address")

    monkeypatch.setattr(deployments, "LOADING_PATIENCE_S", 0.5)
    engine = new_engine()
    monkeypatch.setattr(engine.replica.loaded[engine.replica.version].engine.bundle.denoiser.network, "denoise", fail)
    asyncio.run(ask(engine))
    assert asyncio.run(ask(engine)) >= 0.5
