"""A Colorizer that colors drawings with a server: `colorize --url`, and a small example of how to use the HTTP API."""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

import httpx

from animediffusion.models.sampler_options import SamplerOptions
from animediffusion.platform.errors import AnimeDiffusionError, ClusterError, ConfigError, DataError
from animediffusion.platform.network import without_password
from animediffusion.serve.client.colorize_files import OUTPUTS, ColoredDrawing, FileFormat
from animediffusion.serve.rendering.render import DEFAULTS, RenderOptions

API_KEY = "ANIMEDIFFUSION_API_KEY"
_KEY_HINT = "set it to a key that `animediffusion keys create` printed"
NAMES = {"steps": "num_inference_steps"}
"""Fields of SamplerOptions that have another name in the HTTP form."""
BUSY = (429, 503)
"""HTTP statuses of temporary errors, after which the request is retried."""


class RemoteColorizer:
    """A colorize_files.Colorizer that calls a server.

    Args:
        url: URL of the server, as `serve` prints it.
        timeout_s: time for one picture, including retries while the server is busy.
        transport: replaces the network connection; for tests.
    """

    def __init__(self, url: str, timeout_s: float = 120, transport: httpx.BaseTransport | None = None) -> None:
        _check_url(url)
        key = os.environ.get(API_KEY, "").strip()  # Files of secrets often end with a line break.
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(API_KEY, "contains characters that a key cannot contain", _KEY_HINT)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.max_concurrent = 4  # The server batches concurrent requests.
        self.url = url.rstrip("/")
        self.shown_url = without_password(self.url)
        self.timeout_s = timeout_s
        self._client = httpx.Client(base_url=self.url, timeout=timeout_s, headers=headers, transport=transport)

    def colorize(
        self,
        sketch: bytes,
        references: Sequence[bytes],
        options: SamplerOptions,
        rendering: RenderOptions = DEFAULTS,
        file_format: FileFormat = "png",
        *,
        name: str,
    ) -> ColoredDrawing:
        """See colorize_files.Colorizer. One request returns picture and color layer, so version and seed are the same.

        Raises:
            DataError: the server rejects this drawing.
            ConfigError: the server rejects the API key, or requires one.
            ClusterError: the server is unreachable, or fails.
        """
        files = [("sketch", ("sketch", sketch)), *(("reference", ("reference", one)) for one in references)]
        fields = {NAMES.get(field, field): str(value) for field, value in asdict(options).items() if value is not None}
        for field, value in vars(rendering).items():
            if isinstance(value, bytes):
                files.append((field, (field, value)))
            elif value != getattr(DEFAULTS, field):  # A server of version 0.1 knows only the size.
                fields[field] = value
        fields["output"] = OUTPUTS[file_format]
        end = time.monotonic() + self.timeout_s
        while True:
            try:
                result = self._post(files, fields)
                layer = base64.b64decode(result["color_layer"]) if file_format == "png" else None
                return ColoredDrawing(base64.b64decode(result["image"]), result["model_version"], layer)
            except (ValueError, KeyError, TypeError) as error:
                raise self._not_this_api() from error
            except _RejectedError as rejected:
                if rejected.status not in BUSY or time.monotonic() > end:
                    raise self._explain(rejected, name) from rejected
                time.sleep(min(5.0, rejected.retry_after_s))

    def versions(self) -> Collection[str]:
        """Return the versions that get traffic on the server."""
        try:
            response = self._client.get("/v1/models")
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if not response.is_success:
            rejected = _RejectedError(response.status_code, _detail(response))
            raise self._explain(rejected, "/v1/models") from rejected
        try:
            return tuple(response.json()["traffic"])
        except (ValueError, KeyError, TypeError) as error:
            raise self._not_this_api() from error

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _post(self, files: Sequence[tuple[str, tuple[str, bytes]]], fields: dict[str, str]) -> dict[str, Any]:
        """Return the data of the event `result`; raise _RejectedError or ClusterError if there is none."""
        try:
            with self._client.stream("POST", "/v1/colorize/stream", files=files, data=fields) as response:
                if not response.is_success:
                    response.read()
                    wait = _seconds(response.headers.get("Retry-After"))
                    raise _RejectedError(response.status_code, _detail(response), wait)
                for name, data in _events(response.iter_lines()):
                    if name == "result":
                        return data
                    if name == "error":
                        raise _RejectedError(data["status"], data["detail"])
                if not response.headers.get("Content-Type", "").startswith("text/event-stream"):
                    raise self._not_this_api()
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        raise ClusterError(self.shown_url, "ended the connection before the picture was finished", "try again")

    def _unreachable(self, error: httpx.HTTPError) -> ClusterError:
        return ClusterError(self.shown_url, f"does not answer ({error})", "start `animediffusion serve`")

    def _not_this_api(self) -> ClusterError:
        return ClusterError(self.shown_url, "is not an AnimeDiffusion server", "give the address that `serve` prints")

    def _explain(self, rejected: _RejectedError, thing: str) -> AnimeDiffusionError:
        if rejected.status == 401:
            sent = "Authorization" in self._client.headers
            found = f"{self.shown_url} rejects this key" if sent else "is not set"
            return ConfigError(API_KEY, found, _KEY_HINT)
        if rejected.status in (413, 415, 422):
            return DataError(thing, f"the server rejects it ({rejected.detail})", "see its /docs")
        found = f"answers {rejected.status} ({rejected.detail})"
        hint = "give the address that it names" if 300 <= rejected.status < 400 else "try again, or read its log"
        return ClusterError(self.shown_url, found, hint)


def _check_url(text: str) -> None:
    allowed = "for example http://127.0.0.1:8000"
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise ConfigError("--url", f"{without_password(text)!r} ({error})", allowed) from error
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError("--url", repr(without_password(text)), allowed)
    if url.query or url.fragment:
        raise ConfigError(
            "--url", f"{without_password(text)!r} has more than a path", "remove ? or # and the text after it"
        )


class _RejectedError(Exception):
    """The server rejected the request, with an HTTP status and a reason."""

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
    if response.has_redirect_location:
        return f"{response.reason_phrase}: {response.headers['Location']}"
    try:
        return str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return response.reason_phrase
