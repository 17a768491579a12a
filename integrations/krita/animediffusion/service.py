"""Requests to an AnimeDiffusion server, with the standard library alone: Krita's Python has no other packages.

The plug-in runs on Python 3.8, which Krita 5.2 for Windows has.
"""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

MOST_REFERENCES = 4


class ServiceError(Exception):
    """A request failed; the text is one line for the user."""


@dataclass(frozen=True)
class Request:
    """A drawing to color, and how."""

    url: str
    """Address of the server, as `animediffusion serve` prints it."""
    key: str
    """API key; empty if the server requires none."""
    lines: bytes
    """The drawing, a PNG."""
    references: Sequence[bytes]
    """1 to MOST_REFERENCES image files."""
    hints: bytes | None = None
    """A transparent PNG of the drawing's size with strokes."""
    style: str = "shaded"
    """`shaded` or `flat`."""
    seed: int = 0
    timeout_s: float = 120.0


@dataclass(frozen=True)
class Layers:
    """PNGs of the drawing's size, from the lowest layer to the highest."""

    flats: bytes
    shading: bytes | None
    """To multiply with the flats; None if it would change nothing."""
    highlights: bytes | None
    """To screen over them; None if they would change nothing."""


def color(asked: Request) -> Layers:
    """Color a drawing.

    Raises:
        ServiceError: nothing answers at the address, or the server rejects the request.
    """
    if not 1 <= len(asked.references) <= MOST_REFERENCES:
        raise ServiceError(f"{len(asked.references)} references; choose 1 to {MOST_REFERENCES}")
    files = [("sketch", asked.lines), *(("reference", one) for one in asked.references)]
    if asked.hints is not None:
        files.append(("hints", asked.hints))
    fields = {"output": "layers", "style": asked.style, "seed": str(asked.seed)}
    body, content_type = form(fields, files)
    headers = {"Content-Type": content_type, **({"Authorization": f"Bearer {asked.key}"} if asked.key else {})}
    answer = _post(asked.url.rstrip("/") + "/v1/colorize", body, headers, asked.timeout_s)
    try:
        found = json.loads(answer)
        layers = {name: found[name] and base64.b64decode(found[name]) for name in ("flats", "shading", "highlights")}
    except (ValueError, KeyError, TypeError) as error:
        raise ServiceError(f"{asked.url} is not an AnimeDiffusion server, or one of version 0.1") from error
    return Layers(**layers)


def form(fields: dict[str, str], files: Sequence[tuple[str, bytes]]) -> tuple[bytes, str]:
    """Return the body of a multipart form (RFC 7578), and its content type."""
    boundary = uuid.uuid4().hex
    parts: list[bytes] = []
    for name, value in fields.items():
        parts.append(f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode())
    for name, data in files:
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="{name}"\r\n\r\n'
        parts += [head.encode(), data, b"\r\n"]
    parts.append(f"--{boundary}--\r\n".encode())
    return b"".join(parts), f"multipart/form-data; boundary={boundary}"


def _post(url: str, body: bytes, headers: dict[str, str], timeout_s: float) -> bytes:
    if not url.startswith(("http://", "https://")):
        raise ServiceError(f"{url} is not an address; it begins with http:// or https://")
    try:
        request = urllib.request.Request(url, data=body, headers=headers, method="POST")
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            raise ServiceError(_problem(error)) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        advice = "start `animediffusion serve`, or correct the address"
        raise ServiceError(f"no answer from {url}: {reason}; {advice}") from error


def _problem(error: urllib.error.HTTPError) -> str:
    """Return the line of an error, which is a problem document (RFC 9457) if the server is ours."""
    try:
        problem = json.loads(error.read())
        fields = [f"{one['field']}: {one['found']}; {one['allowed']}" for one in problem.get("errors", [])]
        return " ".join(fields) or str(problem["detail"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered with status {error.code}"
