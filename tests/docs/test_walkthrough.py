"""The walkthrough as typed: every command of docs/walkthrough.md, in order, in one shell, with small numbers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ports import free_port

from animediffusion.platform.images.codec import decode_rgb

TEXT = Path(__file__).parents[2] / "docs" / "walkthrough.md"
SMALL = {"IMAGES": "120", "MINUTES": "0.2", "TRIALS": "2"}
PRELUDE = "set -euo pipefail\ntrap 'jobs -p | xargs --no-run-if-empty kill' EXIT\n"


def commands():
    return re.findall(r"^```sh\n(.*?)^```", TEXT.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_every_block_of_the_text_is_one_that_is_run():
    assert TEXT.read_text().count("```") == 2 * len(commands())
    assert len(commands()) >= 9


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_walkthrough_goes_from_images_to_an_endpoint_and_back(tmp_path):
    command = tmp_path / "bin" / "animediffusion"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m animediffusion "$@"\n')
    command.chmod(0o755)
    # Its own HOME and Ray, as on a new machine.
    path = os.pathsep.join([str(command.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, **SMALL, "HOME": str(tmp_path), "PATH": path, "PORT": str(free_port())}
    for name in ("RAY_AUTH_MODE", "MLFLOW_TRACKING_URI", "ANIMEDIFFUSION_WORKSPACE"):
        environment.pop(name, None)

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
