r"""List the files of a local folder: links are followed, each file is listed once, and any file name is accepted.

listing = list_folder("drawings")
listing.sizes            # {"a.png": 1200, "line/a.png": 300}
listing.faults           # {"\x90\xfc.png": "its name is not UTF-8", "locked/": "permission denied"}
"""

from __future__ import annotations

import errno
import heapq
import os
import stat
from pathlib import Path
from typing import NamedTuple


class Listing(NamedTuple):
    """The files below a folder and the entries that cannot be used, by path relative to the folder."""

    sizes: dict[str, int]
    """Size of every file in bytes; 0 for a broken link, which fails when it is read."""
    faults: dict[str, str]
    """Problem of each unusable entry: a file with a name that is not UTF-8 (escaped), or a folder (ends with /)."""


def list_folder(root: str) -> Listing:
    """List the files below a folder, without pipes, sockets and devices.

    A folder that several paths lead to is listed once: by its own path if that is below the root, else by the first
    link to it. Links to the root or to a folder above it are not followed.

    Raises:
        OSError: if the root itself cannot be opened.
    """
    walk = _Walk(root)
    walk.enter("")
    while walk.folders:
        _, path = heapq.heappop(walk.folders)
        try:
            walk.enter(path)
        except OSError as error:
            walk.listing.faults[f"{escaped(path)}/"] = reason(error)
    return Listing(dict(sorted(walk.listing.sizes.items())), walk.listing.faults)


def expanded(path: str | Path) -> Path:
    """Return the path with `~` or `~user` replaced by the home folder; unchanged if there is no such user."""
    try:
        return Path(path).expanduser() if str(path).startswith("~") else Path(path)
    except RuntimeError:  # no such user
        return Path(path)


def escaped(path: str) -> str:
    """Return the path with escapes for bytes that are not UTF-8."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def reason(error: OSError) -> str:
    """Return the system's description of an error, without the path."""
    if error.errno == errno.EEXIST:
        return "a file has the name of its folder"
    text = os.strerror(error.errno) if error.errno else str(error)
    return text[:1].lower() + text[1:]


class _Walk:
    """State of a listing: a queue of the folders to list, with links last, and the files found so far."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.listing = Listing({}, {})
        self.folders: list[tuple[bool, str]] = []
        self._known = {_identity(os.stat(parent)) for parent in Path(os.path.realpath(root)).parents}

    def enter(self, path: str) -> None:
        """List one folder unless it was listed before."""
        folder = os.path.join(self.root, path)
        identity = _identity(os.stat(folder))
        if identity in self._known:
            return
        self._known.add(identity)
        with os.scandir(folder) as entries:
            for entry in entries:
                self._add_entry(entry, f"{path}/{entry.name}" if path else entry.name)

    def _add_entry(self, entry: os.DirEntry[str], path: str) -> None:
        try:
            status = entry.stat()
        except OSError as error:
            if entry.is_symlink() or error.errno != errno.ENOENT:  # else the file was deleted meanwhile
                self._add_file(path, 0)
            return
        if stat.S_ISDIR(status.st_mode):
            heapq.heappush(self.folders, (entry.is_symlink(), path))
        elif stat.S_ISREG(status.st_mode):
            self._add_file(path, status.st_size)

    def _add_file(self, path: str, size: int) -> None:
        if path.isascii() or escaped(path) == path:
            self.listing.sizes[path] = size
        else:
            self.listing.faults[escaped(path)] = "its name is not UTF-8"


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
