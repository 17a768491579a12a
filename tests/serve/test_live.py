"""The application on a real Ray, while versions come and go: one deployment for all tests here, in any order."""

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import ray
from breakage import broken_copy, not_finite
from ray import serve

from animediffusion.models.bundle import SamplerDefaults, identity, with_sampler
from animediffusion.pipelines.release import release
from animediffusion.pipelines.release.canary import canary
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import BundleError
from animediffusion.platform.images.codec import decode_rgb
from animediffusion.platform.registry.client import Registry
from animediffusion.serve.deployments import APP_NAME, ServeConfig
from animediffusion.serve.server import start

pytestmark = pytest.mark.ray

FOLLOWS_WITHIN_S = 10.0


class Studio:
    """A client of the application, and the registry behind it."""

    def __init__(self, url: str, registry: Registry, files) -> None:
        self.registry, self.files, self.settings = registry, files, registry.settings
        self.client = httpx.Client(base_url=url, trust_env=False, timeout=120)

    def color(self, seed: int = 1, **options: str) -> httpx.Response:
        data = {"seed": str(seed), "num_inference_steps": "2", "size": "model", **options}
        return self.client.post("/v1/colorize", files=self.files, data=data)

    def models(self) -> dict:
        return self.client.get("/v1/models").json()

    def total(self, *counts: str) -> int:
        return sum(replica[count] for replica in self.models()["replicas"] for count in counts)

    def errors(self) -> list[str]:
        return [replica["error"] for replica in self.models()["replicas"] if replica["error"]]

    def serve_champion(self, version: str) -> float:
        """Wait until all pictures are made by a version, and return the seconds; a request wakes an engine up."""
        self.color()
        return self.seconds_until(lambda: self.models()["traffic"] == {version: 1.0})

    def seconds_until(self, condition) -> float:
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < 60
            time.sleep(0.1)
        return time.monotonic() - began


