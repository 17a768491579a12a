"""Queue of waiting requests that is fair between API keys. It uses no torch, no clock and no threads.

The key with the fewest slots in the running batch is served first. Among equal keys, the least recently served key is
first, so that keys alternate even in a batch of one slot. Within a key, the order is first come, first served. New keys
alone could starve the oldest request of a busy key. Therefore a request that is the first of its key and was passed
`patience` times is served before all requests that were passed less often.

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
class _Line(Generic[T]):
    """The waiting requests of one key."""

    items: deque[T] = field(default_factory=deque)
    since: int = 0
    """Count at which the present first request became the first."""
    passed: int = 0
    """Number of requests of other keys that started since then."""


class FairQueue(Generic[T]):
    """Queue of waiting requests that is fair between keys.

    Args:
        patience: how often requests of other keys may pass the first request of a key.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self._lines: dict[str, _Line[T]] = {}
        self._served: dict[str, int] = {}
        """Key -> count at which its latest request started, for keys with waiting or running requests."""
        self._count = count()

    def __len__(self) -> int:
        return sum(len(line.items) for line in self._lines.values())

    def __iter__(self) -> Iterator[T]:
        for line in self._lines.values():
            yield from line.items

    def add(self, item: T, key: str) -> None:
        """Append a request to the queue of its key."""
        if key not in self._lines:
            self._lines[key] = _Line(since=next(self._count))
        self._lines[key].items.append(item)

    def before(self, key: str) -> list[T]:
        """Return the requests that would start before a new request of `key` if all keys simply alternated."""
        own = len(self._lines[key].items) if key in self._lines else 0
        return [item for line in self._lines.values() for item in list(line.items)[: own + 1]]

    def peek(self, places: Mapping[str, int]) -> tuple[T, str] | None:
        """Return the next request and its key, given the slots of each key in the running batch."""
        if not self._lines:
            return None
        late = [key for key, line in self._lines.items() if line.passed >= self.patience]
        if late:
            key = min(late, key=self._since)
        else:
            key = min(self._lines, key=lambda key: (places.get(key, 0), self._served.get(key, -1), self._since(key)))
        return self._lines[key].items[0], key

    def take(self, places: Mapping[str, int]) -> T:
        """Remove and return the request that peek() returns."""
        found = self.peek(places)
        if found is None:
            raise IndexError("nobody waits")
        item, key = found
        self._served = {one: when for one, when in self._served.items() if one in self._lines or places.get(one)}
        self._served[key] = next(self._count)
        for other, line in self._lines.items():
            line.passed += other != key
        self._leave(key, item)
        return item

    def remove(self, item: T) -> bool:
        """Remove a request that was canceled; return False if it is not in the queue."""
        for key, line in self._lines.items():
            if item in line.items:
                self._leave(key, item)
                return True
        return False

    def _leave(self, key: str, item: T) -> None:
        line = self._lines[key]
        was_first = line.items[0] is item
        line.items.remove(item)
        if not line.items:
            del self._lines[key]
        elif was_first:
            line.since, line.passed = next(self._count), 0

    def _since(self, key: str) -> int:
        return self._lines[key].since
