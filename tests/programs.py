"""System programs that the tests need: Chromium, a library that Playwright needs, PostgreSQL's tools, and Redis.

    python tests/programs.py      prints missing programs, one Debian package per line

This script needs only the standard library, so that .ci/setup can run it before anything is installed.
"""

from __future__ import annotations

import ctypes
import glob
import os
import shutil
import subprocess
import sys

CHROMIUM = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
POSTGRES = ("/usr/lib/postgresql/*/bin", "/opt/homebrew/opt/postgresql@*/bin", "/usr/local/opt/postgresql@*/bin")
"""Folders that are not on the PATH: those of Debian's packages, and of Homebrew's on both kinds of Mac."""


def chromium() -> str:
    """Return the path of a Chromium that starts; for example, Ubuntu's package is a script that fails without snap."""
    for path in filter(None, map(shutil.which, CHROMIUM)):
        if subprocess.run([path, "--version"], capture_output=True, check=False).returncode == 0:
            return path
    raise FileNotFoundError("no Chromium: install the package chromium, or run make test, which does it where it can")


def initdb() -> str:
    """Return the path of PostgreSQL's initdb, the newest of several packages; its folder has the other tools."""
    folders = [folder for pattern in POSTGRES for folder in sorted(glob.glob(pattern), reverse=True)]
    found = shutil.which("initdb", path=os.pathsep.join([*folders, os.environ.get("PATH", "")]))
    if found is None:
        raise FileNotFoundError("no PostgreSQL: install the package postgresql, or run make test, which does it")
    return found


def redis_server() -> str:
    """Return the path of redis-server."""
    found = shutil.which("redis-server")
    if found is None:
        raise FileNotFoundError("no Redis: install the package redis-server, or run make test, which does it")
    return found


def libatomic() -> None:
    """Load the library that Playwright's node needs; its other libraries are on every Linux."""
    if sys.platform == "linux":
        ctypes.CDLL("libatomic.so.1")


def missing() -> list[str]:
    """Return the Debian names of the missing packages."""
    names = []
    programs = {"chromium": chromium, "libatomic1": libatomic, "postgresql": initdb, "redis-server": redis_server}
    for name, find in programs.items():
        try:
            find()
        except OSError:
            names.append(name)
    return names


if __name__ == "__main__":
    print("\n".join(missing()))
