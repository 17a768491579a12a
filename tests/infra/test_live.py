"""What infra/ brings up, on one machine: MLflow on PostgreSQL, Redis, a Ray head with the CPUs that compose gives it,
jobs while the application serves. Serve configurations are deployed, dashboards and alerts name metrics that are
scraped. All on loopback; GPUs are numbers."""

import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import manifests
import promql_parser
import pytest
import ray
import torch
import yaml
from head import Head, ray_head
from manifests import KUBERNETES, ROOT
from PIL import Image
from ports import free_port
from sources import lined
from stack import Stack, composed, stack
from tiny import NETWORK

from animediffusion.models.bundle import BundleConfig, SamplerDefaults, identity, save_bundle
from animediffusion.models.network.unet import UNetConfig
from animediffusion.pipelines.synthetic.dataset import synthesize
from animediffusion.pipelines.training.reporting import GAUGES, PREFIX
from animediffusion.platform.api_keys import Keys
from animediffusion.platform.cluster import jobs
from animediffusion.platform.config import Settings
from animediffusion.platform.registry.client import Registry
from animediffusion.platform.storage.storage import list_files

pytestmark = pytest.mark.ray

GRAFANA = ROOT / "infra/grafana"
DASHBOARDS = sorted(GRAFANA.glob("*.json"))
RULES = GRAFANA / "alerts.yaml"
PORT = free_port()


def serve_configs() -> dict[str, dict]:
    found = {"compose": yaml.safe_load((ROOT / "infra/serve.yaml").read_text())}
    for folder in ("small", "gpu"):
        [service] = [one for one in manifests.build(KUBERNETES / folder) if one["kind"] == "RayService"]
        found[folder] = yaml.safe_load(service["spec"]["serveConfigV2"])
    return found


@pytest.fixture(scope="module")
def services(moto_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with stack(tmp_path_factory.mktemp("services")) as there, pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "ANIMEDIFFUSION_KEYS"):
            patch.setenv(name, there.environment[name])
        yield there


