"""What stands before every request: its id, the limit on its body, and headers that keep browsers strict."""

from __future__ import annotations

import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from animediffusion.serve.problems import MEDIA_TYPE, ProblemError

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; "
    "style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline'; base-uri 'none'; form-action 'self'",
}


class RequestLimits:
    """ASGI middleware; bytes are counted while they arrive, whatever Content-Length says."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, names_requests: bool) -> None:
        self.app = app
        self.added = {**SECURITY, "X-Request-Id": ""} if names_requests else SECURITY
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                answer.update({name: value or request_id for name, value in self.added.items()})
            await send(message)

        announced = headers.get("content-length", "")
        if announced.isdigit() and int(announced) > self.max_body_bytes:
            problem = self._too_large()
            body = problem.body(request_id)
            refusal = JSONResponse(body, problem.status, media_type=MEDIA_TYPE)
            await refusal(scope, receive, send_with_headers)
            return
        await self.app(scope, self._counting(receive), send_with_headers)

    def _counting(self, receive: Receive) -> Receive:
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.max_body_bytes:
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> ProblemError:
        return ProblemError(413, f"the body is larger than {self.max_body_bytes / 2**20:g} MiB; send smaller images")
