"""The start of a worker: the same as by Ray's own script, with which it is compared, and without Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from animediffusion.platform.cluster.ray_compat import SETUP_WORKER

OF_RAY = Path(ray.__file__).parent / "_private" / "workers" / "setup_worker.py"
WORKER = """
import json, os, sys
names = ("FIRST", "HOME", "SECOND", "THIRD")
print(json.dumps([sys.executable, sys.argv, {name: os.environ.get(name) for name in names}]))
"""
EMPTY = {"command_prefix": [], "env_vars": {}, "override_worker_entrypoint": None, "java_jars": []}


def start(script: Path, worker: Path, context: dict) -> str:
    """What a worker prints that this script starts as a raylet does."""
    options = ["--node-ip-address=127.0.0.1", "--name=it's a name", "--language=PYTHON"]
    options.append(f"--serialized-runtime-env-context={json.dumps(context)}")
    command = [sys.executable, str(script), str(worker), *options]
    environment = {**os.environ, "THIRD": "3", "FOURTH": "4"}
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def worker(tmp_path: Path) -> Path:
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    return path


@pytest.mark.parametrize(
    "context",
    [
        {},
        EMPTY | {"py_executable": sys.executable},
        EMPTY | {"env_vars": {"FIRST": "1", "SECOND": "$FIRST:${FOURTH}:${NONE}:${none}:$NONE", "HOME": "a b"}},
        EMPTY | {"command_prefix": ["THIRD=from-the-prefix"], "py_executable": f"env {sys.executable}"},
        EMPTY | {"command_prefix": ["echo", "prefix", "&&"], "env_vars": {"FIRST": "1"}},
    ],
    ids=["nothing", "empty", "variables", "a command as Python", "a prefix"],
)
def test_a_worker_gets_what_rays_own_script_gives_it(context: dict, worker: Path) -> None:
    assert start(SETUP_WORKER, worker, context) == start(OF_RAY, worker, context) != ""


def test_a_worker_starts_without_an_import_of_ray(worker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    command = [sys.executable, SETUP_WORKER, worker, "--language=PYTHON", "--serialized-runtime-env-context={}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "json" in modules
    assert "ray" not in modules
