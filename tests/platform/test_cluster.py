import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from animediffusion.platform import cluster
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import ClusterError

# In a process of its own: the tests share one Ray, which was not started by connect().
EMBEDDED = """
import contextlib, json, os, sys
import psutil, ray
from animediffusion.platform import cluster
from animediffusion.platform.config import Settings

cluster.connect(Settings.from_environment(workspace=sys.argv[1]), num_cpus=2)

@ray.remote(num_cpus=0.5)
def worker():
    import platform
    return {"token": bool(os.environ.get("RAY_AUTH_TOKEN")), "workspace": os.environ["ANIMEDIFFUSION_WORKSPACE"],
            "platform": platform.system()}

found = ray.get(worker.remote())
listening = []
for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
    with contextlib.suppress(psutil.NoSuchProcess):
        listening += [c.laddr.ip for c in process.net_connections("tcp") if c.status == "LISTEN"]
cpus = ray.cluster_resources()["CPU"]
cluster.shutdown()
print(json.dumps({**found, "listening": sorted(set(listening)), "cpus": cpus, "again": ray.is_initialized()}))
"""


@pytest.mark.ray
def test_the_embedded_cluster_is_private_quiet_and_leaves_nothing_in_the_home(tmp_path: Path) -> None:
    home, workspace = tmp_path / "home", tmp_path / "workspace"
    home.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", EMBEDDED, str(workspace)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert {ip.removeprefix("::ffff:") for ip in found.pop("listening")} <= {"127.0.0.1", "::1"}
    assert found == {
        "token": True, "workspace": str(workspace), "platform": "Linux", "cpus": 2.0, "again": False
    }  # fmt: skip
    assert not (home / ".ray").exists()


def test_an_address_nobody_answers_at_is_named_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(ClusterError, match=r"Ray at 127.0.0.1:9: does not answer .*; check RAY_ADDRESS"):
        cluster.connect(Settings.from_environment(workspace=tmp_path))


@pytest.mark.parametrize(
    ("value", "address"),
    [("", None), ("local", None), ("http://127.0.0.1:8265", None), ("auto", "auto"), ("ray:6379", "ray:6379")],
)
def test_only_a_cluster_address_is_joined(value: str, address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", value)
    assert cluster.cluster_address() == address


@pytest.mark.parametrize(
    ("address", "mlflow", "own"),
    [
        ("ray:6379", "https://mlflow.example", True),
        ("ray:6379", "sqlite:////shared/mlflow.db", False),
        ("ray:6379", "", False),
        ("", "https://mlflow.example", False),
    ],
)
def test_nodes_have_their_own_workspaces_where_all_that_they_share_is_on_servers(
    address: str, mlflow: str, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow)
    assert cluster.own_workspaces() is own
