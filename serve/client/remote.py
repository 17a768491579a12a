"""A Painter that colors drawings with a server: `colorize --url`, and a small example of how to use the HTTP API."""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

import httpx

from animediffusion.platform.errors import AnimeDiffusionError, ClusterError, ConfigError, DataError
from animediffusion.serve.client.colorize_files import Options, Painting

API_KEY = "ANIMEDIFFUSION_API_KEY"
NAMES = {"steps": "num_inference_steps"}
BUSY = (429, 503)
"""HTTP statuses of temporary errors, after which the request is retried."""


class RemotePainter:
    """A colorize_files.Painter that calls a server.

    Args:
        url: URL of the server, as `serve` prints it.
        timeout_s: time for one picture, including retries while the server is busy.
        transport: replaces the network connection; for tests.
    """

    def __init__(self, url: str, timeout_s: float = 120, transport: httpx.BaseTransport | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError("--url", repr(url), "for example http://127.0.0.1:8000")
        key = os.environ.get(API_KEY)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.num_at_once = 4  # The server batches concurrent requests.
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self._client = httpx.Client(base_url=self.url, timeout=timeout_s, headers=headers, transport=transport)

    def paint(self, sketch: bytes, reference: bytes, options: Options, *, thing: str) -> Painting:
        """See colorize_files.Painter. One request returns picture and color layer, so version and seed are the same.

        Raises:
            DataError: the server refuses this drawing.
            ConfigError: the server refuses the API key, or requires one.
            ClusterError: the server is unreachable, or fails.
        """
        files = {"sketch": ("sketch", sketch), "reference": ("reference", reference)}
        asked = {NAMES.get(name, name): str(value) for name, value in asdict(options).items() if value is not None}
        end = time.monotonic() + self.timeout_s
        while True:
            try:
                result = self._ask(files, {**asked, "output": "both"})
                image, layer = (base64.b64decode(result[name]) for name in ("image", "color_layer"))
                return Painting(image, layer, result["model_version"])
            except _RefusedError as refused:
                if refused.status not in BUSY or time.monotonic() > end:
                    raise self._explain(refused, thing) from refused
                time.sleep(min(5.0, refused.retry_after_s))

    def versions(self) -> Collection[str]:
        """Return the versions that get traffic on the server."""
        try:
            response = self._client.get("/v1/models")
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if not response.is_success:
            refused = _RefusedError(response.status_code, _detail(response))
            raise self._explain(refused, "/v1/models") from refused
        return tuple(response.json()["traffic"])

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _ask(self, files: dict[str, tuple[str, bytes]], asked: dict[str, str]) -> dict[str, Any]:
        """Return the data of the event `result`; raise _RefusedError or ClusterError if there is none."""
        try:
            with self._client.stream("POST", "/v1/colorize/stream", files=files, data=asked) as response:
                if not response.is_success:
                    response.read()
                    wait = _seconds(response.headers.get("Retry-After"))
                    raise _RefusedError(response.status_code, _detail(response), wait)
                for name, data in _events(response.iter_lines()):
                    if name == "result":
                        return data
                    if name == "error":
                        raise _RefusedError(data["status"], data["detail"])
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        raise ClusterError(self.url, "ended the connection before the picture was finished", "try again")

    def _unreachable(self, error: httpx.HTTPError) -> ClusterError:
        return ClusterError(self.url, f"does not answer ({error})", "start `animediffusion serve`")

    def _explain(self, refused: _RefusedError, thing: str) -> AnimeDiffusionError:
        if refused.status == 401:
            sent = "Authorization" in self._client.headers
            found = f"{self.url} does not know this key" if sent else "is not set"
            return ConfigError(API_KEY, found, "set it to a key that `animediffusion keys create` has shown")
        if refused.status in (413, 415, 422):
            return DataError(thing, f"the server refuses it ({refused.detail})", "see its /docs")
        return ClusterError(self.url, f"answers {refused.status} ({refused.detail})", "try again, or look at its log")


class _RefusedError(Exception):
    """The server refused the request, with an HTTP status and a reason."""

    def __init__(self, status: int, detail: str, retry_after_s: float = 1.0) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.retry_after_s = retry_after_s


def _events(lines: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and data of the server-sent events that serve/api/sse.py writes."""
    name = ""
    for line in lines:
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


def _seconds(header: str | None) -> float:
    return float(header) if header is not None and header.isdecimal() else 1.0


def _detail(response: httpx.Response) -> str:
    try:
        return str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return response.reason_phrase
