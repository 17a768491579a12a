"""What stands in Ray Serve's own proxy, before any application: its errors as problems, and limits where bytes arrive.

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=animediffusion.serve.proxy:middlewares

Serve's proxy answers some requests itself, in plain text: no application at the path (404), too many waiting (429), no
replica to answer (503), its own time limit (408), a replica that died on the way (500). It also reads a body into
memory however long it is, before the application has seen a byte, and lets clients set its time limit and name replicas
by headers. This middleware mends all of that. Ray reads the variable when a proxy starts: platform/cluster/connect.py
sets it for what this package starts, infra/docker/Dockerfile for the nodes of a cluster.

Not mended: what uvicorn refuses before any application (a request that is no HTTP: 400), and a connection cut because
the node of the proxy is gone.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from animediffusion.platform.errors import ConfigError
from animediffusion.serve.api import access_log as journal
from animediffusion.serve.api.limits import MAX_BODY_BYTES, SECURITY, UPLOAD_TIMEOUT_S, Body, refusal, request_id_of
from animediffusion.serve.api.problems import MEDIA_TYPE, RETRY_AFTER_S, ProblemError, respond

BODY_VARIABLE = "ANIMEDIFFUSION_MAX_BODY_BYTES"
"""Bytes of a body that the proxy lets through; the applications' own `max_body_bytes` may be less."""

_REQUEST_ID = b"x-request-id"
_STEERING = ("x-request-timeout-seconds", "x-request-disconnect-disabled", "x-session-id", "serve-multiplexed-model-id")
"""Headers by which a client would change what Serve does with its request."""

_DETAILS = {
    404: "no application answers at this path; it may still be starting",
    429: "too many requests are waiting; try again soon",
    503: "no process is there to answer; try again soon",
    504: "the request was not answered in time",
}
_LOST = ProblemError(
    503, "the process that was to answer is gone; try again soon", headers={"Retry-After": str(RETRY_AFTER_S)}
)

log = logging.getLogger(__name__)


def middlewares() -> list[Middleware]:
    """Called by Ray Serve when a proxy starts."""
    journal.write_to(None)
    try:
        limit = max_body_bytes()
    except ConfigError as error:  # a proxy without this middleware would answer worse
        log.error("%s", error)
        limit = MAX_BODY_BYTES
    return [Middleware(ProxyErrors, max_body_bytes=limit)]


def max_body_bytes() -> int:
    """Bytes of a body that the proxy lets through.

    Raises:
        ConfigError: the variable does not hold a number.
    """
    limit = os.environ.get(BODY_VARIABLE) or str(MAX_BODY_BYTES)
    if not limit.isdecimal() or int(limit) < 1:
        raise ConfigError(BODY_VARIABLE, repr(limit), "a number of bytes")
    return int(limit)


class ProxyErrors:
    """ASGI middleware around Serve's proxy.

    Args:
        app: the proxy.
        max_body_bytes: of a request; more is 413.
        upload_timeout_s: for the body to arrive, else 408.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, upload_timeout_s: float = UPLOAD_TIMEOUT_S) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.upload_timeout_s = upload_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id, started = request_id_of(scope), time.monotonic()
        scope = {**scope, "headers": _cleaned(scope["headers"], request_id), "state": {"request_id": request_id}}
        answer = _Answer(send)
        problem = refusal(scope, self.max_body_bytes)
        if problem is None:
            body = _Body(Body(receive, self.max_body_bytes, self.upload_timeout_s))
            problem = await self._ask_serve(scope, body, answer)
        if problem is not None and not answer.is_started:
            await respond(_named(problem, request_id), scope, receive, send)
            journal.write(scope, problem.status, started)

    async def _ask_serve(self, scope: Scope, body: _Body, answer: _Answer) -> ProblemError | None:
        """The problem to answer with, where the application has not answered."""
        try:
            await self.app(scope, body.receive, answer.send)
        except Exception:
            log.exception("request %s failed in the proxy", scope["state"]["request_id"])
            return body.problem or ProblemError(500, "the server failed; the request may be tried again")
        if body.problem is not None or answer.problem is not None:
            return body.problem or answer.problem
        if answer.is_started:
            return None
        # Serve sends nothing at all where a replica died, and uvicorn would make a plain 500 of that.
        return ProblemError(journal.CLIENT_LEFT, "the client closed the connection") if body.client_left else _LOST


class _Body:
    """A body whose problems are kept, and look to Serve as if the client had left."""

    def __init__(self, body: Body) -> None:
        self._body = body
        self.problem: ProblemError | None = None
        self.client_left = False

    async def receive(self) -> Message:
        try:
            message = await self._body.receive()
        except ProblemError as problem:
            self.problem = problem
            return {"type": "http.disconnect"}
        self.client_left = message["type"] == "http.disconnect"
        return message


class _Answer:
    """Passes on what applications answer, and holds back what Serve says itself."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.is_started = False
        self.problem: ProblemError | None = None
        """What was held back, as a problem."""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = Headers(raw=message["headers"])
            if message["status"] >= 400 and headers.get("content-type", "") != MEDIA_TYPE:
                self.problem = _own_words(message["status"], headers)
            else:
                self.is_started = True
        if self.is_started:
            await self._send(message)


def _own_words(status: int, headers: Headers) -> ProblemError:
    """A problem in place of a text of Serve's; its time limit is what others call a gateway's (504)."""
    status = 504 if status == 408 else status
    kept = {"Retry-After": headers["retry-after"]} if "retry-after" in headers else {}
    if status in (429, 503):
        kept.setdefault("Retry-After", str(RETRY_AFTER_S))
    return ProblemError(status, _DETAILS.get(status, "the server cannot answer this request"), headers=kept)


def _named(problem: ProblemError, request_id: str) -> ProblemError:
    headers = {**SECURITY, **problem.headers, "X-Request-Id": request_id}
    return ProblemError(problem.status, problem.detail, problem.errors, headers)


def _cleaned(headers: Any, request_id: str) -> list[tuple[bytes, bytes]]:
    """Headers without those that steer Serve, and with one id that is fit to be logged."""
    kept = [(name, value) for name, value in headers if not _steers(name) and name.lower() != _REQUEST_ID]
    return [*kept, (_REQUEST_ID, request_id.encode())]


def _steers(name: bytes) -> bool:
    return name.decode("latin-1").lower().replace("_", "-") in _STEERING
