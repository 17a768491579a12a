"""What cluster_faults.py saw; see there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("cluster_faults.py")

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def found(faces_dataset, tmp_path_factory):
    workspace = tmp_path_factory.mktemp("cluster")
    command = [sys.executable, str(SCRIPT), faces_dataset, str(workspace)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    # Ray may write to stdout, too, after the result.
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))


def test_a_run_that_loses_a_worker_and_a_node_continues_with_the_bits_of_one_that_lost_nothing(found):
    assert found["equal"], "at step 81"
    assert found["steps"][0] == 108


def test_a_node_that_is_preempted_with_a_notice_costs_no_step(found):
    assert [line.startswith("a node is about to be preempted; saving step") for line in found["warnings"]] == [True]
    assert len(found["off_the_beat"]) == 1
    assert found["off_the_beat"][0] < 81
    assert f"saving step {found['off_the_beat'][0]}" in found["warnings"][0]


def test_an_elastic_run_continues_with_fewer_workers_to_its_last_step(found):
    assert found["workers"] == [2, 1]
    assert found["steps"][1] == 108
