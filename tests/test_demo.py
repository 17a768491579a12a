"""The demo: the order of its stages with replaced stages, and a small run of the whole command."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from animediffusion import demo
from animediffusion.console import Console
from animediffusion.pipelines.training.recipe import TrainConfig
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import RegistryError
from animediffusion.platform.images.codec import decode_rgb


def test_phase_2_begins_with_the_tuned_model_and_a_worse_one_of_a_repeated_demo_is_promoted_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[tuple[str, str | None, float | None]] = []
    promoted: list[bool] = []

    def train(_settings: Settings, config: TrainConfig, _report: object) -> SimpleNamespace:
        trained.append((config.recipe, config.init_from, config.max_minutes))
        return SimpleNamespace(bundle=f"bundle {len(trained)}")

    def promote(_settings: Settings, version: int, *, why: str, force: bool = False) -> None:
        promoted.append(force)
        if not force:
            raise RegistryError(f"version {version}", "is worse", "train longer")

    def register(_settings: Settings, bundle: str, *, parent: int) -> SimpleNamespace:
        assert (bundle, parent) == ("bundle 2", 7)
        return SimpleNamespace(version=8)

    monkeypatch.setattr(demo, "train", train)
    monkeypatch.setattr(demo, "tune_sampler", lambda *_, **__: SimpleNamespace(version=7))
    monkeypatch.setattr(demo, "evaluate_and_record", lambda _settings, bundle, _data, **_: {"of": bundle})
    monkeypatch.setattr(demo, "release", SimpleNamespace(register=register, promote=promote))

    found = demo.train_model(Settings(workspace=tmp_path), "faces", 8.0, Console())

    assert found == (8, {"of": "bundle 2"})
    assert trained == [("demo", "starter", 6.0), ("demo-phase2", "models:/animediffusion/7", 2.0)]
    assert promoted == [False, True]
    assert "version 8: is worse; train longer" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_trains_a_model_and_ends_with_drawings_colored_over_http(tmp_path: Path) -> None:
    few = "from animediffusion import demo; demo.TUNE_TRIALS, demo.SIZE = 2, 64; "
    few += "from animediffusion.cli.app import main; main()"
    command = [sys.executable, "-c", few, "demo", "--minutes", "0.1", "--rows", "100", "--no-serve"]
    # Its own HOME and Ray, as on a new machine.
    environment = {**os.environ, "HOME": str(tmp_path)}
    environment.pop("RAY_AUTH_MODE", None)
    done = subprocess.run(
        [*command, "--json", "--workspace", str(tmp_path / "ws")], env=environment, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    measured = json.loads((tmp_path / "ws/demo/evaluation/metrics.json").read_text())
    # So few steps from scratch are below the mean color (11 steps: 13.1 dB; 13.6); from the starter model they are not.
    baselines = measured["baselines"]
    assert summary["psnr_same"] == measured["tracks"]["same"]["psnr"] > baselines["mean_color"]["same"]["psnr"]
    assert summary["baseline_psnr_same"] == max(found["same"]["psnr"] for found in baselines.values())
    assert summary["version"] == 2
    assert summary["url"].startswith("http://127.0.0.1:")
    assert decode_rgb(Path(summary["picture"]).read_bytes()).shape[0] > 300
    assert "Traceback" not in done.stderr
    assert not (tmp_path / ".ray").exists()
