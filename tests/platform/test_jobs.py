import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from animediffusion.cli import run
from animediffusion.models.bundle import load_bundle
from animediffusion.platform import jobs
from animediffusion.platform.errors import ClusterError, ConfigError

pytestmark = pytest.mark.ray


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A real `ray start --head` on loopback that asks for a token: (address of its jobs API, token)."""
    token, port = secrets.token_hex(16), free_port()
    # Ray's sockets live below this folder, and their paths may not be long.
    folder = Path(f"/tmp/ray-{os.getpid()}")
    log = tmp_path_factory.mktemp("ray") / "log"
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2", "--port=0"]
    command += ["--include-dashboard=true", f"--dashboard-port={port}", f"--temp-dir={folder}"]
    command += [f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}"]
    command += ["--object-store-memory=100000000", "--disable-usage-stats"]
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # all on loopback, as in platform/cluster.py
    with open(log, "w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{address}/api/version", token, log)
        yield address, token
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=15)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
            shutil.rmtree(folder, ignore_errors=True)


def wait_for(url: str, token: str, log: Path) -> None:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    for _ in range(300):
        try:
            urllib.request.urlopen(request, timeout=2).close()
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(log.read_text())


@pytest.fixture
def cluster(head: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head[0])
    monkeypatch.setenv("RAY_AUTH_TOKEN", head[1])


@pytest.fixture
def job(cluster: None) -> str:
    return jobs.submit(["doctor"])


def test_a_job_hands_over_its_log_and_its_exit_code(job: str) -> None:
    log: list[str] = []
    assert jobs.follow(job, log.append) == 0
    assert "python" in "".join(log)
    assert jobs.logs(job) == "".join(log)
    found = jobs.status(job)
    assert (found["status"], found["exit_code"], found["entrypoint"].endswith("-m animediffusion doctor")) == (
        "succeeded", 0, True
    )  # fmt: skip
    assert job in [item["id"] for item in jobs.jobs()]
    assert not jobs.stop(job)


def test_a_training_job_is_followed_to_its_bundle(
    cluster: None, faces_dataset: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train = ["train", "demo", f"data={faces_dataset}", "max_steps=20", "batch_size=4", "name=job", "num_samples=0"]
    assert run(["jobs", "submit", "--wait", "--", *train, "--workspace", str(tmp_path), "--json"]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-2])
    assert result["steps"] == 20
    assert load_bundle(result["bundle"]).config.image_size == 32


def test_a_job_with_wrong_usage_ends_with_2_even_with_the_code_sent_along(cluster: None) -> None:
    log: list[str] = []
    job = jobs.submit(["data", "show", "/nowhere/at all"], with_code=True)
    assert jobs.follow(job, log.append) == 2
    assert "error: /nowhere/at all" in "".join(log)


def test_a_stopped_job_counts_as_interrupted(cluster: None, tmp_path: Path) -> None:
    log: list[str] = []
    job = jobs.submit(["data", "synthesize", str(tmp_path / "faces"), "--count", "1000000"])
    while jobs.status(job)["status"] == "pending":
        time.sleep(0.2)
    assert jobs.stop(job)
    assert jobs.follow(job, log.append) == 130


def test_an_unknown_job_is_named(cluster: None) -> None:
    for question in (jobs.status, jobs.logs, jobs.stop):
        with pytest.raises(ClusterError, match="job nobody: no such job; see `animediffusion jobs list`"):
            question("nobody")


@pytest.mark.parametrize("token", ["", "wrong"])
def test_a_wrong_token_is_said_so(cluster: None, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    with pytest.raises(ClusterError, match="refuses the token; set RAY_AUTH_TOKEN"):
        jobs.jobs()


def test_a_cluster_that_is_away_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    with pytest.raises(ClusterError, match=r"Ray jobs at http://127.0.0.1:9: does not answer"):
        jobs.jobs()


def test_a_job_needs_a_verb() -> None:
    with pytest.raises(ConfigError, match="no verb"):
        jobs.submit([])


def test_an_http_ray_address_is_the_jobs_api(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "https://ray.example/")
    assert jobs.api_address() == "https://ray.example"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert jobs.api_address() == "http://127.0.0.1:8265"
