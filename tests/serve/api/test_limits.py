"""Limits over real connections: what TestClient would hand over at once arrives in pieces here."""

import logging
import socket
import time

import httpx
import pytest

from animediffusion.serve.api.app import create_app
from animediffusion.serve.api.limits import MAX_HEAD_BYTES

LIMIT = 300_000
HEAD = b"POST /v1/colorize HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
PART = b'--b\r\nContent-Disposition: form-data; name="sketch"; filename="s"\r\n\r\n'


@pytest.fixture(scope="module")
def small_url(replica, serving):
    """A server that takes 300 kB."""
    with serving(create_app(replica, max_body_bytes=LIMIT)) as url:
        yield url


@pytest.fixture(scope="module")
def hasty_url(replica, serving):
    """A server that takes what arrives within half a second."""
    with serving(create_app(replica, upload_timeout_s=0.5)) as url:
        yield url


def connect(url):
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def status_of(connection):
    answer = b""
    while b"\r\n" not in answer:
        piece = connection.recv(4096)
        if not piece:
            break
        answer += piece
    return int(answer.split()[1]) if answer else 0


def check_problem(response, status):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["request_id"] == response.headers["x-request-id"]


def test_a_chunked_body_is_counted_while_it_arrives(small_url):
    sent = 0
    with connect(small_url) as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"%x\r\n%s\r\n" % (len(PART), PART))
        connection.settimeout(0.001)
        while sent < 20 * LIMIT:
            connection.settimeout(5)
            connection.sendall(b"2710\r\n" + bytes(10_000) + b"\r\n")
            sent += 10_000
            connection.settimeout(0.001)
            try:
                answer = connection.recv(4096)
            except TimeoutError:
                continue
            break
    assert answer.startswith(b"HTTP/1.1 413")
    assert sent > LIMIT - 10_000


def test_a_body_that_is_announced_too_large_is_not_read(small_url):
    for length in (b"300001", b"9" * 30):
        with connect(small_url) as connection:
            connection.sendall(HEAD + b"Content-Length: " + length + b"\r\n\r\n")
            assert status_of(connection) in (400, 413)


def test_a_chunked_body_within_the_limit_is_taken(url, files):
    request = httpx.Request("POST", f"{url}/v1/colorize", files=files)
    body = request.read()
    pieces = (body[start : start + 1000] for start in range(0, len(body), 1000))
    headers = {"Content-Type": request.headers["content-type"]}
    assert httpx.post(request.url, content=pieces, headers=headers, timeout=30).status_code == 200


def test_a_body_that_does_not_arrive_in_time_is_given_up(hasty_url):
    started = time.monotonic()
    with connect(hasty_url) as connection:
        connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n" + PART)
        assert status_of(connection) == 408
        assert time.monotonic() - started > 0.4


def test_the_time_for_the_body_is_not_the_time_for_the_picture(hasty_url, files):
    steps = {"num_inference_steps": "100", "sampler": "heun", "guidance_scale": "3"}
    started = time.monotonic()
    answered = httpx.post(f"{hasty_url}/v1/colorize", files=files, data=steps, timeout=60)
    assert answered.status_code == 200
    assert time.monotonic() - started > 0.5


def test_headers_have_a_limit(url):
    check_problem(httpx.get(f"{url}/healthz", headers={"X-Filler": "x" * MAX_HEAD_BYTES}), 431)
    assert httpx.get(f"{url}/healthz", headers={"X-Filler": "x" * (MAX_HEAD_BYTES // 2)}).status_code == 200


def test_no_other_origin_is_let_in_by_a_browser(url):
    for method, path in (("GET", "/v1/models"), ("OPTIONS", "/v1/colorize"), ("POST", "/v1/colorize")):
        headers = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
        answered = httpx.request(method, f"{url}{path}", headers=headers)
        assert not [name for name in answered.headers if name.startswith("access-control")]


def test_a_client_that_disconnects_while_it_uploads_is_not_an_error(url, lines, caplog):
    with connect(url) as connection:
        connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n" + PART)
    assert [line["status"] for line in lines()] == [499]
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
