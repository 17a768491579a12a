import json
import os
import subprocess
import sys
import threading

import pytest

from animediffusion.pipelines.training.checkpoints import (
    CheckpointScore,
    CheckpointWriter,
    best_step,
    fetch,
    fetch_newest,
    latest_step,
    list_steps,
    prune,
    read_scores,
    retry_outage,
    write_score,
)
from animediffusion.platform.errors import StorageError
from animediffusion.platform.storage import storage


def scored(ciede2000):
    return CheckpointScore(psnr=20.0, ssim=0.9, ciede2000=ciede2000, psnr_same=21.0)


def state(text):
    """A stand-in for a copied TrainState: two small files."""

    def save(folder):
        (folder / "state.safetensors").write_text(text)
        (folder / "state.json").write_text("{}")

    return lambda: save


@pytest.fixture(params=["disk", "s3"])
def place(request, tmp_path):
    if request.param == "disk":
        return str(tmp_path / "checkpoints")
    request.getfixturevalue("moto_server")
    return f"s3://bucket/{tmp_path.name}/checkpoints"


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def writer(place, warnings):
    return CheckpointWriter(place, 2, warnings.append)


def save(writer, *steps):
    for step in steps:
        writer.save(step, state(f"weights of {step}"))
        writer.wait()


def test_what_was_saved_is_fetched_again(writer, place, tmp_path, warnings):
    assert latest_step(place) == 0
    save(writer, 5)
    fetch(place, 5, tmp_path / "copy")
    assert (tmp_path / "copy" / "state.safetensors").read_text() == "weights of 5"
    assert sorted(json.loads((tmp_path / "copy" / "checksums.json").read_text())) == ["state.json", "state.safetensors"]
    assert (latest_step(place), warnings) == (5, [])


def test_the_newest_stay_and_the_best(writer, place):
    save(writer, 10)
    write_score(place, 10, scored(3.0))
    save(writer, 20)
    write_score(place, 20, scored(9.0))
    save(writer, 30, 40, 50)
    assert list_steps(place) == [10, 40, 50]
    assert read_scores(place) == {10: scored(3.0)}
    write_score(place, 50, scored(2.0))
    prune(place, 2)
    assert list_steps(place) == [40, 50]


def test_a_checkpoint_that_waits_for_its_score_stays(place, warnings):
    awaited = {10}
    writer = CheckpointWriter(place, 2, warnings.append, awaited=lambda: awaited)
    save(writer, 10, 20, 30, 40)
    assert list_steps(place) == [10, 30, 40]
    awaited.clear()
    writer.prune()
    assert list_steps(place) == [30, 40]


def test_of_equal_scores_the_later_is_best():
    assert best_step({1: scored(2.0), 3: scored(2.0), 2: scored(5.0)}) == 3
    assert best_step({}) is None


def test_a_checkpoint_without_checksums_is_none_and_a_damaged_one_is_passed_over(writer, place, tmp_path, warnings):
    save(writer, 1, 2)
    storage.write_bytes(storage.join(place, "step-00000003", "state.safetensors"), b"half")
    assert latest_step(place) == 2
    storage.write_bytes(storage.join(place, "step-00000002", "state.safetensors"), b"weights of 3")
    with pytest.raises(ValueError, match=r"step-00000002/state.safetensors was changed after it was written"):
        fetch(place, 2, tmp_path / "damaged")
    assert fetch_newest(place, tmp_path / "copy", warnings.append) == 1
    assert (tmp_path / "copy" / "state.safetensors").read_text() == "weights of 1"
    assert [line.count("using the checkpoint before it") for line in warnings] == [1]
    assert latest_step(place) == 1, "who asks later sees the same"
    storage.write_bytes(storage.join(place, "step-00000001", "checksums.json"), b"{")
    assert fetch_newest(place, tmp_path / "copy", warnings.append) == 0


