"""infra/docker: what a linter says of it."""

import subprocess
import sys
from pathlib import Path

from manifests import ROOT

DOCKERFILE = ROOT / "infra/docker/Dockerfile"


def lint(path: Path) -> str:
    done = subprocess.run([Path(sys.executable).with_name("hadolint"), path], capture_output=True, text=True)
    return done.stdout


def test_the_dockerfile_is_clean() -> None:
    assert lint(DOCKERFILE) == ""


def test_the_linter_would_find_a_root_user_by_name(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text(DOCKERFILE.read_text().replace("USER 1000", "USER root"))
    assert "DL3002" in lint(bad)


def test_the_image_runs_as_the_user_that_the_pods_name() -> None:
    lines = DOCKERFILE.read_text().splitlines()
    assert [line for line in lines if line.startswith("USER ")] == ["USER 1000"]
    assert "--uid 1000" in DOCKERFILE.read_text()


def test_nothing_in_the_image_reports_to_others() -> None:
    text = DOCKERFILE.read_text()
    assert "RAY_USAGE_STATS_ENABLED=0" in text
    assert "MLFLOW_DISABLE_TELEMETRY=true" in text


def test_every_file_that_the_build_copies_is_sent_to_it() -> None:
    ignored = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().splitlines()
    lines = [line.split() for line in DOCKERFILE.read_text().splitlines() if line.startswith("COPY ")]
    copied = {source for line in lines if not line[1].startswith("--from") for source in line[1:-1]}
    assert copied
    assert {f"!{source}" for source in copied} <= set(ignored)
