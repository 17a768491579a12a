"""Four machines that share only a network train, tune and serve while two of them are lost; prints the result as JSON.

    PYTHONPATH=tests python tests/infra/machines.py

A machine is a set of Linux namespaces with its own processes, name, address, shared memory and disk. The disk is an
overlay over the real one, so that no machine can read what another one writes. The workspace of a machine is in its
home, under a path that the other machines do not have and cannot create. S3 and MLflow are servers on the same network.
A machine is lost without notice: its network link goes down before its processes are killed.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import boto3
import httpx
import numpy as np
import psutil
import yaml
from moto.server import ThreadedMotoServer
from servers import MlflowServer
from tiny import NETWORK
from uploads import upload_folder

from animediffusion.pipelines.synthetic.dataset import synthesize
from animediffusion.pipelines.training.checkpoints import latest_step
from animediffusion.platform.images.codec import encode_png

ROOT = Path(__file__).parents[2]
NAMESPACES = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
"""Prefix of a command that may create machines; all processes that it starts end with it."""
HUB = "10.77.0.1"
WAIT_S = 600
STEPS = 300
RECIPE = f"""{NETWORK}optimizer: {{warmup_steps: 3, muon_learning_rate: 0.02}}
sampler: {{steps: 2}}
data: s3://bucket/faces
storage: s3://bucket/runs
name: far
batch_size: 4
num_workers: 2
use_gpu: true
max_steps: {STEPS}
checkpoint_every: 25
keep_checkpoints: 100
num_samples: 0
"""

# Sets up a machine with the name $2 and the hosts $4, on a new disk in the folder $1. The folders $3 of the program may
# be on another disk.
DISK = """set -e
mount -t tmpfs disk "$1"
cd "$1"
mkdir upper work root
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" root
mount -t proc proc root/proc
mount --rbind /dev root/dev
mount -t tmpfs objects root/dev/shm
mkdir -p root/home
mount -t tmpfs home root/home
mkdir "root/home/$2"
mount -t tmpfs home "root/home/$2"
for place in $3; do mkdir -p "root$place"; mount --bind -o ro "$place" "root$place"; done
mount -o remount,ro root/home
hostname "$2"
rm -f root/etc/hosts
echo "127.0.0.1 localhost\n$4" > root/etc/hosts
exec chroot root sleep infinity
"""

# Runs several commands in one process. The GPUs are only logical ones for Ray: torch computes on the CPU.
VERBS = """
import json, sys
from ray.train.torch import TorchConfig
from animediffusion.cli import app as cli
from animediffusion.pipelines.training import driver as train
from animediffusion.pipelines.training.worker import train_worker

def on_the_cpu(config):
    import ray.train.torch, torch
    ray.train.torch.get_device = lambda: torch.device("cpu")
    train_worker(config)

train.TorchConfig = lambda backend: TorchConfig(backend="gloo")
train.train_worker = on_the_cpu
for words in json.loads(sys.argv[1]):
    code = cli.run([*words, "--json"])
    if code:
        sys.exit(code)
    sys.stdout.flush()
"""


class Machine:
    """A machine of the network; it can run programs until `lose` is called."""

    def __init__(self, name: str, address: str, folder: Path, hosts: str) -> None:
        self.name, self.address = name, address
        self.environment: dict[str, str] = {}
        disk = folder / name
        disk.mkdir()
        places = " ".join(str(place) for place in {ROOT, Path(sys.prefix), Path(sys.base_prefix)})
        own = ["--uts", "--ipc", "sh", "-c", DISK, "sh", str(disk), name, places, hosts]
        unshare = subprocess.Popen([*NAMESPACES, *own])
        self.pid = until(lambda: next(iter(psutil.Process(unshare.pid).children()), None)).pid
        ip(f"link add name {name} type veth peer name eth0 netns {self.pid}")
        ip(f"link set {name} master lan up")
        inside = ["nsenter", f"--target={self.pid}", "--net"]
        ip("link set lo up", inside)
        ip(f"addr add {address}/24 dev eth0", inside)
        ip("link set eth0 up", inside)
        ip(f"route add default via {HUB}", inside)
        until(lambda: psutil.Process(self.pid).cmdline()[:1] == ["sleep"])

    @property
    def home(self) -> Path:
        return Path("/home", self.name)

    def start(self, *command: str, **options: Any) -> subprocess.Popen[str]:
        """Start a program on this machine, with only the machine's own environment."""
        inside = ["nsenter", f"--target={self.pid}", "--all", "--root", f"--wdns={self.home}"]
        variables = {
            "HOME": str(self.home),
            "ANIMEDIFFUSION_WORKSPACE": str(self.home / "workspace"),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin", "/usr/sbin", "/sbin"]),
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
            **self.environment,
        }
        return subprocess.Popen([*inside, *command], env=variables, text=True, **options)

    def has(self, title: str) -> bool:
        """Return whether the command line of a process on this machine contains `title`."""
        mine = Path("/proc", str(self.pid), "ns/pid").readlink()
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                here = Path("/proc", str(process.pid), "ns/pid").readlink() == mine
                if here and title in " ".join(process.cmdline()):
                    return True
        return False

    def workspace(self) -> list[str]:
        """Return the names of the files in the machine's workspace."""
        folder = Path(f"/proc/{self.pid}/root{self.home}/workspace")
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []

    def lose(self) -> None:
        """Cut the network and kill the machine without notice, as in a power failure."""
        ip(f"link set {self.name} down")
        os.kill(self.pid, signal.SIGKILL)


