import concurrent.futures
import io
import queue
import socket
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import ray
from PIL import Image
from ports import free_port
from ray import serve

from animediffusion.models.bundle import SamplerDefaults, identity, with_sampler
from animediffusion.platform.api_keys import Keys
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import BundleError, ConfigError, RegistryError
from animediffusion.platform.images.codec import encode_png
from animediffusion.platform.registry.client import Registry
from animediffusion.serve.deployments import ServeConfig, build_app
from animediffusion.serve.server import _config, _for_host, check_address, check_model, running, start

MULTIPART = {"Content-Type": "multipart/form-data; boundary=b"}


def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}: already in use; choose another with --port"):
            check_address("127.0.0.1", port)


def test_an_address_of_another_machine_is_not_called_in_use() -> None:
    with pytest.raises(ConfigError, match=r"^--host: '192\.0\.2\.1' \(.*\); an address of this machine"):
        check_address("192.0.2.1", free_port(), is_open=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_only_loopback_is_served(host: str):
    with pytest.raises(ConfigError, match="--host"):
        check_address(host, free_port())


def test_a_server_with_keys_may_listen_anywhere():
    check_address("0.0.0.0", free_port(), is_open=False)


def test_an_application_without_keys_is_not_built_unless_that_is_meant(tmp_path):
    closed = ServeConfig(workspace=tmp_path, engine_gpus=0)
    meant = ServeConfig(workspace=tmp_path, engine_gpus=0, allow_anonymous=True)
    with pytest.raises(ConfigError, match=r"API keys: none in .*keys\.json; make one .* or set allow_anonymous"):
        build_app(closed)
    assert build_app(meant)
    keys = Keys(str(tmp_path / "keys.json"))
    keys.create("studio")
    assert build_app(closed)
    keys.revoke("studio")
    for config in (closed, meant):  # a key was made once: that its owner wants it open to all is not to be guessed
        with pytest.raises(ConfigError, match="API keys"):
            build_app(config)


def test_the_keys_of_a_cluster_may_be_in_a_store(moto_server, tmp_path):
    uri = f"s3://bucket/{tmp_path.name}/keys.json"
    config = ServeConfig(workspace=tmp_path, keys=uri, engine_gpus=0)
    with pytest.raises(ConfigError, match=uri):
        build_app(config)
    Keys(uri).create("studio")
    assert build_app(config)


def test_engines_on_other_nodes_use_the_workspaces_of_those(tmp_path, monkeypatch):
    settings = Settings(workspace=tmp_path)
    assert _config(settings, None, {}).workspace == tmp_path
    monkeypatch.setenv("RAY_ADDRESS", "ray:6379")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    config = _config(settings, None, {})
    assert (config.workspace, config.request_log) == (None, None)
    assert config.keys == str(tmp_path / "keys.json")


def test_the_log_of_requests_is_in_the_workspace_where_that_can_be_written(tmp_path):
    assert _config(Settings(workspace=tmp_path), None, {}).request_log == tmp_path / "logs" / "requests.jsonl"
    assert _config(Settings(workspace=Path("/proc/workspace")), None, {}).request_log is None


def test_a_folder_is_given_to_replicas_by_its_full_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for model, meant in (
        ("run:1/b", str(tmp_path / "run:1/b")),
        ("s3://b/k", "s3://b/k"),
        ("models:/a/1", "models:/a/1"),
    ):
        assert _config(Settings(workspace=tmp_path), model, {}).model == meant


def test_a_limit_of_bodies_that_is_no_number_is_refused_before_anything_starts(tmp_path, monkeypatch):
    for value in ("32MiB", "0", "-1"):
        monkeypatch.setenv("ANIMEDIFFUSION_MAX_BODY_BYTES", value)
        with (
            pytest.raises(ConfigError, match=f"ANIMEDIFFUSION_MAX_BODY_BYTES: '{value}'; a number of bytes"),
            running(Settings(workspace=tmp_path), ServeConfig(workspace=tmp_path)),
        ):
            pass


def test_an_ingress_on_a_node_without_the_keys_lets_nobody_in(tmp_path):
    config = ServeConfig(workspace=tmp_path)
    assert _for_host(config, "127.0.0.1").allow_anonymous
    Keys(str(tmp_path / "keys.json")).create("studio")
    assert not _for_host(config, "127.0.0.1").allow_anonymous


def test_a_free_port_is_fine():
    check_address("127.0.0.1", free_port())


def test_a_missing_or_damaged_model_is_found_before_anything_starts(tmp_path, bundle_folder):
    settings = Settings(workspace=tmp_path / "workspace")
    with pytest.raises(RegistryError, match="no version"):
        check_model(settings, None)
    with pytest.raises(BundleError, match="no such folder"):
        check_model(settings, str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match="is not a bundle"):
        check_model(settings, str(tmp_path / "empty"))
    check_model(settings, str(bundle_folder))


@pytest.fixture
def served(ray_cluster, tmp_path, bundle_folder):
    """(URL, registry): version 1 is champion and served, version 2 waits."""
    settings = Settings(workspace=tmp_path / "workspace")
    other = tmp_path / "other"
    with_sampler(bundle_folder, other, SamplerDefaults(name="euler", steps=2))
    registry = Registry(settings)
    for folder in (bundle_folder, other):
        registry.register(folder, sha256=identity(folder))
    registry.set_alias("champion", 1)
    config = ServeConfig(workspace=settings.workspace, max_batch=4, poll_s=0.5)
    yield start(config, port=free_port()), registry
    serve.shutdown()


@pytest.mark.ray
def test_the_application_on_ray_answers_follows_a_promotion_and_says_when_it_is_full(served, sketch, reference):
    url, registry = served
    files = {"sketch": ("s.png", encode_png(sketch)), "reference": ("r.png", encode_png(reference))}

    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:

        def color(**data: str) -> httpx.Response:
            return client.post("/v1/colorize", files=files, data={"seed": "1", **data})

        first = color()
        assert first.status_code == 200, first.text
        assert first.headers["x-model-version"] == "1"
        assert "," not in first.headers["x-request-id"]
        assert np.array(Image.open(io.BytesIO(first.content))).shape == sketch.shape

        wrong = color(sampler="magic")
        assert (wrong.status_code, wrong.headers["content-type"]) == (422, "application/problem+json")
        stream = client.post("/v1/colorize/stream", files=files, data={"num_inference_steps": "3"})
        assert stream.text.count("event: progress") == 2
        assert stream.text.count("event: result") == 1

        form = client.build_request("POST", "/v1/colorize", files=files, data={"seed": "1"})
        cut_off = client.post(
            "/v1/colorize", content=form.read()[:-10], headers={"Content-Type": form.headers["content-type"]}
        )
        assert cut_off.status_code == 400, cut_off.text
        assert "ends early" in cut_off.json()["detail"]
        assert client.post("/v1/colorize?seed=1", files=files).json()["errors"][0]["field"] == "seed"
        assert (
            client.post("/v1/colorize", content=b"x", headers={"Content-Encoding": "gzip", **MULTIPART}).status_code
            == 415
        )
        for path in ("/", "/healthz", "/readyz", "/v1/models", "/openapi.json"):
            head = client.head(path)
            assert (head.status_code, head.content) == (200, b"")
        assert client.options("/v1/colorize").headers["allow"] == "POST"
        slash = client.post("/v1/colorize/", files=files, headers={"X-Forwarded-Prefix": "/anime"})
        assert (slash.status_code, slash.headers["content-type"]) == (404, "application/problem+json")

        with concurrent.futures.ThreadPoolExecutor(40) as pool:
            crowd = list(pool.map(lambda _: color(num_inference_steps="30"), range(40)))
        assert {answer.status_code for answer in crowd} == {200, 429}
        assert all(int(answer.headers["retry-after"]) for answer in crowd if answer.status_code == 429)

        registry.set_alias("champion", 2)
        end = time.monotonic() + 60
        while (answer := color()).headers.get("x-model-version") != "2" and time.monotonic() < end:
            assert answer.status_code == 200, answer.text
            time.sleep(0.1)
        assert answer.headers["x-model-version"] == "2"

        models = client.get("/v1/models").json()
        assert models["desired"]["champion"] == "2"
        assert models["traffic"] == {"2": 1.0}
        assert [one["state"] for one in models["replicas"]] == ["ready"]
        assert client.get("/readyz").status_code == 200


@pytest.mark.ray
def test_a_start_that_waits_for_cpus_says_so(ray_cluster, tmp_path, bundle_folder):
    group = ray.util.placement_group([{"CPU": 2}])
    ray.get(group.ready())
    told = queue.SimpleQueue()
    config = ServeConfig(model=str(bundle_folder), workspace=tmp_path)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            starting = pool.submit(start, config, port=free_port(), report=told.put)
            line = told.get(timeout=120)
        finally:
            ray.util.remove_placement_group(group)
        assert starting.result(timeout=120).startswith("http://127.0.0.1:")
    serve.shutdown()
    assert line.startswith("waiting: the cluster has no room for")
    assert "0 of 2 CPU free" in line