def test_a_step_that_is_saved_again_takes_the_place_of_the_old(writer, place, tmp_path):
    save(writer, 7)
    writer.save(7, state("other"))
    writer.wait()
    fetch(place, 7, tmp_path / "copy")
    assert (tmp_path / "copy" / "state.safetensors").read_text() == "other"


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path):
    place = tmp_path / "checkpoints"
    code = f"""
import os, signal
from animediffusion.pipelines.training.checkpoints import CheckpointWriter
writer = CheckpointWriter({str(place)!r}, 2, print)
writer.save(1, lambda: lambda folder: (folder / "state.json").write_text("1"))
writer.wait()
def die(folder):
    (folder / "state.json").write_text("2")
    os.kill(os.getpid(), signal.SIGKILL)
writer.save(2, lambda: die)
writer.wait()
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert [path.name for path in place.iterdir()].count(".step-00000002.part") == 1
    assert latest_step(str(place)) == 1
    CheckpointWriter(str(place), 2, print)
    assert [path.name for path in place.iterdir()] == ["step-00000001"], "what was half written is cleared away"


FULL = """
import os, sys
from pathlib import Path
from animediffusion.pipelines.training.checkpoints import CheckpointWriter, latest_step
place = sys.argv[1]
warnings = []
writer = CheckpointWriter(place, 1, warnings.append)
save = lambda: lambda folder: (folder / "state.safetensors").write_bytes(os.urandom(400_000))
writer.save(1, save)
writer.wait()
Path(place, "other").write_bytes(b"0" * 500_000)
writer.save(2, save)
writer.wait()
assert latest_step(place) == 1 and "No space left on device" in warnings[0] and len(warnings) == 1, warnings
assert not [name for name in os.listdir(place) if name.endswith(".part")]
Path(place, "other").unlink()
writer.finish(3, save)
assert latest_step(place) == 3
print("survived")
"""


def test_a_full_disk_costs_one_checkpoint_and_no_training(tmp_path):
    """On a real file system of one megabyte, in a mount namespace."""
    # Root needs no user namespace, which a chroot and some distributions do not allow.
    namespace = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
    if subprocess.run([*namespace, "true"], check=False).returncode:
        pytest.skip("this user may not make a mount namespace")
    mount = f"mount -t tmpfs -o size=1m none {tmp_path} && exec {sys.executable} -c '{FULL}' {tmp_path}"
    done = subprocess.run(
        [*namespace, "sh", "-c", mount],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "survived\n", done.stderr


def test_an_upload_does_not_hold_up_training_and_the_newest_state_wins(faulty_s3, tmp_path, warnings):
    url, store = faulty_s3
    place = f"s3://bucket/{tmp_path.name}/async?endpoint_override={url}"
    storage.exists(place)
    saved = []
    writer = CheckpointWriter(place, 3, warnings.append, lambda step, _: saved.append(step))
    store.fail("stall")
    for step in (1, 2, 3):
        writer.save(step, state(str(step)))
    assert (saved, warnings) == ([], [])
    store.heal()
    writer.finish(4, state("4"))
    assert saved[-1] == 4
    assert len(saved) < 4, "a state that waits gives way to a newer one"
    assert list_steps(place)[-1] == 4


def test_training_continues_while_a_state_is_written_and_at_most_two_copies_are_held(place, warnings):
    writing, go = threading.Event(), threading.Event()
    held, most = [0], [0]

    class Copy:
        def __init__(self):
            held[0] += 1
            most[0] = max(most[0], held[0])

        def __del__(self):
            held[0] -= 1

        def __call__(self, folder):
            writing.set()
            assert go.wait(30)
            (folder / "state.json").write_text("{}")

    writer = CheckpointWriter(place, 9, warnings.append)
    writer.save(1, Copy)
    assert writing.wait(30)
    for step in (2, 3, 4):
        writer.save(step, Copy)
    assert list_steps(place) == []
    go.set()
    writer.wait()
    assert (list_steps(place), most, warnings) == ([1, 4], [2], [])


def test_whatever_goes_wrong_while_a_state_is_written_is_a_warning_and_no_endless_wait(place, warnings):
    def broken(folder):
        raise KeyError("weights")

    writer = CheckpointWriter(place, 2, warnings.append)
    writer.save(1, lambda: broken)
    writer.wait()
    assert warnings == ["the checkpoint of step 1 could not be saved ('weights'); training continues"]
    save(writer, 2)
    assert list_steps(place) == [2]


def test_a_store_that_fails_for_a_while_costs_a_checkpoint_at_most(faulty_s3, tmp_path, warnings, monkeypatch):
    monkeypatch.setattr("animediffusion.pipelines.training.checkpoints.PAUSE_S", 0.2)
    url, store = faulty_s3
    place = f"s3://bucket/{tmp_path.name}/outage?endpoint_override={url}"
    writer = CheckpointWriter(place, 3, warnings.append)
    save(writer, 1)
    store.fail("refuse", seconds=3)
    writer.finish(2, state("2"))
    assert list_steps(place) == [1, 2]


def test_patience_has_an_end(monkeypatch):
    monkeypatch.setattr("animediffusion.pipelines.training.checkpoints.PAUSE_S", 0.01)
    asked = []

    def never():
        asked.append(1)
        raise StorageError("s3://b", "does not answer", "wait")

    with pytest.raises(StorageError, match="does not answer"):
        retry_outage(never, 0.1)
    assert len(asked) > 2
    assert retry_outage(lambda: 5) == 5
