"""Handling of SIGINT and SIGTERM: the only place that installs signal handlers.

    with StopSignals(ask_the_workers_to_stop) as stop:
        work_until(lambda: stop.number is not None)

Ray installs handlers that end the process immediately; those of a `with` block replace them until the block ends.
"""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Self

STOP = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def handling(handle: Callable[[int], object], signals: Sequence[signal.Signals] = STOP) -> Iterator[None]:
    """Call `handle` with the number of every signal that arrives inside the `with` block.

    Only the main thread receives signals; in any other thread the block changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda arrived, _frame: handle(arrived)) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopSignals:
    """Context manager for work that a signal should end: the first signal asks, the second raises KeyboardInterrupt.

    Args:
        on_first: called when the first signal arrives.
    """

    def __init__(self, on_first: Callable[[], object] = lambda: None) -> None:
        self.number: int | None = None
        """Number of the first signal; None until it arrives."""
        self._on_first = on_first
        # Not an Event: its lock is not reentrant, and the handler interrupts the thread that waits.
        self._arrived: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._handling = handling(self._handle)

    def __enter__(self) -> Self:
        self._handling.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._handling.__exit__(None, None, None)

    def wait(self) -> int:
        """Wait for the first signal and return its number."""
        return self._arrived.get()

    def _handle(self, number: int) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number
        self._arrived.put(number)
        self._on_first()
