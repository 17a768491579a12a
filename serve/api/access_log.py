"""Access log: one line of JSON for every request, written when its response is complete.

    {"time": "2026-01-31T12:00:00.000Z", "method": "POST", "path": "/v1/colorize", "status": 200, "seconds": 0.812,
     "key": "studio", "version": "3", "request_id": "5f0c2a9e1b7d4c38"}

A line never contains a secret: it has no header, no query and no body, and `key` is the name of an API key, not the
key. `version` is null if no model answered. `key` is empty if the server required no key. `status` is 499 if the client
closed the connection first.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

CLIENT_LEFT = 499
"""nginx's status code for a client that closed the connection. The code is only logged."""
MAX_PATH = 200

log = logging.getLogger("animediffusion.requests")


def write_to(file: Path | None) -> None:
    """Set where this process writes the access log: a file, or stderr if None.

    Log rotation may rename the file: the next line then goes to a new file.
    """
    handler: logging.Handler
    if file is None:
        handler = logging.StreamHandler(sys.stderr)
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.handlers.WatchedFileHandler(file)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for before in log.handlers:
        before.close()
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


def write(scope: Scope, status: int, started: float) -> None:
    """Write the line of a request.

    Args:
        scope: ASGI scope of the request; its `state` has request_id, and key and model_version if they are known.
        status: HTTP status of the response.
        started: time.monotonic() at the start of the request.
    """
    state: dict[str, Any] = scope.get("state", {})
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "method": str(scope["method"])[:16],
        "path": str(scope["path"])[:MAX_PATH],
        "status": status,
        "seconds": round(time.monotonic() - started, 3),
        "key": state.get("key", ""),
        "version": state.get("model_version"),
        "request_id": state.get("request_id", ""),
    }
    log.info(json.dumps(line))


class AccessLog:
    """ASGI middleware that writes the access log. It must be the outermost middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 0
        scope.setdefault("state", {})

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            write(scope, status or CLIENT_LEFT, started)
