"""What `make` does first: .ci/setup in a copy of the checkout, in a folder with a space in its name, on a bare PATH."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = ("bash", "dirname", "env", "grep", "id", "mkdir", "rm", "sed", "tail", "touch", "uname")
NO_INDEX = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1"}


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "my checkout"
    for name in (".ci/setup", "tests/programs.py", "pyproject.toml", "constraints.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture
def setup(checkout, tmp_path):
    """A function that runs .ci/setup with these arguments; neither apt nor a package index can be reached."""
    programs = {name: shutil.which(name) for name in TOOLS} | {"python3": os.path.realpath(sys.executable)}
    (tmp_path / "bin").mkdir()
    for name, path in programs.items():
        (tmp_path / "bin" / name).symlink_to(path)

    def run(*arguments, **environment):
        environment = {"PATH": str(tmp_path / "bin"), "HOME": "/nonexistent", **NO_INDEX, **environment}
        command = [str(checkout / ".ci/setup"), *arguments]
        return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=300)

    return run


def test_missing_programs_are_one_line_before_anything_is_installed(setup, checkout):
    done = setup("tests")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: missing: git curl chromium")
    assert "; install: " in done.stderr
    assert not (checkout / ".venv").exists()


def test_a_python_that_does_not_fit_is_named(setup):
    done = setup(PYTHON="/usr/bin/python2")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: PYTHON: /usr/bin/python2; it must be Python 3.11 to 3.13 with venv\n"


def test_an_environment_of_these_pins_is_left_as_it_is(setup, checkout):
    (checkout / ".venv").mkdir()
    (checkout / ".venv/.installed").touch()
    done = setup()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
@pytest.mark.parametrize("log", ["Installing collected packages: torch\n", ""], ids=["interrupted", "moved"])
def test_a_broken_environment_is_made_from_scratch_and_without_an_index_one_line_says_so(setup, checkout, log):
    home = checkout if log else checkout.parent / "where it was"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(checkout / ".venv")], check=True)
    (checkout / ".venv/pyvenv.cfg").write_text(f"command = python -m venv {home}/.venv\n")
    (checkout / ".venv/install.log").write_text(log)
    (checkout / ".venv/.installed").touch()
    done = setup()
    assert done.returncode == 1
    assert done.stdout == "installing into .venv, some minutes the first time; the log is .venv/install.log\n"
    assert done.stderr == (
        "error: .venv: the package index does not answer; see .venv/install.log, then run the same command again\n"
    )
    assert not (checkout / ".venv/.installed").exists()
    assert "127.0.0.1" in (checkout / ".venv/install.log").read_text()
