"""The services around Ray as infra/ starts them: PostgreSQL, Redis, MLflow and buckets.

They use the commands and variables of the manifests. Here they are processes on loopback, so addresses and folders
differ.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import manifests
import yaml
from manifests import KUBERNETES, ROOT
from ports import free_port
from programs import redis_server
from servers import MlflowServer, postgres

COMPOSE = ROOT / "infra/compose.yaml"


@dataclass(frozen=True)
class Stack:
    """Settings of the running services."""

    environment: dict[str, str]
    """Variables of a Ray node, in addition to the AWS variables."""
    redis_password: str


def composed() -> dict[str, Any]:
    """Return the services of compose.yaml by name, as podman-compose parses the file."""
    values = dict.fromkeys(("S3_ACCESS_KEY", "S3_SECRET_KEY", "POSTGRES_PASSWORD", "RAY_AUTH_TOKEN"), "secret")
    done = podman_compose({**os.environ, **values})
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)["services"]


def podman_compose(variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Parse compose.yaml without a .env file; a dry run does not need a container engine."""
    options = ["--dry-run", "--env-file=/dev/null", f"--file={COMPOSE}", "config"]
    command = [sys.executable, "-m", "podman_compose", *options]
    return subprocess.run(command, env=variables, capture_output=True, text=True)


def program(name: str) -> str:
    """Return the path of a program that is installed next to this Python."""
    return str(Path(sys.executable).with_name(name))


def found(kind: str, name: str) -> dict[str, Any]:
    """Return an object of the overlay `small`."""
    [one] = [
        one for one in manifests.build(KUBERNETES / "small") if (one["kind"], one["metadata"]["name"]) == (kind, name)
    ]
    return one


@contextmanager
def stack(folder: Path) -> Iterator[Stack]:
    """Start the services; the AWS variables must name the object store."""
    settings = {**found("ConfigMap", "settings")["data"], "AWS_ENDPOINT_URL_S3": os.environ["AWS_ENDPOINT_URL_S3"]}
    password = secrets.token_hex(16)
    make_buckets()
    with (
        postgres() as database,
        redis(folder / "redis", password) as address,
        mlflow(folder, database, settings) as url,
    ):
        yield Stack({**settings, "MLFLOW_TRACKING_URI": url, "RAY_REDIS_ADDRESS": address}, password)


def make_buckets() -> None:
    """Create the buckets with the script of the Kubernetes job, which is the same in compose."""
    [container] = manifests.containers(found("Job", "buckets"))
    [script] = container["args"]
    subprocess.run([sys.executable, "-c", script], check=True)


@contextmanager
def redis(folder: Path, password: str, port: int | None = None) -> Iterator[str]:
    """Start Redis with the command of its pod, give its address, and check that it stops in time, as a pod must."""
    redis_server()
    folder.mkdir()
    port = port or free_port()
    [container] = manifests.containers(found("StatefulSet", "redis"))
    [script] = container["args"]
    script = script.replace("--dir /data", f"--dir {folder} --bind 127.0.0.1 --port {port}")
    variables = {**os.environ, "REDIS_PASSWORD": password}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen([*container["command"], script], env=variables, stdout=log, stderr=log)
    try:
        _listens(port)
        yield f"127.0.0.1:{port}"
        process.terminate()
        process.wait(timeout=10)
    finally:
        process.kill()


def _listens(port: int) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise TimeoutError(f"nothing listens on {port}")


def mlflow_environment(database: str, settings: dict[str, str]) -> dict[str, str]:
    """Return the variables of the MLflow pod, with another database."""
    container = manifests.containers(found("Deployment", "mlflow"))[0]
    variables = manifests.environment(container, settings, {"postgres": "secret"})
    scheme, _, _ = variables["MLFLOW_BACKEND_STORE_URI"].partition("://")
    return {**variables, "MLFLOW_BACKEND_STORE_URI": f"{scheme}://{database.partition('://')[2]}"}


def migrate(variables: dict[str, str]) -> None:
    """Migrate the database with the command of the pod's init container."""
    [container] = found("Deployment", "mlflow")["spec"]["template"]["spec"]["initContainers"]
    name, *words = [manifests.expand(word, variables) for word in container["command"]]
    subprocess.run([program(name), *words], env={**os.environ, **variables}, check=True, capture_output=True)


@contextmanager
def mlflow(folder: Path, database: str, settings: dict[str, str]) -> Iterator[str]:
    """Start an MLflow server with the arguments of its pod and give its URL."""
    variables = mlflow_environment(database, settings)
    migrate(variables)
    server = MlflowServer(folder, environment=variables)
    arguments = [
        manifests.expand(word, variables) for word in manifests.containers(found("Deployment", "mlflow"))[0]["args"]
    ]
    # One worker process suffices for tests.
    own = ("--host=", "--port=", "--workers=")
    server.options = [one.replace(":5000", f":{server.port}") for one in arguments if not one.startswith(own)]
    with server:
        yield server.url
