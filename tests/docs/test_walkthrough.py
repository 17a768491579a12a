"""The walkthrough as typed: every command of docs/walkthrough.md, in order, in one shell, with small numbers.

Its commands share the cluster of RAY_ADDRESS, because each would start its own otherwise: tests/test_demo.py runs
the same stages as on a laptop. They are processes that are forked from one that has imported the other packages.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ports import free_port
from preforked import forking

from animediffusion.platform.images.codec import decode_rgb

TEXT = Path(__file__).parents[2] / "docs" / "walkthrough.md"
SMALL = {"IMAGES": "60", "MINUTES": "0.05", "TRIALS": "2"}
PRELUDE = "set -euo pipefail\ntrap 'jobs -p | xargs --no-run-if-empty kill' EXIT\n"


def commands():
    return re.findall(r"^```sh\n(.*?)^```", TEXT.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_every_block_of_the_text_is_one_that_is_run():
    assert TEXT.read_text().count("```") == 2 * len(commands())
    assert len(commands()) >= 9


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_walkthrough_goes_from_images_to_an_endpoint_and_back(tmp_path, cluster_head):
    # Its own HOME, as on a new machine.
    environment = {**os.environ, **SMALL, "HOME": str(tmp_path), "PORT": str(free_port())}
    for name in ("RAY_AUTH_MODE", "MLFLOW_TRACKING_URI", "ANIMEDIFFUSION_WORKSPACE"):
        environment.pop(name, None)
    environment["RAY_ADDRESS"], environment["RAY_AUTH_TOKEN"] = cluster_head.gcs, cluster_head.token
    environment["RAY_API_SERVER_ADDRESS"] = cluster_head.address
    environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # the head is on loopback, so its clients have to be

    with forking(environment) as folder:
        environment["PATH"] = os.pathsep.join([folder, str(Path(sys.executable).parent), os.environ["PATH"]])
        done = subprocess.run(
            ["bash", "-c", PRELUDE + "\n".join(commands())],
            cwd=tmp_path, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Traceback" not in done.stderr
    assert "rollback" in done.stdout
    assert decode_rgb((tmp_path / "colored.png").read_bytes()).shape == (64, 64, 3)
    assert decode_rgb((tmp_path / "alone.png").read_bytes()).shape == (64, 64, 3)
    assert decode_rgb((tmp_path / "compare.png").read_bytes()).shape[0] > 300
