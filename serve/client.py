"""Colors drawings with a server: `colorize --url`, and a small example of how to use the HTTP API."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

import httpx

from animediffusion.platform.errors import ClusterError, ConfigError, DataError
from animediffusion.serve.painter import Options, Painting

API_KEY = "ANIMEDIFFUSION_API_KEY"
NAMES = {"steps": "num_inference_steps"}


class RemotePainter:
    """A painter.Painter.

    Args:
        url: of the server, as `serve` prints it.
        timeout_s: for one picture, waiting for a place included.
    """

    def __init__(self, url: str, timeout_s: float = 120) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError("--url", repr(url), "for example http://127.0.0.1:8000")
        key = os.environ.get(API_KEY)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self._client = httpx.Client(base_url=self.url, timeout=timeout_s, headers=headers)

    def paint(self, sketch: bytes, reference: bytes, options: Options, *, thing: str) -> Painting:
        """See painter.Painter.

        Raises:
            DataError: the server refuses this drawing.
            ConfigError: it asks for another key.
            ClusterError: it cannot be reached, or fails.
        """
        files = {"sketch": ("sketch", sketch), "reference": ("reference", reference)}
        asked = {NAMES.get(name, name): str(value) for name, value in asdict(options).items() if value is not None}
        picture = self._post(files, asked, thing)
        layer = self._post(files, {**asked, "output": "color_layer"}, thing)
        return Painting(picture.content, layer.content, picture.headers["X-Model-Version"])

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _post(self, files: dict[str, tuple[str, bytes]], asked: dict[str, str], thing: str) -> httpx.Response:
        """The answer, waiting as long as the server is busy."""
        end = time.monotonic() + self.timeout_s
        while True:
            try:
                response = self._client.post("/v1/colorize", files=files, data=asked)
            except httpx.HTTPError as error:
                raise ClusterError(self.url, f"does not answer ({error})", "start `animediffusion serve`") from error
            if response.status_code not in (429, 503) or time.monotonic() > end:
                break
            time.sleep(min(5.0, _seconds(response.headers.get("Retry-After"))))
        if response.is_success:
            return response
        raise self._refused(response, thing)

    def _refused(self, response: httpx.Response, thing: str) -> Exception:
        detail = _detail(response)
        if response.status_code == 401:
            found = (
                "is not set" if "Authorization" not in self._client.headers else f"{self.url} does not know this key"
            )
            return ConfigError(API_KEY, found, "set it to a key that `animediffusion keys create` has shown")
        if response.status_code in (413, 415, 422):
            return DataError(thing, f"the server refuses it ({detail})", "see its /docs")
        return ClusterError(self.url, f"answers {response.status_code} ({detail})", "try again, or look at its log")


def _seconds(header: str | None) -> float:
    return float(header) if header is not None and header.isdigit() else 1.0


def _detail(response: httpx.Response) -> Any:
    try:
        return response.json()["detail"]
    except (ValueError, KeyError, TypeError):
        return response.reason_phrase
