"""Machines that share nothing: see machines.py, which is a process of its own because namespaces are one's for life."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

CAN = subprocess.run(["unshare", "--net", "--mount", "ip", "link"], capture_output=True).returncode == 0


@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.skipif(not CAN, reason="namespaces cannot be made here")
def test_two_machines_train_and_serve_without_a_common_disk_and_one_is_enough_to_go_on() -> None:
    command = ["unshare", "--net", "--mount", sys.executable, str(Path(__file__).with_name("machines.py"))]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_", "MLFLOW_"))
    }
    with tempfile.TemporaryDirectory(prefix="two-", dir="/tmp") as folder:
        done = subprocess.run([*command, folder], capture_output=True, text=True, env=environment, timeout=850)
    assert done.returncode == 0, done.stderr[-6000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["rows"] == {"train": 54, "val": 6}
    assert told["trained"]["steps"] == 30
    assert told["trained"]["num_workers"] == 2
    assert told["shared"] == []
    assert [name for name, (ok, _) in told["checks"].items() if not ok and name != "machine"] == []
    assert "2 nodes" in told["checks"]["node store"][1]
    assert told["replicas"] == 2
    assert told["before"] == 200
    assert told["after"][-10:] == [200] * 10
