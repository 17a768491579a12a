"""Descriptions of requests and responses in /openapi.json that FastAPI cannot derive from the code."""

from __future__ import annotations

from typing import Any

from fastapi import Security
from fastapi.security import HTTPBearer

from animediffusion.serve.api.form import ColorizeForm, CorrectionForm
from animediffusion.serve.api.problems import MEDIA_TYPE
from animediffusion.serve.rendering.formats import openraster, psd

KEY = Security(
    HTTPBearer(
        auto_error=False, description="A key made by `animediffusion keys create`; required if the server has keys."
    )
)
"""This only describes the key; serve/api/auth.py checks it."""

_REASONS = {
    400: "Not multipart, cut off, or a file is missing",
    401: "No key, or a key that is unknown or revoked",
    404: "Corrections are off, or no request with this id is kept for this key",
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
    "X-Model-Version": "Registry number, sha256 and 12 hex digits, or starter",
    "X-Seed": "The seed that was used",
    "X-Style": "The style of the picture",
    "X-Regions": "Number of regions of the drawing; missing if the output needs no regions",
    "X-Hints": "With hints: `exact` if only their regions got the colors, `spread` if what looks alike got them, too, "
    "`learned` if the network saw the hints before that",
    "X-Request-Id": "Id of this request in logs, and for a correction of its picture",
}

_BINARY = {"type": "string", "format": "binary"}
_PNG = {"type": "string", "contentEncoding": "base64", "contentMediaType": "image/png"}
_MAYBE_PNG = {**_PNG, "type": ["string", "null"]}
_REGION = {
    "id": {"type": "integer", "description": "Value of the region's pixels in `labels`"},
    "name": {"type": "string", "description": "Part of the character; empty if unknown"},
    "color": {"type": "string", "description": "#rrggbb"},
    "area": {"type": "integer", "description": "Number of pixels"},
    "box": {
        "type": "array",
        "items": {"type": "integer"},
        "description": "Left, top, right and bottom; right and bottom are the first pixels outside",
    },
}
_LAYERS = {
    "type": "object",
    "description": "image = flats x shading, screened with highlights, x lines",
    "properties": {
        "image": _PNG,
        "lines": {**_PNG, "description": "The sketch as it was decoded"},
        "flats": _PNG,
        "shading": _MAYBE_PNG,
        "highlights": _MAYBE_PNG,
        "labels": {**_PNG, "description": "Gray PNG of 16 bits: the id of the region of each pixel"},
        "regions": {"type": "array", "items": {"type": "object", "properties": _REGION}},
    },
}

Responses = dict[int | str, dict[str, Any]]


def problems(*codes: int) -> Responses:
    """Return the descriptions of error responses for the `responses` of an operation."""
    return {
        code: {"description": _REASONS[code], "content": {MEDIA_TYPE: {"schema": _PROBLEM}}} for code in sorted(codes)
    }


_FORM = {"multipart/form-data": {"schema": ColorizeForm.model_json_schema()}}
FORM = {"requestBody": {"required": True, "content": _FORM}}
_CORRECTION = {"multipart/form-data": {"schema": CorrectionForm.model_json_schema()}}
CORRECTION_FORM = {"requestBody": {"required": True, "content": _CORRECTION}}

PICTURE: Responses = {
    200: {
        "description": "The output: a PNG, a file with layers, or layers and regions as JSON",
        "content": {
            **{kind: {"schema": _BINARY} for kind in ("image/png", openraster.MEDIA_TYPE, psd.MEDIA_TYPE)},
            "application/json": {"schema": _LAYERS},
        },
        "headers": {name: {"schema": {"type": "string"}, "description": what} for name, what in _HEADERS.items()},
    },
    **problems(*(_REASONS.keys() - {404})),
}
_SAVED = {
    "type": "object",
    "properties": {
        "request_id": {"type": "string"},
        "model_version": {"type": "string", "description": "The version that made the picture"},
        "state": {"type": "string", "enum": ["stored", "replaced", "known"]},
        "changed": {"type": "number", "description": "Share of the pixels that are different, above 0 and at most 1"},
    },
}
CORRECTION_ANSWERS: Responses = {
    200: {
        "description": "The store has this correction already (`known`), or it replaces an earlier one of the request",
        "content": {"application/json": {"schema": _SAVED}},
    },
    201: {"description": "The correction is stored", "content": {"application/json": {"schema": _SAVED}}},
    **problems(*_REASONS),
}
EVENTS: Responses = {
    **PICTURE,
    200: {
        "description": "Events; `correctable` of the event `result` is true if the server keeps this request, so that "
        "its picture can be corrected",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    },
}
