"""Builds the image of infra/docker/Dockerfile without a container daemon.

debootstrap makes a Debian base with the name of the Dockerfile's own base, and buildah builds the image on it. pip in
the build uses this machine's pip configuration. Needs root, both programs (Debian packages of the same names), 12 GB
and 15 minutes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "infra/docker/Dockerfile"
PACKAGES = "python3,python3-pip,python-is-python3,ca-certificates"
SUITE = "bookworm"
TOOLS = ("buildah", "debootstrap")
IMAGE = "animediffusion"


@dataclass(frozen=True)
class Image:
    """A built image."""

    root: Path
    """Directory with the files of the image."""
    variables: dict[str, str]
    """Environment of its containers."""


def build(folder: Path) -> Image:
    """Build the image in `folder`, which keeps the base and the image."""
    base = folder / "base"
    if not base.exists():
        _make_base(base)
        _name_base(folder, base)
    config = folder / "pip.conf"
    text, places = pip_configuration()
    config.write_text(text)
    volumes = [f"--volume={place}:{place}:ro" for place in places]
    options = ["--isolation=chroot", "--network=host", "--layers=false", "--pull-never", f"--tag={IMAGE}"]
    options.append("--build-arg=TORCH_CONSTRAINTS=constraints.txt")  # the torch that the tests here use
    _buildah(folder, "build", *options, f"--volume={config}:/etc/pip.conf:ro", *volumes, f"--file={DOCKERFILE}", ROOT)
    listed = json.loads(_buildah(folder, "inspect", "--type=image", IMAGE))["OCIv1"]["config"]["Env"]
    _buildah(folder, "rm", "--all")
    container = _buildah(folder, "from", "--pull-never", IMAGE)
    root = Path(_buildah(folder, "mount", container))
    return Image(root, dict(entry.split("=", 1) for entry in listed))


def pip_configuration() -> tuple[str, list[Path]]:
    """Return this machine's pip configuration as a pip.conf, and the directories and files that it names.

    The pages of an index in a directory link to files outside of that directory, so its parent is returned.
    """
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    settings = dict(re.findall(r"^(?:global|install|:env:)\.([\w-]+)='(.*)'$", listed, flags=re.MULTILINE))
    named = {Path(path).parent if url else Path(path) for value in settings.values() for url, path in _paths(value)}
    lines = [f"{name} = {' '.join(value.split())}" for name, value in settings.items()]
    return "\n".join(["[global]", *lines, ""]), sorted(path for path in named if path.exists())


def _paths(value: str) -> list[tuple[str, str]]:
    return re.findall(r"(?:^|\s)(file://)?(/[^\s]+)", value)


def _make_base(base: Path) -> None:
    """Write a Debian with Python whose pip installs outside of virtual environments, as in the official image."""
    subprocess.run(["debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(base)], check=True)
    for marker in base.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
        marker.unlink()


def _name_base(folder: Path, base: Path) -> None:
    """Make an image of the base, with the name of the base in the Dockerfile."""
    text = DOCKERFILE.read_text()
    [version] = re.findall(r"^ARG PYTHON_VERSION=(\S+)$", text, flags=re.MULTILINE)
    [name] = set(re.findall(r"^FROM (\S+)", text, flags=re.MULTILINE))
    empty = _buildah(folder, "from", "scratch")
    _buildah(folder, "add", "--quiet", empty, base, "/")
    _buildah(folder, "config", "--env=PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin", empty)
    _buildah(folder, "commit", "--quiet", empty, "docker.io/library/" + name.replace("${PYTHON_VERSION}", version))
    _buildah(folder, "rm", empty)


def _buildah(folder: Path, *words: str | Path) -> str:
    stores = ["--storage-driver=vfs", f"--root={folder / 'store'}", f"--runroot={folder / 'run'}"]
    command = ["buildah", *stores, *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
