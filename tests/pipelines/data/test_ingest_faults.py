"""Ingest when things break: the store throttles or is gone, the command or one of its workers is killed."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import ray
from faults import Fault, FaultyStore
from sources import fill, picture, without_ray
from uploads import upload_folder

from animediffusion.cli.app import run
from animediffusion.pipelines.data import ingest
from animediffusion.pipelines.data.ingest import STATE, IngestJob, prepare
from animediffusion.pipelines.data.manifest import Manifest
from animediffusion.platform.cluster import cluster
from animediffusion.platform.storage.storage import (
    PATIENCE_VARIABLE,
    exists,
    join,
    list_files,
    read_bytes,
)

pytestmark = pytest.mark.ray

SIZE = 16
PART_ROWS = 32
"""Rows of a part, fewer than the real least, so that a few pictures are several parts."""
COUNT = 2 * PART_ROWS + 20
WAIT_S = 120
COMMAND = f"""
from animediffusion.cli.app import main
from animediffusion.pipelines.data import ingest
ingest.MIN_PART_ROWS = {PART_ROWS}
main()
"""


@pytest.fixture(scope="module", autouse=True)
def _small_parts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingest, "MIN_PART_ROWS", PART_ROWS)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures for three parts of `train` and one of `val`, two of them equal."""
    place = tmp_path_factory.mktemp("source")
    files = {f"train/{number}.png": picture(number, (SIZE, SIZE)) for number in range(COUNT)}
    fill(place, files | {"val/1.png": picture(COUNT, (SIZE, SIZE)), "train/again.png": files["train/7.png"]})
    return place


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return without_ray(prepare(str(folder), str(tmp_path_factory.mktemp("undisturbed")), SIZE))


class Ends:
    """Source and destination behind the way that fails, and the same destination on the way that does not."""

    def __init__(self, url: str, name: str) -> None:
        self.source = f"s3://bucket/faulty-source?endpoint_override={url}"
        self.destination = f"s3://bucket/{name}?endpoint_override={url}"
        self.healthy = f"s3://bucket/{name}"

    def last_picture(self) -> str:
        """A file of the last part of train."""
        job = prepare("s3://bucket/faulty-source", self.healthy, SIZE)
        rows = [rows for part, rows in job.parts().items() if part.split == "train"][-1]
        return job.plan.samples.take(rows)[0].target

    def num_records(self) -> int:
        names = list_files(self.healthy) if exists(self.healthy) else []
        return sum(name.startswith((f"{STATE}/train-", f"{STATE}/val-")) for name in names)


@pytest.fixture
def ends(folder: Path, faulty_s3: tuple[str, FaultyStore], tmp_path: Path) -> Ends:
    if not exists("s3://bucket/faulty-source"):
        upload_folder(folder, "s3://bucket/faulty-source")
    return Ends(faulty_s3[0], tmp_path.name)


def words(ends: Ends) -> list[str]:
    return ["data", "ingest", ends.source, ends.destination, "--size", str(SIZE)]


@pytest.fixture
def command(ray_cluster: None) -> Iterator[Callable[[Ends], subprocess.Popen[str]]]:
    """Starts the real command in a process of its own, on the cluster of the tests."""
    started: list[subprocess.Popen[str]] = []

    def start(ends: Ends) -> subprocess.Popen[str]:
        variables = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, PATIENCE_VARIABLE: "2"}
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *words(ends)],
            env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def until(condition: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.02)


@contextmanager
def meanwhile(action: Callable[[], None]) -> Iterator[None]:
    """Do something in a thread while the block runs; what fails there fails here."""
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(action)
        yield
        done.result()


def pictures_read(store: FaultyStore) -> set[str]:
    """Requests for the content of a picture, each once."""
    return {request for request in store.requests if request.startswith("GET /bucket/faulty-source/")}


@pytest.mark.parametrize(
    ("kind", "execute"), [("slow_down", IngestJob.run), ("reset", without_ray), ("refuse", without_ray)]
)
def test_a_fault_of_the_store_changes_nothing(
    ray_cluster: None,
    kind: Fault,
    execute: Callable[..., Manifest],
    ends: Ends,
    faulty_s3: tuple[str, FaultyStore],
    undisturbed: Manifest,
) -> None:
    job = prepare(ends.source, ends.destination, SIZE)
    begun: list[int] = []
    limit = {"seconds": 2.0} if kind == "refuse" else {"requests": 20}

    def begin(done: int, *_: int) -> None:
        if not begun:
            faulty_s3[1].fail(kind, **limit)
        begun.append(done)

    manifest = execute(job, begin)

    assert kind == "refuse" or faulty_s3[1].hits[kind] == 20
    assert manifest.content_hash == undisturbed.content_hash
    assert manifest.splits == undisturbed.splits
    assert (manifest.num_files, manifest.num_rejects) == (undisturbed.num_files, 1)


