"""Middleware for every request: request ids, limits on headers and body, security headers, and error responses."""

from __future__ import annotations

import asyncio
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from animediffusion.serve.api.problems import ProblemError, from_error, respond

MAX_BODY_BYTES = 32 * 2**20
UPLOAD_TIMEOUT_S = 60.0
MAX_HEAD_BYTES = 32 * 2**10
"""Maximum size of the names and values of all headers together."""

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; "
    "style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline'; base-uri 'none'; form-action 'self'",
}


class RequestLimits:
    """ASGI middleware that adds headers, limits requests, and answers unhandled errors.

    The bytes of a body are counted while they arrive, so the limit does not depend on Content-Length.

    Args:
        app: the application.
        max_body_bytes: largest body of a request; a larger one is answered with 413.
        upload_timeout_s: time for the whole body to arrive; a slower one is answered with 408, because it occupies the
            server.
        names_requests: whether to add the header X-Request-Id; False if a proxy in front adds it.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, upload_timeout_s: float, names_requests: bool) -> None:
        self.app = app
        self.added = {**SECURITY, "X-Request-Id": ""} if names_requests else SECURITY
        self.max_body_bytes = max_body_bytes
        self.upload_timeout_s = upload_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = request_id_of(scope)
        scope.setdefault("state", {})["request_id"] = request_id

        is_started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started = True
                answer = MutableHeaders(scope=message)
                answer.update({name: value or request_id for name, value in self.added.items()})
            await send(message)

        problem = problem_of(scope, self.max_body_bytes)
        if problem is not None:
            await respond(problem, scope, receive, send_with_headers)
            return
        body = Body(receive, self.max_body_bytes, self.upload_timeout_s)
        try:
            await self.app(scope, body.receive, send_with_headers)
        except Exception as error:
            if is_started:  # The status is already sent, so the server can only cut the connection.
                raise
            # Starlette's own error handler is outside this middleware: its response would lack the id and the headers.
            await respond(from_error(error, request_id), scope, receive, send_with_headers)


class HeadRequests:
    """ASGI middleware that answers HEAD like GET without a body, and adds HEAD to Allow headers (RFC 9110 9.3.2)."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        is_head = scope["type"] == "http" and scope["method"] == "HEAD"

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                _allow_head(MutableHeaders(scope=message))
            elif is_head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self.app({**scope, "method": "GET"} if is_head else scope, receive, answer)


def _allow_head(headers: MutableHeaders) -> None:
    allowed = set(headers.get("allow", "").split(", "))
    if "GET" in allowed:
        headers["allow"] = ", ".join(sorted(allowed | {"HEAD"}))


def request_id_of(scope: Scope) -> str:
    """Return the client's X-Request-Id if it matches REQUEST_ID, else a new random id."""
    given = Headers(scope=scope).get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)


def problem_of(scope: Scope, max_body_bytes: int) -> ProblemError | None:
    """Return the problem of a request that is visible from its headers alone; None if there is no problem."""
    if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEAD_BYTES:
        return ProblemError(431, f"the headers have more than {MAX_HEAD_BYTES // 2**10} KiB")
    announced = Headers(scope=scope).get("content-length", "")
    # A number of more than 18 digits is too large in any case, and int() rejects very long numbers.
    if announced.isdecimal() and (len(announced) > 18 or int(announced) > max_body_bytes):
        return too_large(max_body_bytes)
    return None


class Body:
    """Limits the size and the duration of the body of one request while the body is received.

    Args:
        receive: ASGI's receive.
        max_bytes: largest body; a larger one raises a ProblemError 413.
        timeout_s: time from now to the last byte; a slower body raises a ProblemError 408.
    """

    def __init__(self, receive: Receive, max_bytes: int, timeout_s: float) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s
        self._seen = 0
        self._complete = False

    async def receive(self) -> Message:
        """Return the next ASGI message; raise a ProblemError if a limit is exceeded."""
        if self._complete:  # The next message is the disconnect, which has no time limit.
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._end - time.monotonic()))
        except TimeoutError as error:
            raise ProblemError(408, f"the body did not arrive within {self._timeout_s:g} s") from error
        self._seen += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._seen > self._max_bytes:
            raise too_large(self._max_bytes)
        return message


def too_large(max_bytes: int) -> ProblemError:
    """Return a 413 that names the limit."""
    return ProblemError(413, f"the body is larger than {max_bytes / 2**20:g} MiB; send smaller images")
