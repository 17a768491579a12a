import json
import os
import re
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from head import Head

from animediffusion.cli.app import run
from animediffusion.platform.cluster import jobs
from animediffusion.platform.errors import ClusterError, ConfigError

pytestmark = pytest.mark.ray


@pytest.fixture
def cluster(cluster_head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", cluster_head.address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", cluster_head.token)


@dataclass(frozen=True)
class Job:
    """A job that has ended: `doctor --json`, with the code sent along and secrets in the variables of the sender."""

    name: str
    words: str
    code: int
    log: str
    secrets: tuple[str, ...]


@pytest.fixture(scope="module")
def job(cluster_head: Head, tmp_path_factory: pytest.TempPathFactory) -> Job:
    planted = {"AWS_SECRET_ACCESS_KEY": "planted-s3", "ANIMEDIFFUSION_API_KEY": "planted-key"}
    log: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        address = {"RAY_API_SERVER_ADDRESS": cluster_head.address, "RAY_AUTH_TOKEN": cluster_head.token}
        for name, value in {**address, **planted}.items():
            patch.setenv(name, value)
        probe = str(tmp_path_factory.mktemp("probe"))
        words = ["doctor", "--storage", probe, "--json"]
        name = jobs.submit(words, with_code=True)
        code = jobs.follow(name, log.append)
    return Job(name, " ".join(words), code, "".join(log), (*planted.values(), cluster_head.token))


def test_a_job_hands_over_its_log_and_its_exit_code(cluster: None, job: Job) -> None:
    assert job.code == 0
    assert jobs.logs(job.name) == job.log
    found = jobs.status(job.name)
    assert (found.status, found.exit_code, found.entrypoint.endswith(f"-m animediffusion {job.words}")) == (
        "succeeded", 0, True
    )  # fmt: skip
    assert job.name in [item.id for item in jobs.jobs()]
    assert not jobs.stop(job.name)


def test_doctor_as_a_job_asks_every_node(cluster_head: Head, job: Job) -> None:
    # Its log also has stderr, where Ray may write later.
    report = json.loads([line for line in job.log.splitlines() if line.startswith("{")][-1])
    checks = {one["name"]: one for one in report["checks"]}
    assert [name for name, check in checks.items() if not check["ok"]] == []
    assert checks.keys() >= {"nodes", "devices", "node store", "node mlflow", "ray auth", "ray ports"}
    assert re.match(r"1 answer; all with python 3.*torch 2.*ray 2", checks["nodes"]["detail"])
    assert "attention" in checks["devices"]["detail"]
    assert "written and read by 1 nodes" in checks["node store"]["detail"]
    assert "rejects requests without a token" in checks["ray auth"]["detail"]
    assert f":{urlsplit(cluster_head.address).port}," not in checks["ray ports"]["detail"] + ","


def test_the_code_that_is_sent_along_runs_and_nothing_is_installed(cluster: None, cluster_head: Head, job: Job) -> None:
    assert re.search(r"animediffusion \S+ at \S+/runtime_resources/py_modules_files/", job.log)
    details = json.loads(cluster_head.get(f"/api/jobs/{job.name}"))
    assert set(details["runtime_env"]) - {"_ray_commit", "env_vars"} == {"py_modules"}
    [resources] = [
        path for path in cluster_head.folder.glob("session_*/runtime_resources") if not path.parent.is_symlink()
    ]
    assert any(resources.glob("py_modules_files/*/animediffusion/models/network/unet.py"))
    assert [path for tool in ("pip", "uv", "conda") for path in resources.glob(f"{tool}/*")] == []


def test_no_secret_travels_with_a_job(cluster: None, cluster_head: Head, job: Job) -> None:
    shown = cluster_head.get("/api/jobs/") + jobs.logs(job.name) + str(jobs.status(job.name))
    assert job.name in shown
    assert [secret for secret in job.secrets if secret in shown] == []


def test_a_job_with_wrong_usage_ends_with_2_without_the_code_sent_along(cluster: None) -> None:
    log: list[str] = []
    assert jobs.follow(jobs.submit(["data", "show", "/nowhere/at all"]), log.append) == 2
    assert "error: /nowhere/at all" in "".join(log)


def test_a_killed_job_resumes_when_it_is_submitted_again_and_is_followed_to_its_result(
    cluster: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    faces = tmp_path / "faces"
    verb = ["data", "synthesize", str(faces), "--count", "100", "--size", "64", "--json"]
    job = jobs.submit(verb)
    while not (first := sorted(faces.rglob("*.png"))):
        assert jobs.status(job).status in ("pending", "running")
        time.sleep(0.1)
    drawn = first[0].stat().st_mtime_ns
    [driver] = [one for one in psutil.process_iter() if is_driver(one, str(faces))]
    driver.kill()
    assert jobs.follow(job, lambda _: None) == 128 + 9

    assert run(["jobs", "submit", "--wait", "--", *verb]) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-2])["rows"] == 100
    assert first[0].stat().st_mtime_ns == drawn


def is_driver(process: psutil.Process, workspace: str) -> bool:
    with suppress(psutil.Error):
        words = process.cmdline()
        return "animediffusion" in words and workspace in words and "python" in words[0]
    return False


def test_a_stopped_job_counts_as_interrupted(cluster: None, tmp_path: Path) -> None:
    log: list[str] = []
    job = jobs.submit(["data", "synthesize", str(tmp_path / "faces"), "--count", "1000000"])
    while jobs.status(job).status == "pending":
        time.sleep(0.2)
    assert jobs.stop(job)
    assert jobs.follow(job, log.append) == 130


def test_an_unknown_job_is_named(cluster: None) -> None:
    for question in (jobs.status, jobs.logs, jobs.stop):
        with pytest.raises(ClusterError, match="job nobody: no such job; see `animediffusion jobs list`"):
            question("nobody")


def test_the_jobs_api_of_this_machine_is_asked_although_ray_address_is_that_of_another_cluster(
    cluster: None, cluster_head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    monkeypatch.setattr(jobs, "DEFAULT_ADDRESS", cluster_head.address)
    with pytest.raises(ClusterError, match="job nobody: no such job"):
        jobs.status("nobody")
    assert "RAY_API_SERVER_ADDRESS" not in os.environ


@pytest.mark.parametrize("token", ["", "wrong"])
def test_a_wrong_token_is_said_so(cluster: None, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    with pytest.raises(ClusterError, match="rejects the token; set RAY_AUTH_TOKEN"):
        jobs.jobs()


def test_an_unreachable_cluster_is_named_immediately(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    with pytest.raises(ClusterError, match=r"Ray jobs at http://127.0.0.1:9: does not answer"):
        jobs.jobs()


@pytest.mark.parametrize("token", ["", "wrong"])
def test_a_wrong_token_is_one_line_on_the_command_line(
    cluster: None, token: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    assert run(["jobs", "submit", "--", "doctor"]) == 2
    assert re.fullmatch(r"error: Ray jobs at \S+: rejects the token; set RAY_AUTH_TOKEN .*\n", capsys.readouterr().err)


def test_behind_a_tunnel_the_clusters_own_python_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/not/on/the cluster/python")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
    done = subprocess.run(["sh", "-c", f"echo {jobs.cluster_python()}"], capture_output=True, text=True, check=True)
    assert done.stdout == "python\n"


def test_a_job_needs_a_command() -> None:
    with pytest.raises(ConfigError, match="no command"):
        jobs.submit([])


def test_an_http_ray_address_is_the_jobs_api(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "https://ray.example/")
    assert jobs.api_address() == "https://ray.example"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert jobs.api_address() == "http://127.0.0.1:8265"
