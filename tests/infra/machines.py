"""Two machines that share nothing but a network: from pictures in S3 to a picture colored after one of them is lost.

    unshare --net --mount python tests/infra/machines.py FOLDER

Prints what happened as one JSON object. Each machine is a network namespace with an address of its own, and a mount
namespace in which home, workspace, Ray's folder and shared memory are its own. S3 and MLflow are a third machine. Needs
the right to make namespaces; nothing outside them is changed.
"""

import io
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import boto3
import httpx
from moto.server import ThreadedMotoServer
from PIL import Image

from animediffusion.pipelines.synthesize import synthesize
from animediffusion.platform import jobs, storage

SERVICES, HEAD, WORKER = "10.77.0.1", "10.77.0.2", "10.77.0.3"
CPUS, CPUS_OF_A_WORKER = 3, 2
"""So that two training workers, or two engines, cannot be on one machine."""
BIN = Path(sys.executable).parent


def sh(command: str) -> None:
    subprocess.run(["sh", "-ec", command], check=True, capture_output=True, text=True)


def network() -> None:
    """A bridge with this process on it, and a cable for each machine."""
    sh("mkdir -p /run/netns && mount -t tmpfs tmpfs /run/netns && ip link set lo up")
    sh(f"ip link add bridge type bridge && ip addr add {SERVICES}/24 dev bridge && ip link set bridge up")
    for name, address in (("head", HEAD), ("worker", WORKER)):
        sh(f"ip netns add {name} && ip link add out-{name} type veth peer name eth0 netns {name}")
        sh(f"ip link set out-{name} master bridge up")
        inside = f"nsenter --net=/run/netns/{name}"
        sh(f"{inside} ip link set lo up && {inside} ip addr add {address}/24 dev eth0")
        sh(f"{inside} ip link set eth0 up")


class Machine:
    """A Ray node.

    Args:
        name: of the namespace.
        folder: holds its log, and the folders that each machine has for itself.
        options: of `ray start`.
    """

    def __init__(self, name: str, folder: Path, *options: str) -> None:
        own = [folder / part for part in ("home", "workspace", "ray")]
        for path in own:
            path.mkdir(exist_ok=True)
        mounts = "".join(f"mount -t tmpfs tmpfs {path}; " for path in (*own, "/dev/shm"))
        start = f"{BIN / 'ray'} start --block --num-cpus={CPUS} --object-store-memory=100000000 {' '.join(options)}"
        # Processes are its own, too: they end with the first of them.
        apart = ["nsenter", f"--net=/run/netns/{name}", "unshare", "--mount", "--pid", "--fork", "--mount-proc"]
        command = [*apart, "sh", "-ec", f"{mounts}exec {start}"]
        environment = {**os.environ, "HOME": str(own[0]), "ANIMEDIFFUSION_WORKSPACE": str(own[1])}
        with open(folder / f"{name}.log", "w") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True
            )

    def lose(self) -> None:
        """As if the power went."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def wait(what: str, holds, seconds: float = 180.0):
    """The first true answer; errors of the connection count as no answer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(httpx.HTTPError):
            answer = holds()
            if answer:
                return answer
        time.sleep(0.5)
    raise TimeoutError(what)


def job(*verb: str, may_fail: bool = False) -> dict:
    """Run a verb on the cluster; its JSON."""
    log: list[str] = []
    code = jobs.follow(jobs.submit([*verb, "--json"]), log.append)
    text = "".join(log)
    print(text, file=sys.stderr)
    if code and not may_fail:
        raise RuntimeError(f"{verb} ended with {code}")
    return json.loads(text.splitlines()[-1])


def settings() -> dict[str, str]:
    """What every machine is told, and this process."""
    return {
        "AWS_ENDPOINT_URL_S3": f"http://{SERVICES}:9000",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "MLFLOW_TRACKING_URI": f"http://{SERVICES}:5000",
        "ANIMEDIFFUSION_KEYS": "s3://bucket/keys.json",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_API_SERVER_ADDRESS": f"http://{HEAD}:8265",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        # The name of this machine is nobody's address here, and gloo would ask for it.
        "GLOO_SOCKET_IFNAME": "eth0",
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "no_proxy": "*",
    }


def services(folder: Path) -> subprocess.Popen:
    """S3 here, MLflow beside it."""
    ThreadedMotoServer(ip_address=SERVICES, port=9000, verbose=False).start()
    boto3.client("s3").create_bucket(Bucket="bucket")
    command = [str(BIN / "mlflow"), "server", f"--host={SERVICES}", "--port=5000", "--workers=1"]
    command += [f"--backend-store-uri=sqlite:///{folder}/mlflow.db", "--artifacts-destination=s3://bucket/mlflow"]
    command += [f"--allowed-hosts={SERVICES}:5000"]
    with open(folder / "mlflow.log", "w") as log:
        mlflow = subprocess.Popen(
            command,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=log,
            stderr=log,
            cwd=folder,
        )
    wait("MLflow", lambda: httpx.get(f"http://{SERVICES}:5000/health", timeout=5).status_code == 200)
    return mlflow


