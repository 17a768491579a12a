import json
import re

import httpx
import pytest

from animediffusion.platform.api_keys import Keyring
from animediffusion.serve.api import access_log
from animediffusion.serve.api.app import create_app

FIELDS = {"time", "method", "path", "status", "seconds", "key", "version", "request_id"}


@pytest.fixture
def client(closed_url, key):
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=closed_url, trust_env=False, timeout=30, headers=headers) as client:
        yield client


def test_every_request_is_one_line(client, lines, files):
    client.get("/v1/models", headers={"X-Request-Id": "mine-1"})
    client.get("/nothing?token=planted")
    client.post("/v1/colorize", files=files)
    client.post("/v1/colorize/stream", files=files)
    lines(4)  # that of a stream is written at its end, which its reader may see first
    client.get("/v1/models", headers={"Authorization": ""})
    found = lines(5)
    assert all(set(line) == FIELDS for line in found)
    assert [(line["method"], line["path"], line["status"], line["key"], line["version"]) for line in found] == [
        ("GET", "/v1/models", 200, "studio", None),
        ("GET", "/nothing", 404, "studio", None),
        ("POST", "/v1/colorize", 200, "studio", "3"),
        ("POST", "/v1/colorize/stream", 200, "studio", "3"),
        ("GET", "/v1/models", 401, "", None),
    ]
    assert found[0]["request_id"] == "mine-1"
    assert all(re.fullmatch("[0-9a-f]{16}", line["request_id"]) for line in found[1:])
    assert all(0 <= line["seconds"] < 30 for line in found)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"]) for line in found)


@pytest.mark.parametrize("given", ["two words", "x" * 65, 'a"b', "\u00e9".encode().decode("latin-1"), ""])
def test_an_id_that_could_forge_a_line_is_replaced(client, lines, given):
    answered = client.get("/v1/models", headers={"X-Request-Id": given.encode("latin-1")})
    [line] = lines()
    assert line["request_id"] == answered.headers["x-request-id"] != given


def test_a_path_stays_within_its_line(client, lines):
    client.get(f"/%0A%7B%22status%22%3A200%7D{'x' * 500}")
    [line] = lines()
    assert line["path"].startswith('/\n{"status":200}')
    assert len(line["path"]) == access_log.MAX_PATH


class Broken:
    async def colorize(self, job):
        raise RuntimeError(f"inside {job.key}")


def test_a_failure_of_ours_is_logged_under_the_id_that_the_client_gets(serving, key, key_file, files, lines, caplog):
    with serving(create_app(Broken(), keyring=Keyring(key_file.uri))) as url:
        headers = {"Authorization": f"Bearer {key}", "X-Request-Id": "mine-2"}
        answered = httpx.post(f"{url}/v1/colorize", files=files, headers=headers)
    assert (answered.status_code, answered.json()["request_id"]) == (500, "mine-2")
    assert "inside" not in answered.text
    assert [(line["status"], line["request_id"]) for line in lines()] == [(500, "mine-2")]
    assert "request mine-2 failed" in caplog.text
    assert "RuntimeError: inside studio" in caplog.text


def test_a_key_is_found_nowhere(client, lines, files, key, key_file, tmp_path, caplog, capfd):
    """In no line, log, repr, error or answer; where a client puts it does not matter."""
    answers = [
        client.post("/v1/colorize", files=files),
        client.post("/v1/colorize", files=files, data={key: key}),
        client.post("/v1/colorize", files=files, data={"seed": "1"}, params={"key": key}),
        client.post("/v1/colorize", content=b"?", headers={"Content-Type": f"multipart/form-data; boundary={key[:9]}"}),
        client.get("/v1/models", headers={"Cookie": f"key={key}", "Authorization": f"Bearer  {key}"}),
        client.get("/v1/models", headers={"Authorization": f"Bearer {key}x"}),
        client.get("/v1/models", headers={"Authorization": f"Basic {key}"}),
    ]
    keyring = Keyring(key_file.uri)
    # What httpx says of its own requests is the client's.
    logged = "".join(record.getMessage() for record in caplog.records if not record.name.startswith("http"))
    written = json.dumps(lines(7)) + logged + "".join(capfd.readouterr())
    shown = f"{keyring!r} {vars(keyring)!r} {key_file!r} {key_file.entries()!r}"
    logged = "".join(
        f"{answer.status_code} {answer.headers!r} {answer.text}" for answer in answers if answer != answers[1]
    )
    assert key not in written + shown + logged
    assert [answer.status_code for answer in answers] == [200, 422, 422, 400, 200, 401, 401]
