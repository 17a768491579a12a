"""Descriptions of requests and responses in /openapi.json that FastAPI cannot derive from the code."""

from __future__ import annotations

from typing import Any

from fastapi import Security
from fastapi.security import HTTPBearer

from animediffusion.serve.api.form import ColorizeForm
from animediffusion.serve.api.problems import MEDIA_TYPE

KEY = Security(
    HTTPBearer(
        auto_error=False, description="A key made by `animediffusion keys create`; required if the server has keys."
    )
)
"""This only describes the key; serve/api/auth.py checks it."""

_REASONS = {
    400: "Not multipart, cut off, or a file is missing",
    401: "No key, or a key that is unknown or revoked",
    408: "The body did not arrive in time",
    413: "The body is over the limit",
    415: "An image is not a PNG, JPEG or WebP, or the body is compressed",
    422: "An image or a parameter is not usable; `errors` names it",
    429: "Too many requests; `Retry-After` says when to retry",
    431: "The headers are over the limit",
    503: "No model is loaded, or no engine can make the picture now; `Retry-After` says when to retry",
    504: "Not finished in time",
}
_FIELD_ERROR = {"type": "object", "properties": {name: {"type": "string"} for name in ("field", "found", "allowed")}}
_PROBLEM = {
    "type": "object",
    "required": ["type", "title", "status", "detail", "request_id"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "request_id": {"type": "string"},
        "errors": {"type": "array", "items": _FIELD_ERROR},
    },
}
_HEADERS = {
    "X-Model-Version": "Registry number, or sha256 and 12 hex digits",
    "X-Seed": "The seed that was used",
    "X-Request-Id": "Id of this request in logs",
}

Responses = dict[int | str, dict[str, Any]]


def problems(*codes: int) -> Responses:
    """Return the descriptions of error responses for the `responses` of an operation."""
    return {
        code: {"description": _REASONS[code], "content": {MEDIA_TYPE: {"schema": _PROBLEM}}} for code in sorted(codes)
    }


_FORM = {"multipart/form-data": {"schema": ColorizeForm.model_json_schema()}}
FORM = {"requestBody": {"required": True, "content": _FORM}}

PICTURE: Responses = {
    200: {
        "description": "The picture",
        "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
        "headers": {name: {"schema": {"type": "string"}, "description": what} for name, what in _HEADERS.items()},
    },
    **problems(*_REASONS),
}
EVENTS: Responses = {
    **PICTURE,
    200: {"description": "Events", "content": {"text/event-stream": {"schema": {"type": "string"}}}},
}
