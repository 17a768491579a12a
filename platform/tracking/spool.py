"""Disk-backed queue for MLflow: a thread sends the entries and keeps them in a file while the store is unreachable.

    spool = Spool(send, folder=Path("workspace/runs/first/unsent"))
    spool.put({"metric": ["loss", 0.1, 1700000000000, 20]})
    spool.close(patience_s=20)

put() never waits for the store. If a process is killed or the store stays unreachable, the next spool with the same
folder sends the entries that are left there. Not here: the kinds of entries, see records.py.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from filelock import lock_descriptor

Entry = dict[str, Any]
Send = Callable[[list[Entry]], int]
"""Sends entries in order and returns the number sent; a smaller number than given means an unreachable store."""

SEND_EVERY_S = 2.0
SEND_AT = 200
"""Number of waiting entries that are sent immediately, before SEND_EVERY_S has passed."""
RETRY_S = (1.0, 30.0)
"""Pause in seconds after the first failed attempt, which doubles after each failure, and its maximum."""


class Spool:
    """A queue whose entries a thread sends.

    Args:
        send: sends entries; it is never called concurrently.
        folder: folder for entries that cannot be sent yet; they stay in memory if None.
    """

    def __init__(self, send: Send, folder: Path | None = None) -> None:
        self._send = send
        self._folder = folder
        self._own: tuple[Path, TextIO] | None = None
        self._sent: dict[Path, int] = {}
        self._queue: deque[Entry] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._attempts, self._unreachable = 0, False
        self._hurry = False
        self._pause, self._retry_at = RETRY_S[0], 0.0
        self._delivering = threading.Lock()
        self._thread: threading.Thread | None = None

    def put(self, *entries: Entry) -> None:
        """Add entries to the queue without waiting."""
        with self._wake:
            self._queue.extend(entries)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="spool", daemon=True)
                self._thread.start()
            if len(self._queue) >= SEND_AT:
                self._wake.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Send the waiting entries now; return False if the store did not accept all of them within the timeout."""
        if self._thread is None:
            return self.deliver()
        with self._wake:
            before, self._hurry = self._attempts, True
            self._wake.notify_all()
            self._wake.wait_for(lambda: self._attempts > before and (self._unreachable or not self._queue), timeout_s)
            return self._attempts > before and not self._unreachable and not self._queue

    def close(self, patience_s: float) -> int:
        """Try to send the rest for `patience_s` seconds, keep unsent entries in the folder, and return their number."""
        until = time.monotonic() + patience_s
        while not self.flush(max(0.1, until - time.monotonic())) and time.monotonic() < until:
            time.sleep(min(0.5, patience_s))
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        if self._delivering.acquire(timeout=1.0):  # if not, the thread hangs in a request; its entries are kept, too
            self._delivering.release()
        self._keep()
        left = len(self._queue)
        if self._own is not None:
            path, file = self._own
            left += len(_read(path)) - self._sent.get(path, 0)
            file.close()
        return left

    def deliver(self) -> bool:
        """Send the entries in the folder and in the queue; return False if some are left."""
        with self._delivering:
            done = all(self._deliver_file(path) for path in self._files()) and self._deliver_queue()
        with self._wake:
            self._attempts += 1
            self._unreachable = not done
            self._wake.notify_all()
        return done

    def _work(self) -> None:
        while not self._closing:
            with self._wake:
                self._wake.wait_for(
                    lambda: self._closing or self._hurry or len(self._queue) >= SEND_AT, timeout=SEND_EVERY_S
                )
                hurry, self._hurry = self._hurry, False
            if self._closing:
                return
            if not hurry and time.monotonic() < self._retry_at:
                self._keep()
            elif self.deliver():
                self._pause, self._retry_at = RETRY_S[0], 0.0
            else:
                self._keep()
                self._retry_at = time.monotonic() + self._pause
                self._pause = min(2 * self._pause, RETRY_S[1])

    def _deliver_queue(self) -> bool:
        """Send the queue; entries are removed only after they were sent, so that close() can keep the others."""
        with self._wake:
            waiting = list(self._queue)
        sent = self._send(waiting) if waiting else 0
        with self._wake:
            for _ in range(min(sent, len(self._queue))):
                self._queue.popleft()
        return sent == len(waiting)

    def _deliver_file(self, path: Path) -> bool:
        """Send the entries of one file, which belongs to this process or to a process that has ended."""
        own = self._own is not None and path == self._own[0]
        try:
            with path.open() as file:
                if not own and not lock_descriptor(file.fileno(), blocking=False):
                    return True  # another process uses the file
                entries = _read(path)[self._sent.get(path, 0) :]
                sent = self._send(entries) if entries else 0
                self._sent[path] = self._sent.get(path, 0) + sent
                if sent < len(entries):
                    return False
                path.unlink(missing_ok=True)
        except FileNotFoundError:
            return True  # another process has sent the file
        self._sent.pop(path, None)
        if own and self._own is not None:
            self._own[1].close()
            self._own = None
        return True

    def _keep(self) -> None:
        """Move the queue to this process's file; without a folder, do nothing."""
        with self._wake:
            if self._folder is None or not self._queue:
                return
            if self._own is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                path = self._folder / f"{time.time_ns()}-{uuid.uuid4().hex[:8]}.jsonl"
                self._own = (path, path.open("a"))
                lock_descriptor(self._own[1].fileno())
            file = self._own[1]
            file.writelines(json.dumps(entry) + "\n" for entry in self._queue)
            file.flush()
            self._queue.clear()

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("*.jsonl")) if self._folder is not None else []


def _read(path: Path) -> list[Entry]:
    """Read the entries of a file, without a last line that is incomplete because the process was killed."""
    try:
        lines = path.read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]
