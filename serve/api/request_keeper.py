"""Keeps answered requests in the corrections store, in threads of its own: no answer waits for the store.

keeper = RequestKeeper(Corrections(uri))
with keeper.running():
    keeper.keep(form, answer, key, request_id)
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

from animediffusion.platform.corrections.counts import VersionCounts
from animediffusion.platform.corrections.store import Corrections, KeptRequest, now
from animediffusion.platform.errors import AnimeDiffusionError
from animediffusion.platform.images.codec import encode_png
from animediffusion.serve.api.form import FILES, MAY_BE_FILES, ColorizeForm
from animediffusion.serve.protocol import Answer

COUNT_S = 10.0
"""Seconds between two updates of the counts."""
CLEAN_S = 600.0
"""Average seconds between two searches for requests that are kept for too long."""
MAX_WAITING_BYTES = 256 * 2**20
"""Above this size of requests that wait for the store, further ones are not kept."""
_THREADS = 4
_PATIENCE_S = 10.0
"""How long the end of a server waits for requests that are not in the store yet."""

log = logging.getLogger(__name__)


class RequestKeeper:
    """Keeps the answered requests of one process, and counts them by model version.

    Args:
        store: the corrections store.
    """

    def __init__(self, store: Corrections) -> None:
        self.store = store
        self._pool = ThreadPoolExecutor(_THREADS, "kept requests")
        self._writing: dict[tuple[str, str], Future[None]] = {}
        self._waiting_bytes = 0
        self._counted: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self._problem = ""

    def keep(self, form: ColorizeForm, answer: Answer, key: str, request_id: str) -> bool:
        """Count an answered request and let a thread keep it; return whether it will be kept.

        It is not if too many wait for the store: a slow store may slow no answer and fill no memory.
        """
        kept_at = now()
        size = len(form.sketch) + sum(map(len, form.reference)) + answer.picture.nbytes
        with self._lock:
            self._counted[kept_at[:10], answer.model_version] += 1
            if self._waiting_bytes + size > MAX_WAITING_BYTES:
                self._say("the corrections store is slow: some requests are not kept")
                return False
            self._waiting_bytes += size
            writing = self._pool.submit(self._write, form, answer, key, request_id, kept_at)
            self._writing[key, request_id] = writing

        def done(future: Future[None]) -> None:
            with self._lock:
                self._waiting_bytes -= size
                if self._writing.get((key, request_id)) is future:  # a client may use an id twice
                    del self._writing[key, request_id]

        writing.add_done_callback(done)
        return True

    def writing(self, key: str, request_id: str) -> Future[None] | None:
        """Return what ends when this request is in the store; None if it does not wait for the store."""
        with self._lock:
            return self._writing.get((key, request_id))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Update the counts and delete old requests in a thread; at the end of the block, write what is left."""
        stop = threading.Event()
        thread = threading.Thread(target=self._maintain, args=(stop,), name="corrections", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            with self._lock:
                writing = set(self._writing.values())
            wait(writing, _PATIENCE_S)
            thread.join(_PATIENCE_S)
            self._pool.shutdown(wait=False, cancel_futures=True)

    def flush(self) -> None:
        """Add to the store what was counted since the last call; if that fails, it is added later."""
        with self._lock:
            counted, self._counted = self._counted, Counter()
        if not counted:
            return
        try:
            self.store.add_counts({place: VersionCounts(number, 0) for place, number in counted.items()})
        except Exception as error:
            with self._lock:
                self._counted.update(counted)
            self._warn(error)

    def _write(self, form: ColorizeForm, answer: Answer, key: str, request_id: str, kept_at: str) -> None:
        options = form.model_dump(exclude={*FILES})
        files = {name: value for name in MAY_BE_FILES if isinstance(value := options[name], bytes)}
        request = KeptRequest(
            request_id=request_id,
            key=key,
            time=kept_at,
            model_version=answer.model_version,
            options={name: value for name, value in options.items() if name not in files},
            sketch=form.sketch,
            references=form.reference,
            picture=encode_png(answer.picture, 1),
            files=files,
        )
        try:
            self.store.keep(request)
            self._problem = ""
        except Exception as error:  # No error of the store may reach an answer.
            self._warn(error)

    def _maintain(self, stop: threading.Event) -> None:
        next_clean = time.monotonic() + random.uniform(0, CLEAN_S)
        while not stop.wait(COUNT_S):
            self.flush()
            if time.monotonic() >= next_clean:
                next_clean = time.monotonic() + random.uniform(0.5, 1.5) * CLEAN_S
                try:
                    self.store.clean()
                except Exception as error:
                    self._warn(error)
        self.flush()

    def _warn(self, error: Exception) -> None:
        if isinstance(error, AnimeDiffusionError):
            self._say(f"the corrections store failed: {error}")
        else:
            log.error("the corrections store failed", exc_info=error)

    def _say(self, problem: str) -> None:
        """Log a problem once, until a request is kept again."""
        if problem != self._problem:
            log.warning("%s", problem)
        self._problem = problem
