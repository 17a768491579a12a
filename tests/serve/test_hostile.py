"""benchmarks/soak.py, in small, and what no upload may ever cause."""

import importlib.util
import os
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from animediffusion.platform.api_keys import Keyring
from animediffusion.serve.api.app import create_app

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.fixture(scope="module")
def soak():
    spec = importlib.util.spec_from_file_location("soak", SOAK)
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["soak"]


@pytest.mark.slow
def test_hostile_requests_get_errors_and_leave_the_server_as_it_was(soak, replica, serving, key, key_file, lines):
    limits = {"max_body_bytes": soak.MAX_BODY_BYTES, "upload_timeout_s": 1.0}
    app = create_app(replica, keyring=Keyring(key_file.uri), **limits)
    with serving(app) as url:
        report = soak.attack(
            url, key, 200, 0, 8, lambda: {"server": psutil.Process(os.getpid()).memory_info().rss / 2**20}
        )
    assert report.failures == report.unanswered == report.taken == 0, soak.table(report, 200, 1)
    assert report.same_picture
    assert report.growth_mib < soak.MAX_GROWTH_MIB
    assert all(report.statuses[name] for name in soak.CASES)
    statuses = {name: set(found) for name, found in report.statuses.items()}
    assert statuses["decompression bomb"] == statuses["bomb as reference"] == {422}
    assert statuses["body over the limit"] == statuses["chunks over the limit"] == {413}
    assert statuses["slow body"] == {408}
    assert statuses["wrong key"] == {401}
    assert statuses["a URL for a file"] <= {400, 422}
    assert statuses["hostile file name"] <= {400, 422, 200}
    written = lines()
    assert max(line["status"] for line in written) < 500
    assert key not in str(written)


PATHS = ["/examples/..%2fapi.py", "/examples/..%2F..%2Fpyproject.toml", "/examples/%2e%2e%2fapi.py", "/..%2fapi.py"]


@pytest.mark.parametrize("path", [*PATHS, "/examples//etc/passwd", "/examples/sketch_1.png%00", "/examples/page.html"])
def test_no_path_leads_to_another_file(url, path):
    with httpx.Client() as client:
        answered = client.get(url, extensions={"target": path.encode()})
    assert answered.status_code == 404
    assert answered.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("name", ["../../a.png", "/etc/passwd", "..\\..\\a.png", "a\u202egnp.exe"])
def test_the_name_of_a_file_has_no_meaning(url, files, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sketch = (name, files["sketch"][1])
    plain = httpx.post(f"{url}/v1/colorize", files=files, data={"seed": "1"}, timeout=30)
    named = httpx.post(f"{url}/v1/colorize", files={**files, "sketch": sketch}, data={"seed": "1"}, timeout=30)
    assert named.status_code == 200
    assert named.content == plain.content
    assert list(tmp_path.rglob("*")) == []


def test_no_address_is_ever_fetched(url, files, serving):
    """Wherever a client writes a URL: a server of ours that listens there hears nothing."""
    heard = []

    async def listener(scope, receive, send):
        heard.append(scope.get("path"))

    with serving(listener, lifespan="off") as target:
        picture = f"{target}/sketch.png"
        svg = f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{picture}"/></svg>'.encode()
        asked = [
            {"files": {"reference": files["reference"]}, "data": {"sketch": picture}},
            {"files": {**files, "sketch": ("s.png", picture.encode())}},
            {"files": {**files, "sketch": ("s.svg", svg, "image/svg+xml")}},
            {"files": {**files, "sketch": (picture, files["sketch"][1])}},
            {"files": files, "data": {"sketch_url": picture}},
            {"json": {"sketch": picture, "reference": picture}},
            {"files": files, "headers": {"Referer": picture, "Link": f"<{picture}>", "X-Forwarded-Host": picture}},
        ]
        answers = [httpx.post(f"{url}/v1/colorize", timeout=30, **one).status_code for one in asked]
        assert httpx.get(f"{url}/examples/{picture}").status_code == 404
        assert httpx.get(f"{target}/heard", timeout=1).status_code == 500
    assert answers == [400, 415, 415, 200, 422, 400, 200]
    assert heard == ["/heard"]