@pytest.fixture(scope="module")
def workspace(services: Stack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the head; the registry's champion is a network with random weights."""
    folder = tmp_path_factory.mktemp("live")
    torch.manual_seed(0)
    network = UNetConfig(**yaml.safe_load(NETWORK)["network"])
    config = BundleConfig(network=network, image_size=32, sampler=SamplerDefaults(steps=2))
    save_bundle(folder / "bundle", config.build(), config)
    registry = Registry(Settings(workspace=folder / "workspace"))
    registry.register(folder / "bundle", sha256=identity(folder / "bundle"))
    registry.set_alias("champion", 1)
    return folder / "workspace"


@pytest.fixture(scope="module")
def client(services: Stack) -> Iterator[httpx.Client]:
    """One with a key."""
    key = Keys(services.environment["ANIMEDIFFUSION_KEYS"]).create("tests")
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(headers=headers, timeout=60, trust_env=False, base_url=f"http://127.0.0.1:{PORT}") as one:
        yield one


@pytest.fixture(scope="module")
def head(services: Stack, workspace: Path) -> Iterator[Head]:
    """With what compose gives the head."""
    given = [one for one in composed()["ray"]["command"] if one.startswith(("--num-cpus=", "--object-store-memory="))]
    options = [*given, f"--redis-password={services.redis_password}"]
    settings = {"ANIMEDIFFUSION_WORKSPACE": str(workspace), **services.environment}
    metrics = {"RAY_enable_metrics_collection": "1", "RAY_metrics_report_interval_ms": "1000"}
    with (
        ray_head(*options, **metrics, **settings) as there,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_API_SERVER_ADDRESS", there.address)
        patch.setenv("RAY_AUTH_TOKEN", there.token)
        yield there


@pytest.fixture(scope="module")
def pictures() -> dict[str, bytes]:
    return dict.fromkeys(("sketch", "reference"), lined())


def here(config: dict) -> dict:
    """A Serve configuration for loopback, and a free port."""
    return {**config, "http_options": {"host": "127.0.0.1", "port": PORT}}


def applications(head: Head, method: str = "GET", **arguments) -> httpx.Response:
    headers = {"Authorization": f"Bearer {head.token}"}
    url = f"{head.address}/api/serve/applications/"
    return httpx.request(method, url, headers=headers, timeout=60, **arguments).raise_for_status()


def deploy(head: Head, config: dict) -> None:
    """As `serve deploy` does."""
    applications(head, "PUT", json=here(config))
    until_running(head)


def until_running(head: Head) -> None:
    end = time.monotonic() + 240
    while time.monotonic() < end:
        found = applications(head).json()["applications"].get("animediffusion", {"status": "missing"})
        if found["status"] == "RUNNING":
            return
        assert found["status"] != "DEPLOY_FAILED", found["message"]
        time.sleep(0.5)
    raise TimeoutError(json.dumps(found)[:3000])


@contextmanager
def deployed_by_compose(head: Head, folder: Path) -> Iterator[None]:
    """The service `serve` of compose at work; it looks every second, not every ten, whether the application is gone."""
    config = folder / "serve.yaml"
    config.write_text(yaml.safe_dump(here(yaml.safe_load((ROOT / "infra/serve.yaml").read_text()))))
    script, _ = composed()["serve"]["command"]
    assert script.count("time.sleep(10)") == 1
    script = script.replace("time.sleep(10)", "time.sleep(1)")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    variables = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_DASHBOARD_ADDRESS": head.address, "PATH": path}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen([sys.executable, "-c", script, str(config)], env=variables, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def until_colored(client: httpx.Client, pictures: dict[str, bytes]) -> httpx.Response:
    """The answer, which is a picture unless there was none for a minute."""
    end = time.monotonic() + 60
    while True:
        with suppress(httpx.TransportError):
            answer = client.post("/v1/colorize", files=pictures)
            if answer.status_code == 200 or time.monotonic() > end:
                return answer
        time.sleep(0.5)


def run_while_serving(client: httpx.Client, pictures: dict[str, bytes], *words: str) -> str:
    """A job and its log; whenever it says something, a picture is colored."""
    log: list[str] = []

    def hear(text: str) -> None:
        log.append(text)
        assert until_colored(client, pictures).status_code == 200

    assert jobs.follow(jobs.submit(list(words)), hear) == 0, "".join(log)
    return "".join(log)


def json_in(log: str) -> dict:
    """The JSON object that a job printed last. Its log also has stderr, where Ray may write later."""
    return json.loads([line for line in log.splitlines() if line.startswith("{")][-1])


@pytest.fixture(scope="module")
def scraped(head: Head, client: httpx.Client, pictures: dict[str, bytes], workspace: Path) -> dict[str, str]:
    """Every metric, name to type, that the node showed while it served, ingested and trained."""
    synthesize(str(workspace / "drawn"), 40, 32, workers=1)
    deploy(head, serve_configs()["small"])
    until_colored(client, pictures)
    client.post("/v1/colorize")  # an error, to be counted
    text: list[str] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(1.0):
            text.append(head.scrape())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run_while_serving(client, pictures, "data", "ingest", str(workspace / "drawn"), "s3://data/faces", "--size=32")
        recipe = ["train", "demo", "data=s3://data/faces", "storage=s3://runs", "name=watched", "use_gpu=false"]
        numbers = ["max_steps=30", "batch_size=4", "log_every=5", "num_samples=0"]
        log = run_while_serving(client, pictures, *recipe, *numbers, "--json")
        result = json_in(log)
        assert result["steps"] == 30
        assert {"config.json", "model.safetensors"} <= set(list_files(result["bundle"]))
        time.sleep(3)
    finally:
        done.set()
        watcher.join()
    return dict(re.findall(r"^# TYPE (\S+) (\w+)$", "\n".join(text), flags=re.MULTILINE))


def check_colors(client: httpx.Client, pictures: dict[str, bytes]) -> None:
    answer = until_colored(client, pictures)
    assert answer.status_code == 200, answer.text
    assert Image.open(io.BytesIO(answer.content)).size == (48, 48)
    assert answer.headers["X-Model-Version"] == "1"


def test_compose_deploys_the_application_and_again_when_it_is_gone(
    head: Head, client: httpx.Client, pictures: dict[str, bytes], tmp_path: Path
) -> None:
    with deployed_by_compose(head, tmp_path):
        until_running(head)
        check_colors(client, pictures)
        applications(head, "DELETE")  # as after a reboot: a head with nothing on it
        until_running(head)
        check_colors(client, pictures)


def test_no_client_colors_without_a_key(head: Head, client: httpx.Client, pictures: dict[str, bytes]) -> None:
    deploy(head, serve_configs()["small"])
    check_colors(client, pictures)
    url = f"http://127.0.0.1:{PORT}/v1/colorize"
    assert httpx.post(url, files=pictures, timeout=60, trust_env=False).status_code == 401


def expressions() -> list[str]:
    found = []
    for path in DASHBOARDS:
        board = json.loads(path.read_text())
        found += [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
        found += [one["query"] for one in board["templating"]["list"] if one["type"] == "query"]
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        found += [rule["expr"] for rule in group["rules"]]
    return [re.sub(r"^label_values\((\w+), ?\w+\)$", r"\1", one) for one in found]


def metrics_in(expression: str) -> set[str]:
    """Names of a PromQL expression; a variable of Grafana stands for any value."""
    tree = promql_parser.parse(
        expression.replace("$__rate_interval", "5m").replace("$run", "a").replace("$version", "1")
    )
    return set(re.findall(r"\bray_\w+", str(tree)))


def test_dashboards_and_alerts_are_in_promql() -> None:
    assert len(DASHBOARDS) == 2
    assert all(metrics_in(expression) for expression in expressions())
    with pytest.raises(ValueError, match=r"unclosed|unexpected|paren"):
        metrics_in("rate(ray_x[5m]")


def test_dashboards_and_alerts_name_what_ray_exports(scraped: dict[str, str]) -> None:
    named = set().union(*(metrics_in(expression) for expression in expressions()))
    there = {name + suffix for name, kind in scraped.items() for suffix in suffixes(kind)}
    # Of GPUs a machine without one shows nothing; Ray's own dashboards name the same.
    panels = (
        Path(ray.__file__).parent / "dashboard/modules/metrics/dashboards/default_dashboard_panels.py"
    ).read_text()
    gpu = {name for name in named if "gpu" in name and name in panels}
    assert named - there - gpu == set()


def suffixes(kind: str) -> tuple[str, ...]:
    return ("", "_bucket", "_sum", "_count") if kind == "histogram" else ("",)


def test_training_shows_its_own_numbers(scraped: dict[str, str]) -> None:
    assert {f"ray_{PREFIX}{name}" for name in GAUGES} <= set(scraped)


def test_what_a_dashboard_refers_to_is_a_datasource_by_choice() -> None:
    for path in DASHBOARDS:
        board = json.loads(path.read_text())
        assert board["uid"]
        assert board["title"]
        assert {panel["datasource"]["uid"] for panel in board["panels"] if "targets" in panel} == {"${datasource}"}
        assert board["templating"]["list"][0]["type"] == "datasource"


def test_every_alert_says_what_to_do() -> None:
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    assert {"SwapStuck", "ReplicaFailing", "DataStarvation"} <= {rule["alert"] for rule in rules}
    for rule in rules:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert {"summary", "description"} <= set(rule["annotations"])
