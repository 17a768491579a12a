"""A store that fails on command: an HTTP proxy on real sockets, between a client and the tests' S3 server.

    with FaultyStore("http://127.0.0.1:5000") as store:
        os.environ["AWS_ENDPOINT_URL_S3"] = store.url
        store.fail("slow_down", requests=3)                # the next three requests
        store.fail("refuse", seconds=2)                    # all of them, for two seconds
        store.fail("reset", requests=1, where="PUT /bucket/runs")
        store.fail("stall")                                # until store.heal()

Only one fault is active at a time; `hits` counts the requests that it affected. Clients run unmodified.
"""

from __future__ import annotations

import http.client
import os
import select
import socket
import struct
import threading
import time
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, Self
from urllib.parse import urlsplit

Fault = Literal["refuse", "reset", "stall", "slow_down"]

SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message><RequestId>0</RequestId></Error>"
)
_HOP_BY_HOP = ("connection", "keep-alive", "transfer-encoding", "content-length", "expect")
_STALL_POLL_S = 0.05


class FaultyStore:
    """The proxy, with methods that start and end a fault.

    Args:
        upstream: URL of the real server.

    Attributes:
        url: the address for clients; the port stays the same while connections are refused.
        hits: number of requests that a fault affected, by kind (a refused connection is not seen, so not counted).
        requests: all requests, as "METHOD /path?query", in order of arrival.
    """

    def __init__(self, upstream: str) -> None:
        self.upstream = urlsplit(upstream)
        self.hits: Counter[str] = Counter()
        self.requests: list[str] = []
        self._lock = threading.RLock()
        self._kind: Fault | None = None
        self._left: int | None = None
        self._where = ""
        self._timer: threading.Timer | None = None
        self._server: _Server | None = None
        self._placeholder: socket.socket | None = None
        self._listen(0)
        self.url = f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fail(self, kind: Fault, *, requests: int | None = None, seconds: float | None = None, where: str = "") -> None:
        """Start a fault, which replaces the previous one.

        Args:
            kind: `refuse` rejects new connections and resets open ones; `reset` cuts the answer in the middle, after
                the server has processed the request; `stall` sends no answer; `slow_down` answers 503, as S3 does to
                throttle.
            requests: number of requests that fail; all of them if None. Not for `refuse`.
            seconds: duration of the fault; until heal() if None.
            where: only requests that contain this text fail, such as "GET /bucket/a". Not for `refuse`.
        """
        with self._lock:
            self.heal()
            self._kind, self._left, self._where = kind, requests, where
            if kind == "refuse":
                self._refuse()
            if seconds is not None:
                self._timer = threading.Timer(seconds, self.heal)
                self._timer.daemon = True
                self._timer.start()

    def heal(self) -> None:
        """End the fault; a request that is stalled never gets an answer."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            self._timer, self._kind = None, None
            if self._server is None:
                self._listen(self._port)
            if self._placeholder is not None:
                self._placeholder.close()
                self._placeholder = None

    def close(self) -> None:
        """Stop the proxy permanently."""
        with self._lock:
            self.heal()
            self._stop()

    def meet(self, request: str) -> Fault | None:
        """Record a request and return the fault that affects it, if any."""
        with self._lock:
            self.requests.append(request)
            if self._kind is None or self._where not in request or self._left == 0:
                return None
            if self._left is not None:
                self._left -= 1
            self.hits[self._kind] += 1
            return self._kind

    def stalls(self) -> bool:
        """Return whether requests are stalled now."""
        return self._kind == "stall"

    def _listen(self, port: int) -> None:
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.store = self
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def _stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _refuse(self) -> None:
        """Stop listening but keep the port: a socket that is bound but does not listen reserves it."""
        self._stop()
        placeholder = socket.socket()
        placeholder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        placeholder.bind(("127.0.0.1", self._port))
        self._placeholder = placeholder


class _Server(ThreadingHTTPServer):
    store: FaultyStore
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore errors of clients that disconnect: tests cause them on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        body = self._read_body()
        fault = self.server.store.meet(f"{self.command} {self.path}")
        if fault == "refuse":
            self._reset()
        elif fault == "stall":
            self._stall()
        elif fault == "slow_down":
            self._send(503, [("Content-Type", "application/xml")], SLOW_DOWN)
        else:
            status, headers, content = self._forward(body)
            self._send(status, headers, content, cut=fault == "reset")

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(chunks)

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = self.server.store.upstream
        connection = http.client.HTTPConnection(upstream.hostname or "", upstream.port, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP_BY_HOP:
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            content = answer.read()
            kept = [pair for pair in answer.getheaders() if pair[0].lower() not in _HOP_BY_HOP]
            if self.command == "HEAD":
                kept.append(("Content-Length", answer.getheader("Content-Length") or "0"))
            return answer.status, kept, content
        finally:
            connection.close()

    def _send(self, status: int, headers: list[tuple[str, str]], content: bytes, *, cut: bool = False) -> None:
        if self.command == "HEAD":
            content = b""
        else:
            headers = [*headers, ("Content-Length", str(len(content)))]
        lines = [f"HTTP/1.1 {status} {http.client.responses.get(status, '')}"]
        lines += [f"{name}: {value}" for name, value in headers]
        raw = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
        if cut:
            # Cut in the middle of the content; without content, in the middle of the headers.
            self.wfile.write(raw + content[: len(content) // 2] if content else raw[: len(raw) // 2])
            self._reset()
        else:
            self.wfile.write(raw + content)

    def _stall(self) -> None:
        """Send no answer until the fault ends or the client disconnects; then close the connection."""
        while self.server.store.stalls():
            readable, _, _ = select.select([self.connection], [], [], _STALL_POLL_S)
            if readable and self._is_gone():
                break
            if readable:
                time.sleep(_STALL_POLL_S)
        self._reset()

    def _is_gone(self) -> bool:
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def _reset(self) -> None:
        """Send RST instead of a normal close; the descriptor is closed here because file objects share the socket."""
        self.close_connection = True
        with suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