class Load:
    """Requests without a pause, from a thread, while a with block runs."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.answers: list[tuple[int, str]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            # Many steps, so that an engine is making a picture at the moment when its version is replaced.
            answer = self.studio.color(seed=len(self.answers), num_inference_steps="50")
            self.answers.append((answer.status_code, answer.headers.get("x-model-version", answer.text)))

    @property
    def latest(self) -> str:
        return self.answers[-1][1] if self.answers else ""


@pytest.fixture(scope="module")
def registry(tmp_path_factory, bundle_folder):
    """Versions 1 and 2 work; 3 makes pictures that are not finite."""
    folder = tmp_path_factory.mktemp("live")
    with_sampler(bundle_folder, folder / "other", SamplerDefaults(name="euler", steps=2))
    broken_copy(bundle_folder, folder / "broken", not_finite)
    registry = Registry(Settings(workspace=folder / "workspace"))
    for bundle in (bundle_folder, folder / "other", folder / "broken"):
        registry.register(bundle, sha256=identity(bundle))
    return registry


@pytest.fixture(scope="module")
def config(registry):
    """Settings of an application that starts without an engine, and whose engines follow the registry quickly."""
    yield ServeConfig(workspace=registry.settings.workspace, min_replicas=0, max_batch=4, poll_s=0.5, engine_cpus=0.5)
    serve.delete(APP_NAME)


@pytest.fixture
def studio(serve_port, registry, config, files):
    """The running application, with version 1 as champion."""
    if registry.alias("champion") != 1:
        release.promote(registry.settings, 1, force=True)
    if APP_NAME not in serve.status().applications:
        start(config, port=serve_port)
    studio = Studio(f"http://127.0.0.1:{serve_port}", registry, files)
    yield studio
    studio.client.close()


@pytest.fixture
def sleeping_studio(studio, serve_port, config):
    """The running application, without an engine."""
    if studio.models()["replicas"]:
        serve.delete(APP_NAME)
        start(config, port=serve_port)
    return studio


def test_the_starter_model_answers_while_there_is_no_champion(studio):
    studio.registry.client.delete_registered_model_alias(studio.registry.name, "champion")
    studio.serve_champion("starter")
    answer = studio.color()
    assert (answer.status_code, answer.headers["x-model-version"]) == (200, "starter")
    assert studio.models()["desired"] == {"champion": None, "challenger": None}
    release.promote(studio.settings, 1, force=True)
    assert studio.serve_champion("1") < FOLLOWS_WITHIN_S
    assert studio.color().headers["x-model-version"] == "1"


def test_a_request_wakes_an_engine_up(sleeping_studio):
    studio = sleeping_studio
    asleep = studio.models()
    assert (asleep["desired"]["champion"], asleep["traffic"], asleep["replicas"]) == ("1", {}, [])
    assert studio.client.get("/readyz").status_code == 200
    answer = studio.color()
    assert (answer.status_code, answer.headers["x-model-version"]) == (200, "1"), answer.text
    awake = studio.models()
    assert awake["traffic"] == {"1": 1.0}
    [engine] = awake["replicas"]
    assert set(engine) == {"id", "versions", "state", "device", "attention", "running", "queued", "error"}
    assert (engine["versions"], engine["state"], engine["error"]) == (["1"], "ready", None)


def test_the_application_answers_behind_serves_proxy_as_without_it(studio, sketch):
    first = studio.color(size="native")
    assert (first.status_code, first.headers["x-model-version"]) == (200, "1"), first.text
    assert "," not in first.headers["x-request-id"]
    assert decode_rgb(first.content).shape == sketch.shape
    client, files = studio.client, studio.files

    wrong = studio.color(sampler="magic")
    assert (wrong.status_code, wrong.headers["content-type"]) == (422, "application/problem+json")
    stream = client.post("/v1/colorize/stream", files=files, data={"num_inference_steps": "3"})
    assert stream.text.count("event: progress") == 2
    assert stream.text.count("event: result") == 1
    form = client.build_request("POST", "/v1/colorize", files=files, data={"seed": "1"})
    kind = {"Content-Type": form.headers["content-type"]}
    cut_off = client.post("/v1/colorize", content=form.read()[:-10], headers=kind)
    assert cut_off.status_code == 400, cut_off.text
    assert "ends early" in cut_off.json()["detail"]
    assert client.post("/v1/colorize?seed=1", files=files).json()["errors"][0]["field"] == "seed"
    compressed = {"Content-Encoding": "gzip", "Content-Type": "multipart/form-data; boundary=b"}
    assert client.post("/v1/colorize", content=b"x", headers=compressed).status_code == 415
    slash = client.post("/v1/colorize/", files=files, headers={"X-Forwarded-Prefix": "/anime"})
    assert (slash.status_code, slash.headers["content-type"]) == (404, "application/problem+json")
    assert client.options("/v1/colorize").headers["allow"] == "POST"
    for path in ("/", "/healthz", "/readyz", "/v1/models", "/openapi.json"):
        head = client.head(path)
        assert (head.status_code, head.content) == (200, b"")


def test_a_crowd_learns_when_to_retry(studio):
    with ThreadPoolExecutor(40) as pool:
        crowd = list(pool.map(lambda _: studio.color(num_inference_steps="30"), range(40)))
    assert {answer.status_code for answer in crowd} == {200, 429}
    assert all(int(answer.headers["retry-after"]) for answer in crowd if answer.status_code == 429)


def test_versions_come_and_go_under_load_and_no_request_fails(studio):
    with Load(studio) as load:
        studio.seconds_until(lambda: load.latest == "1")

        release.promote(studio.settings, 2, force=True)
        assert studio.seconds_until(lambda: load.latest == "2") < FOLLOWS_WITHIN_S

        with pytest.raises(BundleError, match="version 3"):
            release.promote(studio.settings, 3, force=True)  # the gate, even so
        studio.registry.set_alias("champion", 3)  # around the gate
        studio.seconds_until(studio.errors)
        before = len(load.answers)
        studio.seconds_until(lambda: len(load.answers) > before + 3)
        assert load.latest == "2"
        models = studio.models()
        assert models["desired"]["champion"] == "3"
        assert models["traffic"] == {"2": 1.0}
        assert "not a finite" in models["replicas"][0]["error"]
        assert models["replicas"][0]["state"] == "ready"

        assert release.rollback(studio.settings).version == 2
        assert release.rollback(studio.settings).version == 1
        assert studio.seconds_until(lambda: load.latest == "1") < FOLLOWS_WITHIN_S
        assert studio.seconds_until(lambda: not studio.errors()) < FOLLOWS_WITHIN_S

    assert {status for status, _ in load.answers} == {200}, Counter(load.answers)
    assert {version for _, version in load.answers} == {"1", "2"}


def test_a_canary_gets_its_part_and_gives_it_back(studio):
    studio.serve_champion("1")
    release.promote(studio.settings, 2, alias="challenger", force=True)
    canary(studio.settings, 40)
    assert studio.seconds_until(lambda: len(studio.models()["traffic"]) == 2) < FOLLOWS_WITHIN_S
    models = studio.models()
    assert models["traffic"] == {"1": 0.6, "2": 0.4}
    assert models["desired"] == {"champion": "1", "challenger": "2"}
    drawn = [studio.color(seed).headers["x-model-version"] for seed in range(15)]
    assert set(drawn) == {"1", "2"}
    assert [studio.color(seed).headers["x-model-version"] for seed in range(15)] == drawn
    canary(studio.settings, 0)
    assert studio.serve_champion("1") < FOLLOWS_WITHIN_S


def test_prometheus_finds_what_the_engines_count(studio):
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def scraped() -> list[str]:
        lines = httpx.get(url, trust_env=False, timeout=10).text.splitlines()
        return [line for line in lines if line.startswith("ray_animediffusion_")]

    def counted(name: str, *labels: str) -> bool:
        found = [line for line in scraped() if line.startswith(f"ray_animediffusion_{name}{{")]
        return any(all(label in line for label in labels) and float(line.split()[-1]) > 0 for line in found)

    release.promote(studio.settings, 2, force=True)
    studio.serve_champion("2")
    studio.color()
    studio.registry.set_alias("champion", 3)  # without the checks of a promotion
    studio.seconds_until(studio.errors)
    studio.seconds_until(lambda: counted("requests_total", 'version="2"', 'outcome="ok"'))
    studio.seconds_until(lambda: counted("swaps_total", 'version="3"', 'outcome="failed"'))
    assert {line.partition("{")[0] for line in scraped()} >= {
        "ray_animediffusion_queued",
        "ray_animediffusion_running",
        "ray_animediffusion_occupancy",
        "ray_animediffusion_traffic_share",
        "ray_animediffusion_versions_missing",
        "ray_animediffusion_requests_total",
        "ray_animediffusion_swaps_total",
        "ray_animediffusion_turns_total",
        "ray_animediffusion_reference_cache_total",
        "ray_animediffusion_turn_seconds_bucket",
        "ray_animediffusion_turn_seconds_count",
    }


def test_pictures_that_are_being_made_are_finished_when_the_application_ends(studio):
    slow = {"num_inference_steps": "100", "sampler": "heun", "guidance_scale": "2"}
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(studio.client.post, "/v1/colorize", files=studio.files, data=slow) for _ in range(4)]
        studio.seconds_until(lambda: studio.total("running", "queued") == 4)
        serve.delete(APP_NAME)
    assert [answer.result().status_code for answer in answers] == [200] * 4
