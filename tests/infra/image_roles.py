"""Runs the roles of the image as the manifests define them, and prints the observations as JSON.

    PYTHONPATH=tests python tests/infra/image_roles.py ROOT VARIABLES

ROOT is the directory of the image's files, VARIABLES its environment as JSON. Addresses, ports and names are those of
the manifests, in the network namespace of this process. Start this script with the NAMESPACES of tests/containers.py.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import manifests
import stack
import yaml
from containers import ADDRESS, Container, network, peak, terminate
from moto.server import ThreadedMotoServer
from servers import postgres
from sources import lined
from sqlalchemy import create_engine, text

WAIT_S = 300
"""Timeout for a server to answer."""


def until(answers: Callable[[], httpx.Response], code: int = 200) -> httpx.Response:
    """Repeat a request until its status is `code`, and return that answer."""
    end = time.monotonic() + WAIT_S
    last: object = None
    while time.monotonic() < end:
        try:
            answer = answers()
            if answer.status_code == code:
                return answer
            last = answer.text
        except httpx.TransportError as error:
            last = error
        time.sleep(0.5)
    raise TimeoutError(str(last)[:1000])


@contextmanager
def ray_head(box: Container, log: Path, *command: str) -> Iterator[subprocess.Popen[str]]:
    """Start a head, up to five times, as a pod restarts: a busy machine may exceed the 30 s that Ray gives a node."""
    for _ in range(5):
        with box.running(log, *command) as process:
            while process.poll() is None:
                if healthy():
                    yield process
                    return
                time.sleep(1)
    raise TimeoutError(log.read_text()[-3000:])


def healthy() -> bool:
    """Return whether the node reports that it and the head's store are healthy."""
    with suppress(httpx.TransportError):
        return httpx.get(f"http://{ADDRESS}:52365/api/healthz").status_code == 200
    return False


def foreign_user(image: Path, variables: dict[str, str], folder: Path) -> dict[str, Any]:
    """Train and create a key as a user without a passwd entry and home directory, on a read-only root."""
    writable = ["/tmp", "/workspace"]
    box = Container(image, {**variables, "HOME": "/"}, folder, user=12345, memory=writable, read_only=True)
    script = """set -e
cd /workspace
animediffusion data synthesize drawn --count 24 --size 32
animediffusion data ingest drawn faces --size 32
animediffusion train demo data=faces max_steps=2 batch_size=4 num_samples=0 name=first
animediffusion keys create tests
ls runs/first/bundle
"""
    begun = time.monotonic()
    Container(image, variables, folder).run("animediffusion", "--help")
    return {"help_s": time.monotonic() - begun, "bundle": box.run("sh", "-c", script).split()[-5:]}


@contextmanager
def mlflow(image: Path, variables: dict[str, str], folder: Path, found: dict[str, Any]) -> Iterator[None]:
    """Run the MLflow pod with a database that has the name and the address of the manifest."""
    settings = stack.found("ConfigMap", "settings")["data"]
    pod = stack.found("Deployment", "mlflow")["spec"]["template"]["spec"]
    [server], [first] = pod["containers"], pod["initContainers"]
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    with postgres(5432) as uri:
        with create_engine(uri, isolation_level="AUTOCOMMIT").connect() as connection:
            connection.execute(text("CREATE DATABASE mlflow"))

        def box(container: dict[str, Any]) -> tuple[Container, list[str]]:
            own = manifests.environment(container, settings, {"postgres": "secret"})
            words = [manifests.expand(word, own) for word in [*container["command"], *container.get("args", [])]]
            writable = [mount["mountPath"] for mount in container["volumeMounts"]]
            return Container(image, {**variables, **keys, **own}, folder, memory=writable, read_only=True), words

        migration, words = box(first)
        migration.run(*words)
        there, words = box(server)
        with there.running(folder / "mlflow.log", *words) as process:
            until(lambda: httpx.get(f"http://{ADDRESS}:5000/health"))
            api = "/api/2.0/mlflow/experiments/search?max_results=1"
            by_name = httpx.get(f"http://{ADDRESS}:5000{api}", headers={"Host": "mlflow:5000"}).status_code
            found["mlflow"] = {"by_name": by_name, "by_address": httpx.get(f"http://{ADDRESS}:5000{api}").status_code}
            yield
            found["mlflow"]["stopped_s"] = terminate(process)


