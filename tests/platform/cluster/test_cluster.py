import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2
from ray.util.placement_group import placement_group, remove_placement_group

from animediffusion.platform.cluster import cluster, ray_compat
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import ClusterError

# In a process of its own: the tests share one Ray, which was not started by connect().
EMBEDDED = """
import contextlib, json, os, sys
import psutil, ray
from animediffusion.platform.cluster import cluster
from animediffusion.platform.cluster import ray_compat
from animediffusion.platform.config import Settings

cluster.connect(Settings.from_environment(workspace=sys.argv[1]), num_cpus=2)

@ray.remote(num_cpus=0.5)
def worker():
    import platform
    return {"token": bool(os.environ.get("RAY_AUTH_TOKEN")), "workspace": os.environ["ANIMEDIFFUSION_WORKSPACE"],
            "platform": platform.system()}

found = ray.get(worker.remote())
listening, idle, quick = [], [], False
for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
    with contextlib.suppress(psutil.NoSuchProcess):
        words = process.cmdline()
        idle += [word for word in words if word.endswith(("monitor.py", "/dashboard.py"))]
        quick |= any(f" {ray_compat.SETUP_WORKER} " in word for word in words)
        listening += [c.laddr.ip for c in process.net_connections("tcp") if c.status == "LISTEN"]
cpus = ray.cluster_resources()["CPU"]
cluster.shutdown()
found |= {"listening": sorted(set(listening)), "cpus": cpus, "idle": idle, "quick": quick}
found["again"] = ray.is_initialized()
print(json.dumps(found))
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
        "token": True, "workspace": str(workspace), "platform": "Linux", "cpus": 2.0, "idle": [], "quick": True,
        "again": False,
    }  # fmt: skip
    assert not (home / ".ray").exists()


def test_an_address_that_does_not_answer_is_named_immediately(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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


@pytest.fixture
def busy(ray_cluster):
    """An actor that holds 1.25 of the two CPUs."""

    @ray.remote(num_cpus=1.25)
    class Server:
        def ready(self) -> bool:
            return True

    server = Server.remote()
    assert ray.get(server.ready.remote())
    yield server
    ray.kill(server)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "WAITS_S", 0.5)
    monkeypatch.setattr(cluster, "WATCH_S", 1.0)


def test_what_waits_for_room_says_for_which_resources_and_how_much_is_free(busy, impatient) -> None:
    @ray.remote(num_cpus=1)
    def work() -> int:
        return 1

    lines: list[str] = []
    with cluster.waits(lines.append):
        task = work.remote()
        group = placement_group([{"CPU": 0.5}] * 2)
        deadline = time.monotonic() + 60
        while not lines and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not ray.wait([task], timeout=0)[0]
    wanted = "waiting: the cluster has no room for 2 x (0.5 CPU) and 1 x (1 CPU); 0.75 of 2 CPU free"
    assert lines == [wanted]
    remove_placement_group(group)
    ray.kill(busy)
    assert ray.get(task, timeout=60) == 1


def test_nothing_is_said_while_work_moves_or_nothing_waits(ray_cluster, impatient) -> None:
    lines: list[str] = []
    with cluster.waits(lines.append):
        time.sleep(2 * cluster.WATCH_S)
    assert lines == []


@pytest.mark.ray
def test_an_autoscaler_adds_to_the_most_that_a_cluster_can_have(busy) -> None:
    """As an autoscaler with a group of nodes would report it to the cluster's control store."""
    has, most = cluster.resources()
    assert has["CPU"] == most["CPU"] == 2
    group = autoscaler_pb2.NodeGroupConfig(name="gpu", max_count=3, resources={"CPU": 8, "GPU": 1})
    store = GcsClient(address=ray.get_runtime_context().gcs_address)
    waiting = placement_group([{"GPU": 1}] * 2)
    try:
        store.report_cluster_config(autoscaler_pb2.ClusterConfig(node_group_configs=[group]).SerializeToString())
        has, most = cluster.resources()
        assert (has.get("GPU"), most["GPU"], most["CPU"]) == (None, 3, 24)
        deadline = time.monotonic() + 30
        while not (line := cluster.no_room()) and time.monotonic() < deadline:
            time.sleep(0.2)
        wanted = "waiting: the cluster has no room for 2 x (1 GPU); 0 of 0 GPU free (an autoscaler can make it 3)"
        assert line == wanted
    finally:
        store.report_cluster_config(autoscaler_pb2.ClusterConfig().SerializeToString())
        remove_placement_group(waiting)
    assert cluster.resources()[1]["CPU"] == 2


@pytest.mark.ray
def test_an_actor_is_alive_until_it_is_killed(busy) -> None:
    actor = busy._actor_id.hex()
    assert ray_compat.is_alive(actor)
    ray.kill(busy)
    deadline = time.monotonic() + 30
    while ray_compat.is_alive(actor) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not ray_compat.is_alive(actor)
    assert not ray_compat.is_alive("f" * len(actor))
