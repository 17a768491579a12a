"""The waiting line alone, under any order of comings and goings."""

import weakref
from collections import Counter, defaultdict

from hypothesis import given
from hypothesis import strategies as st

from animediffusion.serve.engine.fair_queue import FairQueue

PATIENCE = 3
KEYS = "abcde"

# A request arrives, with a key; one starts, while keys have so many slots; one is canceled.
comes = st.tuples(st.just("comes"), st.sampled_from(KEYS))
starts = st.tuples(st.just("starts"), st.dictionaries(st.sampled_from(KEYS), st.integers(0, 4)))
leaves = st.tuples(st.just("leaves"), st.integers(0, 30))


class Watched:
    """A queue, and what a bystander would write down about it."""

    def __init__(self):
        self.queue = FairQueue(PATIENCE)
        self.key_of, self.lines, self.started = {}, defaultdict(list), []
        self.passed, self.bound = {}, {}

    def come(self, key):
        number = len(self.key_of)
        self.key_of[number] = key
        self.lines[key].append(number)
        self.queue.add(number, key)
        self.watch()

    def start(self, slots):
        shown = self.queue.peek(slots)
        number = self.queue.take(slots)
        assert shown == (number, self.key_of[number])
        assert self.lines[self.key_of[number]].pop(0) == number
        self.started.append(number)
        for line in self.lines.values():
            if line and self.key_of[line[0]] != self.key_of[number]:
                self.passed[line[0]] += 1
        self.watch()

    def leave(self, number):
        waits = any(number in line for line in self.lines.values())
        assert self.queue.remove(number) == waits
        if waits:
            self.lines[self.key_of[number]].remove(number)
            self.watch()

    def watch(self):
        waiting = [line[0] for line in self.lines.values() if line]
        for first in waiting:
            if first not in self.bound:
                self.passed[first], self.bound[first] = 0, PATIENCE + len(waiting)
            assert self.passed[first] <= self.bound[first]


@given(st.lists(st.one_of(comes, starts, leaves), max_size=120))
def test_no_request_is_lost_passed_too_often_or_started_out_of_order(events):
    watched, left = Watched(), 0
    for kind, value in events:
        if kind == "comes":
            watched.come(value)
        elif kind == "starts" and len(watched.queue):
            watched.start(value)
        elif kind == "leaves":
            before = len(watched.queue)
            watched.leave(value)
            left += before - len(watched.queue)
    while len(watched.queue):
        watched.start({})
    assert len(watched.started) == len(set(watched.started)) == len(watched.key_of) - left
    assert watched.queue.peek({}) is None


def test_the_key_with_the_fewest_slots_is_next():
    queue = FairQueue(PATIENCE)
    for number, key in enumerate("aab"):
        queue.add(number, key)
    assert queue.take({"a": 1}) == 2


def test_with_one_slot_keys_alternate():
    queue = FairQueue(patience=100)
    for number, key in enumerate("aaaabb"):
        queue.add(number, key)
    assert "".join("aaaabb"[queue.take({})] for _ in range(6)) == "ababaa"


def test_new_keys_cannot_keep_the_request_of_a_busy_key_waiting_for_ever():
    queue = FairQueue(PATIENCE)
    queue.add("old", "busy")
    order = []
    for number in range(10):
        queue.add(number, f"new {number}")
        order.append(queue.take({"busy": 1}))
    assert order.index("old") == PATIENCE


def test_before_returns_the_requests_that_alternating_keys_would_start_first():
    queue = FairQueue(PATIENCE)
    for number, key in enumerate("aaab"):
        queue.add(number, key)
    assert sorted(queue.before("c")) == [0, 3]
    assert sorted(queue.before("b")) == [0, 1, 3]
    assert sorted(queue.before("a")) == [0, 1, 2, 3]


class Key(str):
    """A key with weak references, which tell whether it is in memory."""


def test_it_forgets_keys_without_requests():
    queue, keys = FairQueue(PATIENCE), []
    for number in range(1000):
        key = Key(f"key {number}")
        keys.append(weakref.ref(key))
        queue.add(number, key)
        del key
        queue.take(Counter())
    assert sum(key() is not None for key in keys) <= 2
