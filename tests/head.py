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
from collections.abc import Iterator
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
    token, port, metrics = secrets.token_hex(16), free_port(), free_port()
    # Ray's sockets live below this folder, and their paths may not be long.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--port=0", *options]
    command += ["--include-dashboard=true", f"--dashboard-port={port}", f"--temp-dir={folder}"]
    command += [f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}"]
    command += [f"--metrics-export-port={metrics}", "--object-store-memory=100000000", "--disable-usage-stats"]
    variables = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, **environment}
    variables["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # all on loopback, as in platform/cluster.py
    head = Head(f"http://127.0.0.1:{port}", token, f"http://127.0.0.1:{metrics}/metrics", folder)
    log = folder / "log"
    with open(log, "w") as output:
        process = subprocess.Popen(command, env=variables, stdout=output, stderr=output, start_new_session=True)
    try:
        _wait(head, log)
        yield head
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=15)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def _wait(head: Head, log: Path) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        with suppress(OSError):
            head.get()
            return
        time.sleep(0.2)
    raise TimeoutError(log.read_text())
