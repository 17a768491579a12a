"""A real `ray start --head` on loopback that asks for a token: for tests of what a cluster does."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ports import free_port


@dataclass(frozen=True)
class Head:
    """Where it is."""

    address: str
    """URL of the dashboard, which has the jobs API."""
    token: str
    gcs: str
    """Address for other nodes."""
    metrics: str
    """URL that Prometheus would scrape."""
    folder: Path
    """Where its session keeps everything."""

    def get(self, path: str = "/api/version") -> str:
        """What the dashboard answers to those who know the token."""
        request = urllib.request.Request(self.address + path, headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read().decode()

    def scrape(self) -> str:
        """All metrics of the node, empty while it has none."""
        with suppress(OSError), urllib.request.urlopen(self.metrics, timeout=10) as answer:
            return answer.read().decode()
        return ""


@contextmanager
def ray_head(*options: str, **environment: str) -> Iterator[Head]:
    """Start it and wait until it answers.

    Args:
        options: of `ray start`, besides those for addresses.
        environment: further variables, which its jobs and workers have, too.
    """
    token, port, gcs, metrics = secrets.token_hex(16), free_port(), free_port(), free_port()
    # Ray's sockets live below this folder, and their paths may not be long.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    command = ["--head", f"--port={gcs}", "--include-dashboard=true", f"--dashboard-port={port}"]
    command += [f"--temp-dir={folder}", f"--ray-client-server-port={free_port()}", "--disable-usage-stats"]
    command += [f"--metrics-export-port={metrics}", "--object-store-memory=100000000", *options]
    head = Head(f"http://127.0.0.1:{port}", token, f"127.0.0.1:{gcs}", f"http://127.0.0.1:{metrics}/metrics", folder)
    variables = {
        **environment,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }  # all on loopback, as in platform/cluster/connect.py
    try:
        with _started(command, folder / "log", token, variables):
            _wait(head, folder / "log")
            yield head
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def ray_node(head: Head, *options: str, **environment: str) -> Iterator[None]:
    """Join one more node on loopback; arguments as for `ray_head`."""
    command = [f"--address={head.gcs}", "--node-ip-address=127.0.0.1", f"--metrics-export-port={free_port()}"]
    log = head.folder / "log-of-node"
    with _started([*command, "--object-store-memory=100000000", *options], log, head.token, environment) as process:
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        yield


@contextmanager
def _started(
    options: list[str], log: Path, token: str, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", *options]
    command += [f"--dashboard-agent-listen-port={free_port()}"]
    variables = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, **environment}
    variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"  # nobody waits for what a test leaves behind
    with open(log, "w") as output:
        process = subprocess.Popen(command, env=variables, stdout=output, stderr=output, start_new_session=True)
    try:
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=15)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _wait(head: Head, log: Path) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        with suppress(OSError):
            head.get()
            return
        time.sleep(0.2)
    raise TimeoutError(log.read_text())
