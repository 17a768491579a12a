"""What Ray Serve's proxy answers itself: with a stand-in for Serve that does as Serve does, and with the real one."""

import asyncio
import os

import httpx
import pytest
from ports import free_port
from ray import serve
from ray.serve._private.http_util import convert_object_to_asgi_messages

from animediffusion.serve.api.problems import MEDIA_TYPE
from animediffusion.serve.proxy import ProxyErrors

PROBLEM = "application/problem+json"


def check_problem(response, status):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == PROBLEM
    body = response.json()
    assert body["status"] == status
    assert body["request_id"] == response.headers["x-request-id"]
    return body


def behind(app, **options):
    """A client of the middleware around an ASGI application."""
    limits = {"max_body_bytes": 1000, "upload_timeout_s": 0.2, **options}
    transport = httpx.ASGITransport(ProxyErrors(app, **limits))
    return httpx.AsyncClient(transport=transport, base_url="http://proxy")


def saying(status, text="words of Serve", **headers):
    """An application that answers as Serve's proxy does."""

    async def app(scope, receive, send):
        extra = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        for message in convert_object_to_asgi_messages(text, status_code=status, extra_headers=extra):
            await send(message)

    return app


async def reading(scope, receive, send):
    """Takes in the whole body before it answers, as Serve's proxy does, and ends silently when the client leaves."""
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size += len(message["body"])
        if not message.get("more_body"):
            break
    headers = {name.decode(): value.decode() for name, value in scope["headers"]}
    for message in convert_object_to_asgi_messages({"size": size, "headers": headers}, status_code=200):
        await send(message)


def ask(app, method="GET", path="/", **request):
    async def once():
        async with behind(app) as client:
            return await client.request(method, path, **request)

    return asyncio.run(once())


@pytest.mark.parametrize(("said", "status"), [(404, 404), (408, 504), (429, 429), (500, 500), (503, 503)])
def test_a_text_of_serve_becomes_a_problem(said, status):
    response = ask(saying(said))
    body = check_problem(response, status)
    assert "words of Serve" not in body["detail"]
    assert response.headers["x-content-type-options"] == "nosniff"
    assert ("retry-after" in response.headers) == (status in (429, 503))


def test_the_wait_that_serve_asks_for_is_kept():
    assert ask(saying(429, retry_after="7")).headers["retry-after"] == "7"


def test_a_replica_that_died_silently_is_a_problem():
    async def silent(scope, receive, send):
        await receive()

    assert check_problem(ask(silent), 503)["detail"].startswith("the process that handled the request has died")


def test_an_error_of_the_proxy_is_a_problem_without_its_text():
    async def broken(scope, receive, send):
        raise UnicodeDecodeError("utf-8", b"planted", 0, 1, "planted")

    assert "planted" not in str(check_problem(ask(broken), 500))


def test_what_an_application_answers_passes_untouched():
    async def app(scope, receive, send):
        headers = [(b"content-type", MEDIA_TYPE.encode()), (b"x-own", b"1")]
        await send({"type": "http.response.start", "status": 422, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"own": 1}'})

    response = ask(app)
    assert (response.status_code, response.json(), response.headers["x-own"]) == (422, {"own": 1}, "1")


def test_a_body_is_limited_before_serve_keeps_it_in_memory():
    async def pieces():
        for _ in range(100):
            yield bytes(100)

    check_problem(ask(reading, "POST", content=pieces()), 413)
    check_problem(ask(reading, "POST", content=bytes(1001)), 413)
    assert ask(reading, "POST", content=bytes(1000)).json()["size"] == 1000


def test_a_body_that_is_too_slow_is_a_problem():
    async def slow():
        yield b"x"
        await asyncio.sleep(2)
        yield b"y"

    check_problem(ask(reading, "POST", content=slow()), 408)


def test_clients_cannot_steer_serve():
    steering = {
        "X-Request-Timeout-Seconds": "0.001",
        "x-request-disconnect-disabled": "?1",
        "serve_multiplexed_model_id": "x",
        "Serve-Multiplexed-Model-Id": "x",
        "X-Session-Id": "x",
        "X-Request-Id": "two words",
        "X-Other": "kept",
    }
    headers = ask(reading, headers=steering).json()["headers"]
    assert headers["x-other"] == "kept"
    assert headers["x-request-id"] != "two words"
    assert not {name.lower() for name in steering} - {"x-other", "x-request-id"} & set(headers)


def test_the_proxys_access_log_has_only_the_answers_of_serve_itself(lines):
    ask(saying(404), path="/nowhere")
    ask(reading)
    [line] = lines()
    assert (line["path"], line["status"], line["key"]) == ("/nowhere", 404, "")


@pytest.fixture
def real_proxy(ray_cluster):
    """Address of a Serve whose requests time out soon."""
    port = free_port()
    serve.shutdown()  # the one of other tests
    serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": 2})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.mark.ray
def test_the_real_proxy_answers_with_problems(real_proxy):
    class Dying:  # here, so that it travels to the replica as it is
        async def __call__(self, request):
            if request.url.path.endswith("/die"):
                os._exit(1)
            await asyncio.sleep(30)

    with httpx.Client(base_url=real_proxy, trust_env=False, timeout=30) as client:
        check_problem(client.get("/before/anything/is/deployed", headers={"X-Request-Id": "mine-3"}), 404)
        dying = serve.deployment(Dying).options(ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=2)
        serve.run(dying.bind(), name="dying", route_prefix="/dying")
        check_problem(client.get("/elsewhere"), 404)
        check_problem(client.get("/dying/slow", headers={"X-Request-Timeout-Seconds": "0"}), 504)
        check_problem(client.get("/dying/die"), 503)
        check_problem(client.post("/dying/slow", content=bytes(40 * 2**20)), 413)
        bad = client.get("/dying/slow", headers={"serve_multiplexed_model_id": b"\xff", "X-Request-Id": b"\xff"})
        check_problem(bad, 504)
        assert client.get("/-/healthz").status_code == 200