def cluster(image: Path, variables: dict[str, str], folder: Path) -> dict[str, Any]:
    """Start the head of the serving cluster as the operator does, run jobs on it, and deploy the application."""
    spec = stack.found("RayService", "animediffusion")["spec"]["rayClusterConfig"]["headGroupSpec"]
    [shm] = [one["emptyDir"]["sizeLimit"] for one in spec["template"]["spec"]["volumes"] if one["name"] == "shm"]
    settings = stack.found("ConfigMap", "settings")["data"]
    password, token = secrets.token_hex(16), secrets.token_hex(16)
    own = {**variables, **settings, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    own |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    outside = Container(image, {**own, "RAY_API_SERVER_ADDRESS": "http://ray:8265"}, folder)
    # All pods share one address here, on which Ray uses port 6379.
    own |= {"RAY_REDIS_ADDRESS": "redis:6380", "REDIS_PASSWORD": password, "RAY_ADDRESS": "127.0.0.1:6379"}
    own |= {"RAY_external_storage_namespace": "serve", "RAY_GCS_SERVER_PORT": "6379", "RAY_PORT": "6379"}
    options = " ".join(f"--{name}={value}" for name, value in spec["rayStartParams"].items())
    start = f"ulimit -n 65536; ray start --head --block --dashboard-host=0.0.0.0 --metrics-export-port=8080 {options} "
    head = Container(image, own, folder, shm=str(int(manifests.amount(shm))), memory=["/workspace"])
    log = folder / "head.log"
    with (
        stack.redis(folder / "redis", password, 6380),
        ray_head(head, log, "/bin/bash", "-c", "--", start + "--redis-password=$REDIS_PASSWORD") as process,
    ):
        found: dict[str, Any] = {"store_on_disk": "instead of /dev/shm" in log.read_text()}
        found["without_token"] = httpx.get(f"http://{ADDRESS}:8265/api/version").status_code
        found["health_check_peak"] = peak(outside, "ray", "health-check", "--address=ray:6379")
        for words in (
            "data synthesize /workspace/drawn --count 24 --size 32",
            "data ingest /workspace/drawn s3://data/faces --size 32",
            "train demo data=s3://data/faces storage=s3://runs name=first max_steps=2 batch_size=4 num_samples=0",
            "models register /workspace/runs/first/bundle",
            "models promote 1 --force",
        ):
            outside.run("animediffusion", "jobs", "submit", "--wait", "--", *words.split())
        key = json.loads(outside.run("animediffusion", "keys", "create", "tests", "--json").splitlines()[-1])["key"]
        found |= application(outside, folder, key)
        found["stopped_s"] = terminate(process)
    return found


def application(outside: Container, folder: Path, key: str) -> dict[str, Any]:
    """Deploy the pod's configuration with the script of compose and return what clients get from the application."""
    script, _ = stack.composed()["serve"]["command"]
    config = yaml.safe_load(stack.found("RayService", "animediffusion")["spec"]["serveConfigV2"])
    words = ["sh", "-c", 'echo "$1" > /tmp/serve.yaml; exec python -c "$2" /tmp/serve.yaml', "sh"]
    deployer = Container(
        outside.image, {**outside.variables, "RAY_DASHBOARD_ADDRESS": "http://ray:8265"}, folder, memory=["/tmp"]
    )
    files = dict.fromkeys(("sketch", "reference"), lined())
    url = f"http://{ADDRESS}:8000/v1/colorize"
    headers = {"Authorization": f"Bearer {key}"}
    with deployer.running(folder / "serve.log", *words, json.dumps(config), script):
        answer = until(lambda: httpx.post(url, files=files, headers=headers, timeout=60))
        refused = httpx.post(url, files=files, timeout=60).status_code
    return {"picture": answer.headers["Content-Type"], "without_key": refused}


def main() -> None:
    image, variables = Path(sys.argv[1]), json.loads(sys.argv[2])
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="containers-", dir="/tmp") as name, ExitStack() as services:
        folder = Path(name)
        network()
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=9000, verbose=False)
        server.start()
        services.callback(server.stop)
        os.environ |= {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9000", "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
        stack.make_buckets()
        found: dict[str, Any] = {"foreign": foreign_user(image, variables, folder)}
        with mlflow(image, variables, folder, found):
            found["ray"] = cluster(image, variables, folder)
    print(json.dumps({**found, "seconds": time.monotonic() - begun}))


if __name__ == "__main__":
    main()
