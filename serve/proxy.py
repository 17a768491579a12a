"""Middleware installed in Ray Serve's own proxy, in front of every application: problem+json errors and size limits.

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=animediffusion.serve.proxy:middlewares

Serve's proxy answers some requests itself, in plain text: no application has the path (404), too many requests wait
(429), no replica runs (503), the proxy's own timeout passed (408), or a replica died during the request (500). The
proxy also reads a body of any length into memory before the application sees a byte, and it lets clients set its
timeout and choose replicas with headers. This middleware corrects all of this. Ray reads the variable when a proxy
starts. platform/cluster/cluster.py sets the variable for the Ray that this package starts; infra/docker/Dockerfile sets
it for the nodes of a cluster.

The middleware cannot correct two cases: uvicorn rejects a request that is not HTTP (400) before any application runs,
and a connection is cut if the node of the proxy is lost.
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
from animediffusion.serve.api import access_log
from animediffusion.serve.api.limits import MAX_BODY_BYTES, SECURITY, UPLOAD_TIMEOUT_S, Body, problem_of, request_id_of
from animediffusion.serve.api.problems import MEDIA_TYPE, RETRY_AFTER_S, ProblemError, respond

BODY_VARIABLE = "ANIMEDIFFUSION_MAX_BODY_BYTES"
"""Environment variable: the largest body that the proxy accepts, in bytes. `max_body_bytes` of an application may be
smaller."""

_REQUEST_ID = b"x-request-id"
_CONTROLS = (
    "x-request-timeout-seconds",
    "x-request-disconnect-disabled",
    "x-session-id",
    "serve-multiplexed-model-id",
)
"""Headers with which a client could change how Serve handles its request."""

_DETAILS = {
    404: "no application answers at this path; it may still be starting",
    429: "too many requests are waiting; try again soon",
    503: "no process is running that could answer; try again soon",
    504: "the request was not answered in time",
}
_DIED = ProblemError(
    503, "the process that handled the request has died; try again", headers={"Retry-After": str(RETRY_AFTER_S)}
)

log = logging.getLogger(__name__)


def middlewares() -> list[Middleware]:
    """Return the middleware of the proxy. Ray Serve calls this function when a proxy starts."""
    access_log.write_to(None)
    try:
        limit = max_body_bytes()
    except ConfigError as error:  # Starting without the middleware would be worse than using the default limit.
        log.error("%s", error)
        limit = MAX_BODY_BYTES
    return [Middleware(ProxyErrors, max_body_bytes=limit)]


def max_body_bytes() -> int:
    """Return the largest body that the proxy accepts, in bytes.

    Raises:
        ConfigError: the variable is not a number of at least 1.
    """
    limit = os.environ.get(BODY_VARIABLE) or str(MAX_BODY_BYTES)
    if not limit.isdecimal() or int(limit) < 1:
        raise ConfigError(BODY_VARIABLE, repr(limit), "a number of bytes")
    return int(limit)


class ProxyErrors:
    """ASGI middleware around Serve's proxy.

    Args:
        app: the proxy.
        max_body_bytes: largest body of a request; a larger one is answered with 413.
        upload_timeout_s: time for the whole body to arrive; a slower one is answered with 408.
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
        scope = {**scope, "headers": _safe_headers(scope["headers"], request_id), "state": {"request_id": request_id}}
        response = _Response(send)
        problem = problem_of(scope, self.max_body_bytes)
        if problem is None:
            body = _Body(Body(receive, self.max_body_bytes, self.upload_timeout_s))
            problem = await self._run_serve(scope, body, response)
        if problem is not None and not response.is_started:
            await respond(_with_headers(problem, request_id), scope, receive, send)
            access_log.write(scope, problem.status, started)

    async def _run_serve(self, scope: Scope, body: _Body, response: _Response) -> ProblemError | None:
        """Run the application; return the problem to send if the application has not answered."""
        try:
            await self.app(scope, body.receive, response.send)
        except Exception:
            log.exception("request %s failed in the proxy", scope["state"]["request_id"])
            return body.problem or ProblemError(500, "the server failed; the request may be tried again")
        if body.problem is not None or response.problem is not None:
            return body.problem or response.problem
        if response.is_started:
            return None
        # Serve sends nothing if a replica died, and uvicorn would turn that into a plain-text 500.
        return ProblemError(access_log.CLIENT_LEFT, "the client closed the connection") if body.client_left else _DIED


class _Body:
    """A request body that stores its problem and reports a disconnected client to Serve instead."""

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


class _Response:
    """Forwards the responses of applications and withholds the error responses of Serve itself."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.is_started = False
        self.problem: ProblemError | None = None
        """The withheld response, as a problem."""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = Headers(raw=message["headers"])
            if message["status"] >= 400 and headers.get("content-type", "") != MEDIA_TYPE:
                self.problem = _problem_for(message["status"], headers)
            else:
                self.is_started = True
        if self.is_started:
            await self._send(message)


def _problem_for(status: int, headers: Headers) -> ProblemError:
    """Return a problem in place of Serve's plain-text error; 408, Serve's timeout, becomes 504 (gateway timeout)."""
    status = 504 if status == 408 else status
    kept = {"Retry-After": headers["retry-after"]} if "retry-after" in headers else {}
    if status in (429, 503):
        kept.setdefault("Retry-After", str(RETRY_AFTER_S))
    return ProblemError(status, _DETAILS.get(status, "the server cannot answer this request"), headers=kept)


def _with_headers(problem: ProblemError, request_id: str) -> ProblemError:
    headers = {**SECURITY, **problem.headers, "X-Request-Id": request_id}
    return ProblemError(problem.status, problem.detail, problem.errors, headers)


def _safe_headers(headers: Any, request_id: str) -> list[tuple[bytes, bytes]]:
    """Return the headers without those that control Serve, and with exactly one request id, which is safe to log."""
    kept = [(name, value) for name, value in headers if not _controls_serve(name) and name.lower() != _REQUEST_ID]
    return [*kept, (_REQUEST_ID, request_id.encode())]


def _controls_serve(name: bytes) -> bool:
    return name.decode("latin-1").lower().replace("_", "-") in _CONTROLS