def test_a_store_that_never_recovers_is_one_line_and_the_same_command_resumes(
    command: Callable[[Ends], subprocess.Popen[str]],
    ends: Ends, faulty_s3: tuple[str, FaultyStore], undisturbed: Manifest, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    faulty_s3[1].fail("stall", where=f"/{ends.last_picture()}")
    process = command(ends)
    until(lambda: faulty_s3[1].hits["stall"] > 0 and ends.num_records() >= 2, process)

    faulty_s3[1].fail("slow_down")
    _, errors = process.communicate(timeout=WAIT_S)

    assert process.returncode == 1
    lines = [line for line in errors.splitlines() if not line.startswith(("starting Ray", "ingesting "))]
    assert len(lines) == 1
    assert lines[0].startswith("error: s3://bucket/faulty-source")
    assert "run the same command again when the store is available" in lines[0]

    faulty_s3[1].heal()
    faulty_s3[1].requests.clear()
    assert run(words(ends)) == 0
    assert "continuing an earlier ingest" in capsys.readouterr().err
    assert Manifest.load(ends.healthy).content_hash == undisturbed.content_hash
    assert 0 < len(pictures_read(faulty_s3[1])) <= PART_ROWS


def test_a_killed_command_resumes_with_the_missing_parts(
    command: Callable[[Ends], subprocess.Popen[str]],
    ends: Ends, faulty_s3: tuple[str, FaultyStore], undisturbed: Manifest,
) -> None:  # fmt: skip
    last = ends.last_picture()
    faulty_s3[1].fail("stall", where=f"/{last}")
    process = command(ends)
    until(lambda: faulty_s3[1].hits["stall"] > 0 and ends.num_records() >= 2, process)

    process.send_signal(signal.SIGKILL)
    process.wait()
    faulty_s3[1].heal()
    faulty_s3[1].requests.clear()
    assert run(words(ends)) == 0

    manifest = Manifest.load(ends.healthy)
    assert manifest.content_hash == undisturbed.content_hash
    assert manifest.splits == undisturbed.splits
    assert any(last in request for request in pictures_read(faulty_s3[1]))
    assert len(pictures_read(faulty_s3[1])) <= PART_ROWS
    assert not any(STATE in name for name in list_files(ends.healthy))


def test_a_killed_worker_is_replaced(
    ray_cluster: None, ends: Ends, faulty_s3: tuple[str, FaultyStore], undisturbed: Manifest
) -> None:
    faulty_s3[1].fail("stall", where=f"/{ends.last_picture()}")
    killed: list[int] = []

    def kill() -> None:
        until(lambda: faulty_s3[1].hits["stall"] > 0 and ends.num_records() >= 2)
        killed.extend(worker.pid for worker in psutil.process_iter(["cmdline"]) if is_busy(worker))
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        faulty_s3[1].heal()

    with meanwhile(kill):
        assert run(words(ends)) == 0

    assert killed
    assert Manifest.load(ends.healthy).content_hash == undisturbed.content_hash
    assert b"duplicate" in read_bytes(join(ends.healthy, "rejects.jsonl"))


def is_busy(process: psutil.Process) -> bool:
    """Whether a process of the tests' own cluster runs a task of an ingest."""
    return "run_packed" in " ".join(process.info["cmdline"] or ()) and os.getpid() in {p.pid for p in process.parents()}


def test_an_ingest_that_has_no_room_says_what_it_waits_for_and_ends_when_there_is(
    ray_cluster: None,
    ends: Ends,
    undisturbed: Manifest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    @ray.remote(num_cpus=1.25)
    class Server:
        def ready(self) -> bool:
            return True

    server, errors = Server.remote(), []
    assert ray.get(server.ready.remote())
    monkeypatch.setattr(cluster, "WAITS_S", 1.0)
    monkeypatch.setattr(cluster, "WATCH_S", 0.5)

    def make_room() -> None:
        until(lambda: bool(errors.append(capsys.readouterr().err) or "waiting: " in "".join(errors)))
        ray.kill(server)

    with meanwhile(make_room):
        assert run(words(ends)) == 0

    [waiting] = [line for line in "".join(errors).splitlines() if line.startswith("waiting: ")]
    assert re.fullmatch(r"waiting: the cluster has no room for \d+ x \(1 CPU\); 0.75 of 2 CPU free", waiting)
    assert Manifest.load(ends.healthy).content_hash == undisturbed.content_hash
