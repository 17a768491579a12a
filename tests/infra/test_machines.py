"""What machines.py and loop.py saw; see there. Many minutes of both cores, and Ray's limits at start do not wait for a
busy machine: asked for by MACHINES=1, on one that has nothing else to do.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not os.environ.get("MACHINES"), reason="asked for by MACHINES=1"),
]


def seen_by(script, *words):
    """What a script of this folder prints at its end."""
    path = Path(__file__).with_name(script)
    done = subprocess.run(
        [sys.executable, str(path), *words],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(path.parents[1]), os.environ.get("PYTHONPATH", "")])},
    )
    assert done.returncode == 0, done.stderr[-5000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    if "missing" in seen:
        pytest.skip(f"needs {seen['missing']}")
    return seen


@pytest.fixture(scope="module")
def found():
    return seen_by("machines.py")


@pytest.fixture(scope="module")
def loop():
    return seen_by("loop.py", "--drawings=200", "--corrections=60", "--answers=30", "--steps=300")


def test_pictures_in_a_store_become_a_dataset_there(found):
    assert found["ingested"]["splits"] == {"train": 36, "val": 4}
    assert found["ingested"]["num_rejects"] == 0


def test_a_run_on_two_machines_continues_when_one_is_lost(found):
    lost = found["trainers"][0]
    assert len(found["trainers"]) == len(found["trainers_after"]) == 2
    assert lost not in found["trainers_after"]
    assert (found["trained"]["steps"], found["trained"]["num_workers"]) == (300, 2)


def test_a_search_on_two_machines_ends_with_a_version_that_is_promoted(found):
    assert found["tuned"]["trials"] == 3
    assert found["promoted"]["version"] == found["tuned"]["version"] == 1


def test_an_application_on_two_machines_continues_when_one_is_lost(found):
    assert found["answers"] == [200] * 4
    assert len(found["engines"]) == 2
    assert found["answers_after"][-3:] == [200] * 3
    assert set(found["answers_after"]) <= {200, 503, 504}
    assert len(found["engines_after"]) == 1


def test_each_machine_has_what_it_made_itself(found):
    assert {"runs", "tune"} <= set(found["disks"]["front"])
    assert [found["disks"][name] for name in found["engines"]] == [["cache"]] * 2


def test_a_bucket_is_colored_once_although_one_of_two_machines_is_lost(loop):
    colored = loop["colored"]
    assert colored["pictures"] == colored["drawings"] == 200
    assert 0.4 * 200 <= colored["lost_after"] < 200
    assert colored["said"].startswith("colored ")
    assert colored["changed_after_the_loss"] == colored["written_twice"] == loop["other_bytes"] == []


def test_corrections_of_its_pictures_improve_the_model_on_the_machine_that_is_left(loop):
    assert loop["corrections"] == 60
    assert loop["improve"].startswith("canary version 2: 50 % of the requests; CIEDE2000 ")
    assert loop["improve_again"][0].startswith("promote version 2: ")
    assert loop["version"] == "2"
