"""A real `ray start --head` on loopback that requires a token, for tests that need a cluster."""

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
    """Addresses, token and folder of a running head."""

    address: str
    """URL of the dashboard, which has the jobs API."""
    token: str
    gcs: str
    """Address to which other nodes connect."""
    metrics: str
    """URL that Prometheus would scrape."""
    folder: Path
    """Folder of all files of its session."""

    def get(self, path: str = "/api/version") -> str:
        """Return the dashboard's answer to a request with the token."""
        request = urllib.request.Request(self.address + path, headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read().decode()

    def scrape(self) -> str:
        """Return all metrics of the node; empty if it has none yet."""
        with suppress(OSError), urllib.request.urlopen(self.metrics, timeout=10) as answer:
            return answer.read().decode()
        return ""


@contextmanager
def ray_head(*options: str, **environment: str) -> Iterator[Head]:
    """Start a head and wait until its dashboard answers.

    Args:
        options: of `ray start`, in addition to those for addresses.
        environment: additional variables, which its jobs and workers inherit.
    """
    token, port, gcs, metrics = secrets.token_hex(16), free_port(), free_port(), free_port()
    # Ray's sockets are below this folder, and paths of sockets must be short.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    command = ["--head", f"--port={gcs}", "--include-dashboard=true", f"--dashboard-port={port}"]
    command += [f"--temp-dir={folder}", f"--ray-client-server-port={free_port()}", "--disable-usage-stats"]
    # A log monitor would read every log file ten times a second, and nobody asks for the output of workers.
    command += [f"--metrics-export-port={metrics}", "--object-store-memory=100000000", "--include-log-monitor=false"]
    command += options
    head = Head(f"http://127.0.0.1:{port}", token, f"127.0.0.1:{gcs}", f"http://127.0.0.1:{metrics}/metrics", folder)
    variables = {
        **environment,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }  # all processes on loopback, as in platform/cluster/cluster.py
    try:
        with _started(command, folder / "log", token, variables):
            _wait(head, folder / "log")
            yield head
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _started(
    options: list[str], log: Path, token: str, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", *options]
    command += [f"--dashboard-agent-listen-port={free_port()}"]
    variables = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, **environment}
    variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"  # tests do not need a graceful shutdown
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
