"""Who is let in, over HTTP, with the real application and replica."""

import time

import httpx
import pytest

from animediffusion.models.sampler_options import SamplerOptions
from animediffusion.platform.api_keys import REFRESH_S, Keyring, Keys
from animediffusion.platform.errors import BusyError, ConfigError
from animediffusion.serve.api.app import create_app
from animediffusion.serve.api.auth import PUBLIC
from animediffusion.serve.client.remote import API_KEY, RemoteColorizer

PROBLEM = "application/problem+json"


@pytest.fixture
def client(closed_url):
    with httpx.Client(base_url=closed_url, trust_env=False, timeout=30) as client:
        yield client


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def check_refused(response):
    assert response.status_code == 401, response.text
    assert response.headers["content-type"] == PROBLEM
    assert response.headers["www-authenticate"].startswith('Bearer realm="animediffusion"')
    assert response.json()["request_id"] == response.headers["x-request-id"]
    assert response.headers["x-content-type-options"] == "nosniff"


def test_every_route_asks_for_a_key_but_those_that_are_public(closed_app, client, key):
    public = set()
    for route in closed_app.routes:
        for method in route.methods:
            path = route.path.replace("{name}", "sketch_1.png")
            response = client.request(method, path)
            if response.status_code == 401:
                assert method == "HEAD" or response.json()["status"] == 401
                opened = client.request(method, path, headers=bearer(key))
                assert opened.status_code in (200, 400), f"{method} {path}"
            else:
                assert response.status_code in (200, 405)
                public.add(route.path)
    scripts = {path for path in public if path.startswith("/scripts/")}
    assert public - scripts == {*PUBLIC, "/examples/{name}"}
    assert "/scripts/page.js" in scripts
    assert {route.path for route in closed_app.routes} > public


@pytest.mark.parametrize(
    "path",
    ["/nothing", "//v1/models", "/v1/models/", "/examples", "/V1/models", "/v1/%6dodels", "/examples/../v1/models"],
)
def test_a_path_that_is_written_in_another_way_opens_nothing(client, path):
    raw = httpx.Request("GET", client.base_url, extensions={"target": path.encode()})
    response = client.send(raw)
    if path == "/examples":
        assert response.status_code == 200
    elif path.startswith("/examples/"):
        assert response.status_code == 404
    else:
        check_refused(response)


def test_head_asks_for_a_key_as_get_does(client, key):
    assert client.head("/v1/models").status_code == client.head("/nothing").status_code == 401
    assert client.head("/v1/models", headers=bearer(key)).status_code == 200


def test_a_picture_needs_a_key_that_is_known(client, files, key):
    check_refused(client.post("/v1/colorize", files=files))
    for wrong in (bearer("ad_wrong"), bearer(key[:-1]), {"Authorization": f"Basic {key}"}, {"Authorization": key}):
        check_refused(client.post("/v1/colorize", files=files, headers=wrong))
    check_refused(client.post("/v1/colorize/stream", files=files))
    assert client.post("/v1/colorize", files=files, headers=bearer(key)).status_code == 200
    assert client.post("/v1/colorize", files=files, headers={"authorization": f"bearer {key}"}).status_code == 200


def test_only_a_client_that_sent_a_key_learns_that_it_is_wrong(client):
    assert "error" not in client.get("/v1/models").headers["www-authenticate"]
    wrong = client.get("/v1/models", headers=bearer("ad_wrong"))
    assert 'error="invalid_token"' in wrong.headers["www-authenticate"]
    assert "ad_wrong" not in wrong.text


def test_a_large_upload_without_a_key_still_gets_its_answer(client):
    check_refused(client.post("/v1/colorize", content=bytes(8 * 2**20), headers={"Content-Type": "image/png"}))


def test_a_running_server_notices_a_new_key_and_a_revoked_one_within_five_seconds(replica, serving, tmp_path):
    assert REFRESH_S < 5
    keys = Keys(str(tmp_path / "keys.json"))
    first = keys.create("first")
    with serving(create_app(replica, keyring=Keyring(keys.uri))) as url, httpx.Client(base_url=url) as client:

        def becomes(status, key):
            end = time.monotonic() + 30
            while time.monotonic() < end:
                if client.get("/v1/models", headers=bearer(key)).status_code == status:
                    return True
                time.sleep(0.1)
            return False

        assert becomes(200, first)
        assert becomes(200, keys.create("second"))
        keys.revoke("first")
        assert becomes(401, first)


class Listener:
    """A backend that keeps the jobs it is asked for."""

    def __init__(self):
        self.jobs = []

    async def colorize(self, job):
        self.jobs.append(job)
        raise BusyError("always")


@pytest.mark.parametrize(("is_closed", "name"), [(True, "studio"), (False, "")])
def test_a_job_carries_the_name_of_its_key(serving, files, key, key_file, is_closed, name):
    backend = Listener()
    app = create_app(backend, keyring=Keyring(key_file.uri if is_closed else None))
    with serving(app) as url:
        assert httpx.post(f"{url}/v1/colorize", files=files, headers=bearer(key)).status_code == 429
    assert [job.key for job in backend.jobs] == [name]


def test_our_client_sends_its_key_and_says_what_is_wrong_with_it(closed_url, files, key, monkeypatch):
    sketch, reference = (files[name][1] for name in ("sketch", "reference"))

    def paint():
        with RemoteColorizer(closed_url) as colorizer:
            return colorizer.colorize(sketch, [reference], SamplerOptions(seed=1), name="a.png")

    monkeypatch.delenv(API_KEY, raising=False)
    with pytest.raises(ConfigError, match=f"{API_KEY}: is not set"):
        paint()
    monkeypatch.setenv(API_KEY, "ad_wrong")
    with pytest.raises(ConfigError, match="rejects this key") as caught:
        paint()
    assert "ad_wrong" not in str(caught.value)
    monkeypatch.setenv(API_KEY, key)
    assert paint().maker == "3"
