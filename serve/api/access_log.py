"""One line of JSON for every request, written when its answer is complete.

    {"time": "2026-01-31T12:00:00.000Z", "method": "POST", "path": "/v1/colorize", "status": 200, "seconds": 0.812,
     "key": "studio", "version": "3", "request_id": "5f0c2a9e1b7d4c38"}

Never a secret: no header, no query, no body; of a key the name that its maker gave it. `version` is null where no model
answered, `key` empty where none was asked for. `status` is 499 where the client left first.
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
"""nginx's code for a client that closed the connection; nobody receives it."""
MAX_PATH = 200

log = logging.getLogger("animediffusion.requests")


def write_to(file: Path | None) -> None:
    """Where this process writes its lines: a file, which may be moved away to rotate it, or stderr."""
    handler: logging.Handler
    if file is None:
        handler = logging.StreamHandler(sys.stderr)
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.handlers.WatchedFileHandler(file)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


def write(scope: Scope, status: int, started: float) -> None:
    """Write the line of a request.

    Args:
        scope: of the request; its `state` holds request_id, and key and model_version where they are known.
        status: of the answer.
        started: when it came, of time.monotonic().
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
    """ASGI middleware that writes the lines; the outermost one."""

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
