"""The whole application on Ray Serve with keys in a store, and what it leaves in the logs."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import ray
from ray import serve

from animediffusion.platform.api_keys import Keys
from animediffusion.platform.cluster import cluster
from animediffusion.serve.deployments import APP_NAME, ServeConfig
from animediffusion.serve.server import start


@dataclass(frozen=True)
class Closed:
    """The running application."""

    url: str
    keys: Keys
    key: str
    log: Path
    """The file of the access log."""
    messages: list[str]
    """What was said while it started."""


@pytest.fixture(scope="module")
def closed(serve_port, tmp_path_factory, bundle_folder):
    """It has to wait for CPUs when it starts."""
    folder, messages = tmp_path_factory.mktemp("closed"), []
    keys, log = Keys("s3://bucket/closed/keys.json"), folder / "logs" / "requests.jsonl"
    key = keys.create("studio")
    config = ServeConfig(model=str(bundle_folder), workspace=folder, keys=keys.uri, request_log=log)
    group = ray.util.placement_group([{"CPU": 2}])
    ray.get(group.ready())

    def tell(line):
        messages.append(line)
        ray.util.remove_placement_group(group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "WAITS_S", 1.0)
        patch.setattr(cluster, "WATCH_S", 0.5)
        url = start(config, port=serve_port, report=tell)
    yield Closed(url, keys, key, log, messages)
    serve.delete(APP_NAME)


def test_a_start_that_waits_for_cpus_says_so(closed):
    [line] = closed.messages
    assert line.startswith("waiting: the cluster has no room for")
    assert "0 of 2 CPU free" in line


def test_the_application_on_ray_asks_for_a_key_and_writes_a_line_for_every_request(closed, files):
    url, key, keys, log = closed.url, closed.key, closed.keys, closed.log
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        refused = client.post("/v1/colorize", files=files)
        assert (refused.status_code, refused.headers["content-type"]) == (401, "application/problem+json")
        assert refused.headers["www-authenticate"].startswith("Bearer")
        assert client.get("/v1/models").status_code == 401
        assert [client.get(path).status_code for path in ("/healthz", "/readyz", "/", "/docs", "/examples")] == [
            200
        ] * 5
        end = time.monotonic() + 30
        while '"/examples"' not in log.read_text() and time.monotonic() < end:
            time.sleep(0.1)  # a line is written after its answer
        client.headers["Authorization"] = f"Bearer {key}"
        before = len(log.read_text().splitlines())
        named = {"X-Request-Id": "mine-4"}
        picture = client.post("/v1/colorize", files=files, data={"seed": "1"}, headers=named)
        assert (picture.status_code, picture.headers["x-request-id"]) == (200, "mine-4")
        stream = client.post("/v1/colorize/stream", files=files, data={"seed": "1"})
        assert "event: result" in stream.text
        odd = client.get("/v1/models", headers={"X-Request-Id": "two words"})
        keys.revoke("studio")
        end = time.monotonic() + 30
        while client.get("/v1/models").status_code == 200 and time.monotonic() < end:
            time.sleep(0.1)
        assert client.get("/v1/models").status_code == 401
    lines = [json.loads(line) for line in log.read_text().splitlines()][before:]
    version = picture.headers["x-model-version"]
    assert [(line["path"], line["status"], line["key"], line["version"]) for line in lines[:3]] == [
        ("/v1/colorize", 200, "studio", version),
        ("/v1/colorize/stream", 200, "studio", version),
        ("/v1/models", 200, "studio", None),
    ]
    answers = [picture, stream, odd]
    assert [line["request_id"] for line in lines[:3]] == [answer.headers["x-request-id"] for answer in answers]
    assert lines[0]["request_id"] == "mine-4"
    assert lines[2]["request_id"] != "two words"
    time.sleep(1)  # Ray's processes write their logs with a delay
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    written = [path for path in session.rglob("*") if path.is_file() and not path.is_socket()]
    assert any("ingress" in path.name for path in written)
    assert [path for path in [*written, log] if key.encode() in path.read_bytes()] == []
