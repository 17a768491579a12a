"""Who is next: requests that wait, fair between the keys that sent them. No torch, no clock, no threads.

The key with the fewest places in the running batch goes first; among equals the one that was served longest ago, so
that keys take turns even where one place is all there is; within a key, first come first served. New keys would keep a
busy key's oldest request waiting for ever: so a request at the head of its key that has been passed `patience` times
goes before all that were passed less often.

The bound: once a request is the first of its key, at most patience + K requests of others start before it, K being the
keys that wait at that moment; with n requests of its own key before it, at most (n + 1) times as many.
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
    """The requests of one key."""

    items: deque[T] = field(default_factory=deque)
    since: int = 0
    """When its first one became the first."""
    passed: int = 0
    """Requests of others that started since."""


class FairQueue(Generic[T]):
    """Requests that wait.

    Args:
        patience: how often the first request of a key may be passed by others.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self._lines: dict[str, _Line[T]] = {}
        self._served: dict[str, int] = {}
        """When each key's last request started; kept while it has requests."""
        self._count = count()

    def __len__(self) -> int:
        return sum(len(line.items) for line in self._lines.values())

    def __iter__(self) -> Iterator[T]:
        for line in self._lines.values():
            yield from line.items

    def add(self, item: T, key: str) -> None:
        """Let a request wait behind those of its key."""
        if key not in self._lines:
            self._lines[key] = _Line(since=next(self._count))
        self._lines[key].items.append(item)

    def before(self, key: str) -> list[T]:
        """Those that would, if all keys went on taking turns, start before a new request of `key`."""
        own = len(self._lines[key].items) if key in self._lines else 0
        return [item for line in self._lines.values() for item in list(line.items)[: own + 1]]

    def peek(self, places: Mapping[str, int]) -> tuple[T, str] | None:
        """The next request and its key, given the places that each key has in the running batch."""
        if not self._lines:
            return None
        late = [key for key, line in self._lines.items() if line.passed >= self.patience]
        if late:
            key = min(late, key=self._since)
        else:
            key = min(self._lines, key=lambda key: (places.get(key, 0), self._served.get(key, -1), self._since(key)))
        return self._lines[key].items[0], key

    def take(self, places: Mapping[str, int]) -> T:
        """Remove what peek() shows."""
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
        """Take a request out that nobody waits for any more; False if it was not here."""
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
