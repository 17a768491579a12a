import json
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from head import Head, ray_head

from animediffusion.cli.app import run
from animediffusion.models.bundle import load_bundle
from animediffusion.pipelines.training.checkpoints import list_steps
from animediffusion.platform.cluster import jobs
from animediffusion.platform.errors import ClusterError, ConfigError

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head("--num-cpus=2") as there:
        yield there


@pytest.fixture
def cluster(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head.address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)


@pytest.fixture
def job(cluster: None) -> str:
    return jobs.submit(["doctor"])


def test_a_job_hands_over_its_log_and_its_exit_code(job: str) -> None:
    log: list[str] = []
    assert jobs.follow(job, log.append) == 0
    assert "python" in "".join(log)
    assert jobs.logs(job) == "".join(log)
    found = jobs.status(job)
    assert (found.status, found.exit_code, found.entrypoint.endswith("-m animediffusion doctor")) == (
        "succeeded", 0, True
    )  # fmt: skip
    assert job in [item.id for item in jobs.jobs()]
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


def test_the_code_that_is_sent_along_runs_and_nothing_is_installed(cluster: None, head: Head) -> None:
    log: list[str] = []
    job = jobs.submit(["doctor"], with_code=True)
    jobs.follow(job, log.append)
    assert re.search(r"animediffusion \S+ at \S+/runtime_resources/py_modules_files/", "".join(log))
    told = json.loads(head.get(f"/api/jobs/{job}"))
    assert set(told["runtime_env"]) - {"_ray_commit", "env_vars"} == {"py_modules"}
    [resources] = [path for path in head.folder.glob("session_*/runtime_resources") if not path.parent.is_symlink()]
    assert any(resources.glob("py_modules_files/*/animediffusion/models/network/unet.py"))
    assert [path for tool in ("pip", "uv", "conda") for path in resources.glob(f"{tool}/*")] == []


def test_no_secret_travels_with_a_job(cluster: None, head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = {"AWS_SECRET_ACCESS_KEY": "planted-s3", "ANIMEDIFFUSION_API_KEY": "planted-key"}
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    job = jobs.submit(["doctor"], with_code=True)
    jobs.follow(job, lambda _: None)
    told = head.get("/api/jobs/") + jobs.logs(job) + str(jobs.status(job))
    assert job in told
    assert [secret for secret in (*planted.values(), head.token) if secret in told] == []


def test_a_killed_job_goes_on_when_it_is_submitted_again(cluster: None, faces_dataset: str, tmp_path: Path) -> None:
    settings = ["max_steps=160", "batch_size=4", "checkpoint_every=10", "log_every=5", "num_samples=0", "name=twice"]
    verb = ["train", "demo", f"data={faces_dataset}", *settings, "--workspace", str(tmp_path), "--json"]
    job = jobs.submit(verb)
    while len(list_steps(str(tmp_path / "runs/twice/checkpoints"))) < 1:
        assert jobs.status(job).status in ("pending", "running")
        time.sleep(0.2)
    [driver] = [one for one in psutil.process_iter() if is_driver(one, str(tmp_path))]
    driver.kill()
    assert jobs.follow(job, lambda _: None) == 128 + 9
    log: list[str] = []
    assert jobs.follow(jobs.submit(verb), log.append) == 0
    assert re.search(r"resuming twice at step \d+", "".join(log))
    result = json.loads("".join(log).splitlines()[-1])
    assert result["steps"] == 160
    assert result["resumed_from"] >= 10


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


@pytest.mark.parametrize("token", ["", "wrong"])
def test_a_wrong_token_is_said_so(cluster: None, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    with pytest.raises(ClusterError, match="refuses the token; set RAY_AUTH_TOKEN"):
        jobs.jobs()


def test_a_cluster_that_is_away_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    with pytest.raises(ClusterError, match=r"Ray jobs at http://127.0.0.1:9: does not answer"):
        jobs.jobs()


@pytest.mark.parametrize("token", ["", "wrong"])
def test_a_wrong_token_is_one_line_on_the_command_line(
    cluster: None, token: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    assert run(["jobs", "submit", "--", "doctor"]) == 2
    assert re.fullmatch(r"error: Ray jobs at \S+: refuses the token; set RAY_AUTH_TOKEN .*\n", capsys.readouterr().err)


def test_behind_a_tunnel_the_clusters_own_python_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/not/on/the cluster/python")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
    told = subprocess.run(["sh", "-c", f"echo {jobs._python()}"], capture_output=True, text=True, check=True)
    assert told.stdout == "python\n"


def test_a_job_needs_a_command() -> None:
    with pytest.raises(ConfigError, match="no command"):
        jobs.submit([])


def test_an_http_ray_address_is_the_jobs_api(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "https://ray.example/")
    assert jobs.api_address() == "https://ray.example"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert jobs.api_address() == "http://127.0.0.1:8265"
