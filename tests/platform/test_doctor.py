from pathlib import Path

import pytest

from animediffusion.platform import doctor
from animediffusion.platform.cluster import cluster
from animediffusion.platform.config import Settings
from animediffusion.platform.doctor import Check
from animediffusion.platform.errors import ClusterError


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name in ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL_S3", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return Settings.from_environment(workspace=tmp_path / "workspace")


def found(settings: Settings) -> dict[str, Check]:
    return {check.name: check for check in doctor.checks(settings)}


def test_a_machine_without_any_service_is_healthy_and_left_as_it_was(settings: Settings) -> None:
    checks = found(settings)
    assert {"python", "packages", "workspace", "mlflow", "storage", "ray", "ray jobs"} <= set(checks)
    assert [check.name for check in checks.values() if not check.ok and check.name != "machine"] == []
    assert "torch 2" in checks["packages"].detail
    assert not settings.workspace.exists()


@pytest.mark.parametrize(
    ("variable", "value", "name"),
    [
        ("MLFLOW_TRACKING_URI", "http://127.0.0.1:9", "mlflow"),
        ("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9", "storage"),
        ("RAY_ADDRESS", "127.0.0.1:9", "ray"),
        ("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9", "ray jobs"),
    ],
)
def test_what_does_not_answer_is_found(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, name: str
) -> None:
    monkeypatch.setenv(variable, value)
    check = found(settings)[name]
    assert not check.ok
    assert "127.0.0.1:9" in check.detail
    assert "does not answer" in check.detail


def test_a_workspace_that_cannot_be_written_is_found(settings: Settings) -> None:
    blocked = settings.model_copy(update={"workspace": Path("/proc/workspace")})
    assert not found(blocked)["workspace"].ok


def test_a_temporary_folder_that_is_too_long_for_ray_is_found(settings: Settings, monkeypatch, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(long))
    # A process that is connected to Ray already, as other tests connect this one, starts no second Ray.
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    detail = found(settings)["ray"].detail
    assert "TMPDIR is too long by" in detail
    with pytest.raises(ClusterError, match=r"TMPDIR is too long by .* bytes for Ray's sockets; set RAY_TMPDIR=/tmp"):
        cluster.connect(settings)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert found(settings)["ray"].ok


def test_a_probe_that_raises_becomes_a_line(settings: Settings) -> None:
    def attention() -> Check:
        raise RuntimeError("no driver\nmore")

    check = doctor.checks(settings, [attention])[3]
    assert check == Check("attention", False, "RuntimeError: no driver")
    assert not doctor.report([check]).ok
