"""Queue of waiting requests that is fair between API keys. It uses no torch, no clock and no threads.

The key with the fewest slots in the running batch is served first. Among equal keys, the least recently served key is
first, so that keys alternate even in a batch of one slot. Within a key, the order is first come, first served. With
this rule, a sequence of new keys could starve the oldest request of a busy key. Therefore a request that is the first
of its key and was passed `patience` times is served before all requests that were passed less often.

The bound: once a request is the first of its key, at most patience + K requests of other keys start before it, where K
is the number of keys that wait at that moment. With n requests of its own key before it, the bound is (n + 1) times as
large.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class _KeyQueue(Generic[T]):
    """The waiting requests of one key."""

    items: deque[T] = field(default_factory=deque)
    since: int = 0
    """Count at which the current first request became the first."""
    passed: int = 0
    """Number of requests of other keys that started since then."""


class FairQueue(Generic[T]):
    """Queue of waiting requests that is fair between keys.

    Args:
        patience: how often requests of other keys may pass the first request of a key.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self._queues: dict[str, _KeyQueue[T]] = {}
        self._served: dict[str, int] = {}
        """Key -> count at which its latest request started, for keys with waiting or running requests."""
        self._count = count()

    def __len__(self) -> int:
        return sum(len(queue.items) for queue in self._queues.values())

    def __iter__(self) -> Iterator[T]:
        for queue in self._queues.values():
            yield from queue.items

    def add(self, item: T, key: str) -> None:
        """Append a request to the queue of its key."""
        if key not in self._queues:
            self._queues[key] = _KeyQueue(since=next(self._count))
        self._queues[key].items.append(item)

    def before(self, key: str) -> list[T]:
        """Return the requests that would start before a new request of `key` if all keys simply alternated."""
        own = len(self._queues[key].items) if key in self._queues else 0
        return [item for queue in self._queues.values() for item in list(queue.items)[: own + 1]]

    def peek(self, slots: Mapping[str, int]) -> tuple[T, str] | None:
        """Return the next request and its key, given the slots of each key in the running batch."""
        if not self._queues:
            return None
        late = [key for key, queue in self._queues.items() if queue.passed >= self.patience]
        if late:
            key = min(late, key=self._since)
        else:
            key = min(self._queues, key=lambda key: (slots.get(key, 0), self._served.get(key, -1), self._since(key)))
        return self._queues[key].items[0], key

    def take(self, slots: Mapping[str, int]) -> T:
        """Remove and return the request that peek() returns."""
        found = self.peek(slots)
        if found is None:
            raise IndexError("the queue is empty")
        item, key = found
        self._served = {one: when for one, when in self._served.items() if one in self._queues or slots.get(one)}
        self._served[key] = next(self._count)
        for other, queue in self._queues.items():
            queue.passed += other != key
        self._leave(key, item)
        return item

    def remove(self, item: T) -> bool:
        """Remove a request that was canceled; return False if it is not in the queue."""
        for key, queue in self._queues.items():
            if item in queue.items:
                self._leave(key, item)
                return True
        return False

    def _leave(self, key: str, item: T) -> None:
        queue = self._queues[key]
        was_first = queue.items[0] is item
        queue.items.remove(item)
        if not queue.items:
            del self._queues[key]
        elif was_first:
            queue.since, queue.passed = next(self._count), 0

    def _since(self, key: str) -> int:
        return self._queues[key].since