def ip(words: str, inside: list[str] | None = None) -> None:
    subprocess.run([*(inside or []), "ip", *words.split()], check=True)


def until(found: Callable[[], Any], seconds: float = WAIT_S) -> Any:
    """Call `found` until it returns a true value, and return that value."""
    end = time.monotonic() + seconds
    while True:
        value = found()
        if value:
            return value
        if time.monotonic() > end:
            raise TimeoutError(f"nothing after {seconds:g} s")
        time.sleep(0.1)


class Network:
    """Machines on a bridge, with S3 and MLflow at the bridge's address, and a Ray cluster on the machines.

    Args:
        folder: folder for disks and logs.
        mlflow: address of MLflow.
        store: address of S3.
        names: names of the machines; the first one, the front, is the head of the cluster.
        cpus: CPUs of the front for Ray.
        environment: further variables of all machines.
    """

    def __init__(
        self, folder: Path, mlflow: str, store: str, names: Sequence[str], cpus: int, environment: Mapping[str, str]
    ) -> None:
        token = secrets.token_hex(16)
        addresses = {name: f"10.77.0.{number}" for number, name in enumerate(names, 2)}
        hosts = "\n".join(f"{address} {name}" for name, address in addresses.items())
        self.machines = {name: Machine(name, address, folder, hosts) for name, address in addresses.items()}
        self.front = self.machines[names[0]]
        common = {
            "AWS_ENDPOINT_URL_S3": store,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "MLFLOW_TRACKING_URI": mlflow,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "ANIMEDIFFUSION_KEYS": "s3://bucket/keys.json",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_enable_metrics_collection": "0",
            "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "180",
            "OMP_NUM_THREADS": "1",
            # Ray declares a machine dead after 24 seconds without an answer, instead of a minute.
            "RAY_health_check_period_ms": "2000",
            "RAY_health_check_timeout_ms": "6000",
            "RAY_health_check_failure_threshold": "3",
            **environment,
        }
        self.token, self.dashboard = token, f"http://{self.front.address}:8265"
        self.folder = folder
        for machine in self.machines.values():
            machine.environment = {**common}
        self.front.environment["RAY_ADDRESS"] = f"{self.front.address}:6379"
        head = ["--head", "--port=6379", f"--num-cpus={cpus}", "--include-dashboard=true", "--dashboard-host=0.0.0.0"]
        self.join([self.front], head)

    def join(self, machines: list[Machine], options: list[str]) -> None:
        """Make the machines nodes of the Ray cluster."""
        logs = {machine: self.folder / f"{machine.name}.log" for machine in machines}

        def begin(machine: Machine) -> subprocess.Popen[str]:
            own = [f"--node-ip-address={machine.address}", "--object-store-memory=100000000", "--block"]
            with logs[machine].open("w") as output:
                return machine.start("ray", "start", *options, *own, stdout=output, stderr=output)

        running = {machine: begin(machine) for machine in machines}

        def up() -> bool:
            for machine, node in running.items():
                if node.poll() is not None:  # Ray gives a node 30 s to start, which is too short on a busy computer
                    print(logs[machine].read_text()[-2000:], file=sys.stderr)
                    running[machine] = begin(machine)
            return all("Ray runtime started" in log.read_text() for log in logs.values())

        until(up)

    def verbs(self, *commands: list[str]) -> subprocess.Popen[str]:
        """Run commands on the front machine; each command prints a line of JSON."""
        return self.front.start("python", "-c", VERBS, json.dumps(commands), stdout=subprocess.PIPE)

    def having(self, title: str) -> list[str]:
        return [machine.name for machine in self.machines.values() if machine.has(title)]

    def lose(self, name: str) -> None:
        self.machines.pop(name).lose()

    def deploy(self, config: dict[str, Any]) -> None:
        """Deploy an application as `serve deploy` does, and wait until it runs."""
        headers = {"Authorization": f"Bearer {self.token}"}
        url = f"{self.dashboard}/api/serve/applications/"
        httpx.put(url, json=config, headers=headers, timeout=60).raise_for_status()

        def runs() -> bool:
            found = httpx.get(url, headers=headers, timeout=60).json()["applications"]["animediffusion"]
            if found["status"] == "DEPLOY_FAILED":
                raise RuntimeError(json.dumps(found)[:5000])
            return bool(found["status"] == "RUNNING")

        until(runs)


