"""benchmarks/gpu.py on a CPU, where it runs in small: what it finds, and how it ends where something is missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARK = ROOT / "benchmarks" / "gpu.py"

BROKEN = """
import runpy, sys
from animediffusion.models.training.muon import Muon
real, made = Muon.step, []

def step(muon, rate):
    if muon not in made:
        made.append(muon)
    if made.index(muon) == 0:  # the CPU's; the second one trains nothing
        real(muon, rate)

Muon.step = step
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(tmp_path: Path, *arguments: str, path: str = str(ROOT / "src"), before: tuple[str, ...] = ()):
    command = [sys.executable, *before, str(BENCHMARK), "--out", str(tmp_path / "out"), *arguments]
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_a_cpu_trains_and_computes_as_a_cpu_does(tmp_path):
    done = run(tmp_path, "--device", "cpu", "--parts", "trains", "right")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in (tmp_path / "out" / "report.md").read_text().splitlines() if line.startswith("- ")]
    assert [line for line in lines if not line.endswith(": yes")] == []
    assert sum("parameters that move" in line for line in lines) == 2
    assert sum("the engine" in line for line in lines) == 1


@pytest.mark.slow
def test_parameters_that_are_not_trained_are_found(tmp_path):
    done = run(tmp_path, "--device", "cpu", "--parts", "trains", before=("-c", BROKEN))
    assert done.returncode == 1
    assert "demo, parameters that move on a CPU and not here" in done.stderr.splitlines()[-1]


def test_a_gpu_that_is_not_there_is_one_line(tmp_path):
    done = run(tmp_path, "--device", "cuda")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "error: --device cuda" in done.stderr


def test_a_missing_package_is_one_line(tmp_path):
    (tmp_path / "kornia").mkdir()
    (tmp_path / "kornia" / "__init__.py").write_text("raise ModuleNotFoundError('none', name='kornia')")
    done = run(tmp_path, path=f"{tmp_path}{os.pathsep}{ROOT / 'src'}")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("error: kornia: not installed; ")