def pictures() -> dict[str, bytes]:
    found = {}
    for name, color in (("sketch", "white"), ("reference", "red")):
        buffer = io.BytesIO()
        Image.new("RGB", (40, 40), color).save(buffer, "PNG")
        found[name] = buffer.getvalue()
    return found


def serve() -> httpx.Client:
    """Two engines, which have to be on two machines; a client of the application."""
    args = {"min_replicas": 2, "max_replicas": 2, "engine_cpus": CPUS_OF_A_WORKER, "engine_gpus": 0, "max_batch": 2}
    application = {
        "name": "animediffusion",
        "route_prefix": "/",
        "import_path": "animediffusion.serve.deployments:build_app",
        "args": args,
    }
    config = {"http_options": {"host": HEAD, "port": 8000}, "proxy_location": "HeadOnly", "applications": [application]}
    headers = {}
    if find_spec("animediffusion.platform.keys"):
        key = import_module("animediffusion.platform.keys").Keys(os.environ["ANIMEDIFFUSION_KEYS"]).create("test")
        headers["Authorization"] = f"Bearer {key}"
    token = {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
    url = f"http://{HEAD}:8265/api/serve/applications/"
    httpx.put(url, json=config, headers=token, timeout=60).raise_for_status()
    return httpx.Client(base_url=f"http://{HEAD}:8000", headers=headers, timeout=30)


def main(folder: Path) -> None:
    network()
    os.environ.update(settings())
    mlflow = services(folder)
    head = Machine("head", folder, "--head", "--port=6379", f"--node-ip-address={HEAD}", f"--temp-dir={folder}/ray",
                   "--dashboard-host=0.0.0.0", "--disable-usage-stats")  # fmt: skip
    wait("the head", lambda: httpx.get(f"http://{HEAD}:8265/api/gcs_healthz", timeout=5).status_code == 200)
    worker = Machine("worker", folder, f"--address={HEAD}:6379", f"--node-ip-address={WORKER}")
    try:
        print(json.dumps(story(folder, worker)))
    finally:
        for one in (worker, head):
            one.lose()
        mlflow.kill()


def story(folder: Path, worker: Machine) -> dict:
    synthesize(str(folder / "drawn"), 60, 32, 0)
    storage.upload_folder(folder / "drawn", "s3://bucket/drawn")
    checks = wait("two nodes", lambda: two_nodes(job("doctor", "--storage", "s3://bucket/probe", may_fail=True)))
    ingested = job("data", "ingest", "s3://bucket/drawn", "s3://bucket/faces", "--size", "32")
    recipe = ["train", "demo", "data=s3://bucket/faces", "storage=s3://bucket/runs", "name=apart", "max_steps=30"]
    workers = ["num_workers=2", f"cpus_per_worker={CPUS_OF_A_WORKER}", "batch_size=8", "checkpoint_every=10"]
    trained = job(*recipe, *workers, "num_samples=0")
    version = str(job("models", "register", trained["bundle"])["version"])
    job("models", "promote", version, "--force", "--why", "two machines")
    client, files = serve(), pictures()
    replicas = wait("two engines", lambda: _two_ready(client))
    before = wait("a picture", lambda: client.post("/v1/colorize", files=files)).status_code
    worker.lose()
    after = [_status(client, files)]
    wait("pictures again", lambda: after.append(_status(client, files)) or after[-10:] == [200] * 10)
    return {
        "checks": {one["name"]: [one["ok"], one["detail"]] for one in checks["checks"]},
        "rows": ingested["splits"],
        "trained": {key: trained[key] for key in ("steps", "num_workers")},
        "shared": [str(path) for name in ("home", "workspace", "ray") for path in (folder / name).iterdir()],
        "replicas": len(replicas),
        "before": before,
        "after": after,
    }


def two_nodes(report: dict) -> dict | None:
    detail = next(one["detail"] for one in report["checks"] if one["name"] == "nodes")
    return report if detail.startswith("2 answer") else None


def _two_ready(client: httpx.Client) -> list[dict] | None:
    answer = client.get("/v1/models")
    replicas = answer.json()["replicas"] if answer.status_code == 200 else []
    return replicas if [one["state"] for one in replicas] == ["ready", "ready"] else None


def _status(client: httpx.Client, files: dict[str, bytes]) -> int:
    with suppress(httpx.HTTPError):
        return client.post("/v1/colorize", files=files).status_code
    return 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
