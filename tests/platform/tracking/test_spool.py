import fcntl
import json
import threading

from animediffusion.platform.tracking.spool import Spool


class Store:
    """Takes entries while it is there."""

    def __init__(self):
        self.here = True
        self.got = []

    def send(self, entries):
        if not self.here:
            return 0
        self.got += entries
        return len(entries)


def numbers(count, start=0):
    return [{"metric": ["loss", 0.5, 1, step]} for step in range(start, start + count)]


def test_entries_arrive_in_order(tmp_path):
    store = Store()
    spool = Spool(store.send, tmp_path)
    for entry in numbers(1000):
        spool.put(entry)
    assert spool.close(5) == 0
    assert store.got == numbers(1000)
    assert list(tmp_path.iterdir()) == []


def test_nobody_waits_for_a_store_that_hangs(tmp_path):
    held, answered = threading.Event(), []
    spool = Spool(lambda entries: answered.append(held.wait(120)) or len(entries), tmp_path)
    for entry in numbers(500):
        spool.put(entry)
    assert spool.close(0.3) == 500
    assert answered == []
    held.set()


def test_what_waits_is_in_a_file_and_is_sent_when_the_store_is_back(tmp_path):
    store = Store()
    store.here = False
    spool = Spool(store.send, tmp_path)
    spool.put(*numbers(3))
    assert not spool.flush(5)
    spool.put(*numbers(2, start=3))
    assert not spool.flush(5)
    [file] = tmp_path.iterdir()
    assert [json.loads(line) for line in file.read_text().splitlines()][:3] == numbers(3)
    store.here = True
    assert spool.flush(5)
    assert spool.close(5) == 0
    assert store.got == numbers(5)
    assert list(tmp_path.iterdir()) == []


def test_the_next_process_sends_what_a_killed_one_left(tmp_path):
    text = "".join(json.dumps(entry) + "\n" for entry in numbers(2))
    (tmp_path / "1-dead.jsonl").write_text(text + '{"metric": ["lo')  # killed while it wrote
    store = Store()
    assert Spool(store.send, tmp_path).deliver()
    assert store.got == numbers(2)
    assert list(tmp_path.iterdir()) == []


def test_the_file_of_a_living_process_is_left_to_it(tmp_path):
    path = tmp_path / "1-alive.jsonl"
    with path.open("w") as file:
        file.write(json.dumps(numbers(1)[0]) + "\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        store = Store()
        assert Spool(store.send, tmp_path).deliver()
    assert store.got == []
    assert path.exists()


def test_without_a_folder_entries_wait_in_memory():
    store = Store()
    store.here = False
    spool = Spool(store.send)
    spool.put(*numbers(3))
    assert not spool.flush(5)
    store.here = True
    assert spool.close(5) == 0
    assert store.got == numbers(3)
