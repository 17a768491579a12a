"""The whole main job, small, as typed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from animediffusion.platform.images.codec import decode_rgb

pytestmark = pytest.mark.ray


@pytest.mark.timeout(900)
def test_the_demo_ends_with_drawings_colored_over_http(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "animediffusion", "demo", "--minutes", "0.2", "--rows", "120", "--no-serve"]
    # Its own HOME and Ray, as on a new machine.
    environment = {**os.environ, "HOME": str(tmp_path)}
    environment.pop("RAY_AUTH_MODE", None)
    done = subprocess.run(
        [*command, "--json", "--workspace", str(tmp_path / "ws")], env=environment, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["psnr_same"] > 5
    assert summary["version"] == 2
    assert summary["url"].startswith("http://127.0.0.1:")
    assert decode_rgb(Path(summary["picture"]).read_bytes()).shape[0] > 300
    assert "Traceback" not in done.stderr
    assert not (tmp_path / ".ray").exists()
