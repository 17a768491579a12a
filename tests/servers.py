"""Third-party servers that tests use, as separate processes: MLflow and PostgreSQL."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from databases import copy_to
from ports import free_port
from programs import initdb

START_S = 240


class MlflowServer:
    """A real `mlflow server` that can be killed and restarted on the same port.

    Args:
        folder: folder of the server's files.
        options: options of the command, instead of those for SQLite and files in the folder.
        environment: additional variables for the server.
        host: the address on which the server listens.
    """

    def __init__(
        self,
        folder: Path,
        options: list[str] | None = None,
        environment: Mapping[str, str] | None = None,
        host: str = "127.0.0.1",
    ):
        self.folder = folder
        self.host, self.port = host, free_port()
        self.url = f"http://{self.host}:{self.port}"
        if options is None:
            copy_to(folder / "mlflow.db")
        self.options = options or [
            f"--backend-store-uri=sqlite:///{folder}/mlflow.db",
            f"--artifacts-destination={folder / 'files'}",
        ]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        self.environment = {**os.environ, **quiet, **(environment or {})}
        self.environment.pop("MLFLOW_TRACKING_URI", None)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(signal.SIGTERM)

    def start(self) -> None:
        """Start the server and return when it answers."""
        command = [sys.executable, "-m", "mlflow", "server", f"--host={self.host}", f"--port={self.port}"]
        with open(self.folder / "log", "a") as log:
            self._process = subprocess.Popen(
                [*command, "--workers=1", *self.options],
                env=self.environment,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until = time.monotonic() + START_S
        while time.monotonic() < until and self._process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=1).close()
                return
            except urllib.error.HTTPError:
                return
            except OSError:
                time.sleep(0.2)
        raise TimeoutError((self.folder / "log").read_text())

    def stop(self, signum: int = signal.SIGKILL) -> None:
        """Stop the server and the processes that it started."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signum)
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(timeout=20)
        self._process = None


@contextmanager
def postgres(port: int | None = None) -> Iterator[str]:
    """Start a PostgreSQL (Debian's package, or the one on the PATH) and give the URI of an empty database."""
    with tempfile.TemporaryDirectory(prefix="postgres-") as name:
        yield from _postgres(Path(name), port or free_port())


def _postgres(folder: Path, port: int) -> Iterator[str]:
    tools, data = Path(initdb()).parent, folder / "data"
    owner: dict[str, object] = {}
    if os.getuid() == 0:  # PostgreSQL refuses to run as root
        user = pwd.getpwnam("postgres" if any(u.pw_name == "postgres" for u in pwd.getpwall()) else "nobody")
        owner = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        os.chown(folder, user.pw_uid, user.pw_gid)
    create = [str(tools / "initdb"), "-D", str(data), "-U", "mlflow", "--auth=trust", "--no-sync"]
    subprocess.run(create, check=True, capture_output=True, cwd=folder, **owner)  # type: ignore[call-overload]
    settings = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": "", "fsync": "off"}
    command = [str(tools / "postgres"), "-D", str(data), *(f"-c{key}={value}" for key, value in settings.items())]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, **owner)  # type: ignore[call-overload]
    try:
        ready = [str(tools / "pg_isready"), "-h", "127.0.0.1", "-p", str(port)]
        until = time.monotonic() + START_S
        while subprocess.run(ready, capture_output=True).returncode:
            if process.poll() is not None or time.monotonic() > until:
                raise TimeoutError((folder / "log").read_text())
            time.sleep(0.1)
        yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
    finally:
        process.send_signal(signal.SIGINT)  # "fast" shutdown: clients are disconnected
        process.wait(timeout=30)
