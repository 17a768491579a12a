"""The image is built and run, see tests/image.py and image_roles.py. A quarter of an hour and 12 GB: asked for by
IMAGE=1, or by IMAGE=FOLDER, which keeps the image, and its base for the next build."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import containers
import image
import pytest
import stack

SCRIPT = Path(__file__).with_name("image_roles.py")

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not os.environ.get("IMAGE"), reason="asked for by IMAGE=1"),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[image.Image]:
    missing = [name for name in image.TOOLS if shutil.which(name) is None]
    assert not missing, f"no {', '.join(missing)}: install the packages {' '.join(image.TOOLS)}"
    kept = os.environ["IMAGE"] != "1"
    folder = Path(os.environ["IMAGE"]) if kept else tmp_path_factory.mktemp("image")
    folder.mkdir(exist_ok=True)
    yield image.build(folder)
    if not kept:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def found(built: image.Image) -> dict:
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    command = [*containers.NAMESPACES, sys.executable, str(SCRIPT), str(built.root), json.dumps(built.variables)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_user_without_a_home_trains_on_a_read_only_root(found: dict) -> None:
    assert {"config.json", "model.safetensors"} <= set(found["foreign"]["bundle"])


def test_mlflow_answers_to_its_name_only_and_stops(found: dict) -> None:
    assert (found["mlflow"]["by_name"], found["mlflow"]["by_address"]) == (200, 403)
    assert found["mlflow"]["stopped_s"] < 30


def test_a_head_as_the_operator_starts_it_runs_jobs_and_serves_pictures(found: dict) -> None:
    assert found["ray"]["store_on_disk"] is False
    assert found["ray"]["without_token"] == 401
    assert (found["ray"]["picture"], found["ray"]["without_key"]) == ("image/png", 401)


def test_a_head_stops_in_the_time_that_its_pod_has(found: dict) -> None:
    spec = stack.found("RayService", "animediffusion")["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    assert found["ray"]["stopped_s"] < spec["terminationGracePeriodSeconds"]


def test_the_operators_first_container_has_the_memory_that_it_needs(found: dict) -> None:
    assert found["ray"]["health_check_peak"] < 256 * 2**20