@contextmanager
def network(
    folder: Path,
    names: Sequence[str] = ("front", "first", "second", "third"),
    *,
    cpus: int = 1,
    gpus: int = 1,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Network]:
    """Start everything; see Network. Each machine but the front has 2 CPUs and `gpus` logical GPUs for Ray."""
    ip("link set lo up")
    ip("link add lan type bridge")
    ip(f"addr add {HUB}/24 dev lan")
    ip("link set lan up")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address=HUB, port=9000, verbose=False)
    server.start()
    store = f"http://{HUB}:9000"
    os.environ |= {"AWS_ENDPOINT_URL_S3": store, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    os.environ |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    boto3.client("s3").create_bucket(Bucket="bucket")
    mlflow = MlflowServer(folder, host=HUB)
    # The head starts before the other nodes, because it gives its dashboard little time to start.
    found = Network(folder, mlflow.url, store, names, cpus, environment or {})
    with mlflow:
        others = [machine for machine in found.machines.values() if machine is not found.front]
        found.join(others, [f"--address={found.front.address}:6379", "--num-cpus=2", f"--num-gpus={gpus}"])
        yield found
    server.stop()


def answers(command: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """Yield the JSON lines that a command prints."""
    for line in command.stdout or []:
        if line.startswith("{"):
            yield json.loads(line)
    if command.wait():
        raise RuntimeError(f"a command ended with {command.returncode}")


def train(there: Network, folder: Path) -> dict[str, Any]:
    """Run all stages from pictures to a champion; one of two training machines is lost after a checkpoint."""
    synthesize(str(folder / "drawn"), 40, 32, workers=1)
    upload_folder(folder / "drawn", "s3://bucket/drawn")
    there.front.start("tee", "recipe.yaml", stdin=subprocess.PIPE, stdout=subprocess.DEVNULL).communicate(RECIPE)
    verbs = there.verbs(
        ["keys", "create", "tests"],
        ["data", "ingest", "s3://bucket/drawn", "s3://bucket/faces", "--size=32"],
        ["train", "recipe.yaml"],
        ["tune", "sampler", "workspace/runs/far/bundle", "s3://bucket/faces", "--trials=3"],
        ["models", "promote", "1", "--force"],
    )
    answer = answers(verbs)
    found = {"key": next(answer)["key"], "ingested": next(answer)}
    until(lambda: verbs.poll() is not None or latest_step("s3://bucket/runs/far/checkpoints") >= 50)
    found["trainers"] = there.having("RayTrainWorker")
    there.lose(found["trainers"][0])
    found["trainers_after"] = until(lambda: two(there.having("RayTrainWorker")))
    return found | {"trained": next(answer), "tuned": next(answer), "promoted": next(answer)}


def two(names: list[str]) -> list[str] | None:
    return names if len(names) == 2 else None


def serve(there: Network, key: str) -> dict[str, Any]:
    """Serve with an engine on each of two machines, and lose the machine that also has an ingress."""
    config = yaml.safe_load((ROOT / "infra/serve.yaml").read_text())
    replicas = {"min_replicas": 2, "max_replicas": 2, "engine_gpus": 0, "engine_cpus": 1.5, "num_ingress_replicas": 2}
    config["applications"][0]["args"] |= replicas
    there.deploy(config)
    pixels = np.full((48, 48, 3), 230, np.uint8)
    pixels[12:15] = 20  # a drawing has a line
    files = dict.fromkeys(("sketch", "reference"), encode_png(pixels))
    authorized = {"Authorization": f"Bearer {key}"}
    url = f"http://{there.front.address}:8000"
    with httpx.Client(base_url=url, headers=authorized, timeout=WAIT_S, trust_env=False) as client:

        def color() -> int:
            return client.post("/v1/colorize", files=files).status_code

        found = {"answers": [color() for _ in range(4)], "engines": there.having("animediffusion:engine")}
        found["disks"] = {machine.name: machine.workspace() for machine in there.machines.values()}
        ingresses = there.having("animediffusion:ingress")
        there.lose(max(found["engines"], key=ingresses.__contains__))
        lost, after = time.monotonic(), [color()]
        while after[-3:] != [200] * 3 and time.monotonic() < lost + WAIT_S:
            after.append(color())
    return found | {"answers_after": after, "engines_after": there.having("animediffusion:engine")}


def main() -> None:
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="machines-", dir="/tmp") as name, network(Path(name)) as there:
        found = train(there, Path(name))
        found |= serve(there, found.pop("key"))
    print(json.dumps({**found, "seconds": time.monotonic() - begun}))


def run_in_namespaces(script: str, body: Callable[[], None]) -> None:
    """Run a script again where it may create machines, and there `body`; without namespaces, print what is missing."""
    if sys.argv[-1:] == ["inside"]:
        sys.argv.pop()
        body()
    elif not (shutil.which("unshare") and shutil.which("ip")) or subprocess.run([*NAMESPACES, "true"]).returncode:
        print(json.dumps({"missing": "Linux namespaces, which root can make, with unshare and ip"}))
    else:
        os.execvp(NAMESPACES[0], [*NAMESPACES, sys.executable, script, *sys.argv[1:], "inside"])


if __name__ == "__main__":
    run_in_namespaces(__file__, main)
