"""Errors of the HTTP API as application/problem+json (RFC 9457).

raise ProblemError(413, "the body has more than 32 MiB")
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http.client import responses
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from animediffusion.platform.errors import (
    BusyError,
    DeadlineError,
    ImageError,
    NoModelError,
    ServeError,
    UnavailableError,
)
from animediffusion.serve.api.access_log import CLIENT_LEFT
from animediffusion.serve.retry_after import retry_after_s

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 2
RETRIED = (429, 503)
"""HTTP statuses that come with Retry-After."""
ANSWERS: dict[type[ServeError], tuple[int, str]] = {
    BusyError: (429, "too many requests are waiting; try again in {wait} s"),
    NoModelError: (503, "no model is loaded: {error}"),
    UnavailableError: (503, "the picture cannot be made now: {error}"),
    DeadlineError: (504, "the picture was not finished in time; try fewer steps, or later"),
}
"""HTTP status and detail for the errors of the engines; the first class that fits counts."""
TITLES = {CLIENT_LEFT: "Client Closed Request"}

log = logging.getLogger(__name__)


class ProblemError(Exception):
    """An error response, which RFC 9457 calls a problem.

    Args:
        status: HTTP status.
        detail: one sentence for the person who sent the request.
        errors: for 422, one `{field, found, allowed}` for each field.
        headers: additional headers of the response.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        errors: list[dict[str, str]] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.errors = errors
        self.headers = dict(headers or {})

    def body(self, request_id: str) -> dict[str, Any]:
        """Return the JSON object to send."""
        body: dict[str, Any] = {
            "type": "about:blank",
            "title": TITLES.get(self.status) or responses.get(self.status, "Error"),
            "status": self.status,
            "detail": self.detail,
            "request_id": request_id,
        }
        return body if self.errors is None else {**body, "errors": self.errors}


def unusable(field: str, found: str, allowed: str) -> ProblemError:
    """Return a 422 for one field."""
    return ProblemError(422, f"{field}: {found}; {allowed}", [{"field": field, "found": found, "allowed": allowed}])


def from_error(error: Exception, request_id: str = "") -> ProblemError:
    """Convert an error of this package to a problem; log any other error with the request id and return a 500."""
    if isinstance(error, ProblemError):
        return error
    if isinstance(error, ImageError):
        if error.reason in ("not_an_image", "empty"):
            return ProblemError(415, f"{error.thing} {error.found}; send a PNG, JPEG or WebP image")
        field = error.thing.partition(" ")[0]  # The second of several references is the thing "reference 2".
        errors = [{"field": field, "found": error.found, "allowed": error.allowed}]
        return ProblemError(422, f"{error.thing}: {error.found}; {error.allowed}", errors)
    for kind, (status, detail) in ANSWERS.items():
        if isinstance(error, kind):
            known = error.retry_after_s if isinstance(error, BusyError) else None
            wait = str(RETRY_AFTER_S if known is None else retry_after_s(known))
            headers = {"Retry-After": wait} if status in RETRIED else None
            return ProblemError(status, detail.format(error=error, wait=wait), headers=headers)
    if isinstance(error, ClientDisconnect):
        return ProblemError(CLIENT_LEFT, "the client closed the connection")
    log.error("request %s failed", request_id, exc_info=error)
    return ProblemError(500, "the server failed; the request may be tried again")


def add_handlers(app: FastAPI) -> None:
    """Make `app` answer errors of FastAPI and of this package with problems; limits.RequestLimits handles the rest."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        return response(request, from_error(error, _id(request.scope)))

    async def http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return response(request, ProblemError(error.status_code, str(error.detail), headers=error.headers))

    async def validation_error(request: Request, _: Exception) -> JSONResponse:
        return response(request, ProblemError(422, "the request is not usable"))

    for kind in (ProblemError, ImageError, ServeError, ClientDisconnect):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, validation_error)


def response(request: Request, problem: ProblemError) -> JSONResponse:
    """Return the response for a problem."""
    return JSONResponse(problem.body(_id(request.scope)), problem.status, problem.headers, media_type=MEDIA_TYPE)


async def respond(problem: ProblemError, scope: Scope, receive: Receive, send: Send) -> None:
    """Send the response for a problem from a middleware."""
    answer = JSONResponse(problem.body(_id(scope)), problem.status, problem.headers, media_type=MEDIA_TYPE)
    await answer(scope, receive, send)


def _id(scope: Scope) -> str:
    return str(scope.get("state", {}).get("request_id", ""))
