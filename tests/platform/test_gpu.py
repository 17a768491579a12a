"""NVML answers as on a machine with GPUs: its functions are replaced, what reads them is not."""

import re
import time
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest

from animediffusion.cli import doctor as doctor_command
from animediffusion.platform.config import Settings
from animediffusion.platform.gpu import Driver, driver, why_unused
from animediffusion.platform.tracking import tracking
from animediffusion.platform.tracking.tracking import TRAINING, Run

OLD = Driver("535.104.05", (12, 2), ("Tesla T4", "Tesla T4"))


@pytest.fixture
def old_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    answers = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlDeviceGetCount": 2,
        "nvmlDeviceGetHandleByIndex": object(),
        "nvmlDeviceGetName": "Tesla T4",
        "nvmlSystemGetDriverVersion": "535.104.05",
        "nvmlSystemGetCudaDriverVersion_v2": 12020,
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=4e9, total=16e9),
        "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=87),
        "nvmlDeviceGetPowerUsage": 60_000,
        "nvmlDeviceGetEnforcedPowerLimit": 70_000,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, lambda *_, answer=answer: answer)


def test_a_driver_says_its_version_and_its_gpus(old_driver: None) -> None:
    assert driver() == OLD


def test_a_machine_without_a_driver_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    assert driver() is None
    assert why_unused("2.13.0+cu130", "13.0") is None


@pytest.mark.parametrize(
    ("version", "cuda", "said"),
    [
        ("2.13.0+cu130", "13.0", "the driver 535.104.05 runs CUDA 12.2 and is too old for 13.0; install driver 580"),
        ("2.13.0+cpu", None, "it is built without CUDA; install with -c constraints.txt -c constraints-gpu.txt"),
        ("2.10.0+cu128", "12.8", "though driver 535.104.05 runs CUDA 12.2"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_named_with_the_reason(
    old_driver: None, version: str, cuda: str | None, said: str
) -> None:
    reason = why_unused(version, cuda)
    assert reason is not None
    assert reason.startswith(f"torch {version} cannot use 2 x Tesla T4")
    assert re.search(said, reason)


def test_hidden_gpus_are_nobodys_fault(old_driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert why_unused("2.13.0+cu130", "13.0") is None


def test_doctor_fails_where_torch_cannot_use_the_gpu(old_driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    check = doctor_command.check_torch()
    assert not check.ok
    assert "driver 535.104.05 runs CUDA 12.2 and is too old for 13.0" in check.detail


def test_a_run_records_every_gpu(old_driver: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    settings = Settings.from_environment(workspace=tmp_path)
    started = Run.start(settings, TRAINING, "r")
    run = Run.attach(started.tracking_uri, started.run_id, system_metrics=True)
    time.sleep(1.5)
    run.finish()
    stored = tracking.setup(settings).get_run(run.run_id).data.metrics
    assert {stored[f"system/gpu_{index}_utilization_percentage"] for index in (0, 1)} == {87}
    assert stored["system/gpu_1_memory_usage_percentage"] == 25
