r"""Lists the files of a local folder: each once, links followed, whatever their names are.

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
    """What is below a folder, by path relative to it."""

    sizes: dict[str, int]
    """Bytes of every file; 0 for a link that leads to nothing, which fails when it is read."""
    faults: dict[str, str]
    """Files whose name is not UTF-8, written with escapes, and folders that cannot be opened, with a / at the end."""


def list_folder(root: str) -> Listing:
    """The files below a folder; pipes, sockets and devices are none.

    A folder is entered once, by its own path if it has one below the root, else by the first link to it. A link to the
    root or to a folder above it is not entered.

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


def escaped(path: str) -> str:
    """The path with escapes for bytes that are not UTF-8."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def reason(error: OSError) -> str:
    """What the system says of an error, without the path."""
    text = os.strerror(error.errno) if error.errno else str(error)
    return text[:1].lower() + text[1:]


class _Walk:
    """The folders still to enter, links last, and what was found so far."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.listing = Listing({}, {})
        self.folders: list[tuple[bool, str]] = []
        self._known = {_identity(os.stat(place)) for place in Path(os.path.realpath(root)).parents}

    def enter(self, path: str) -> None:
        """List one folder, unless it is known."""
        place = os.path.join(self.root, path)
        identity = _identity(os.stat(place))
        if identity in self._known:
            return
        self._known.add(identity)
        with os.scandir(place) as entries:
            for entry in entries:
                self._meet(entry, f"{path}/{entry.name}" if path else entry.name)

    def _meet(self, entry: os.DirEntry[str], path: str) -> None:
        try:
            status = entry.stat()
        except OSError as error:
            if entry.is_symlink() or error.errno != errno.ENOENT:  # gone since the folder was read
                self._add(path, 0)
            return
        if stat.S_ISDIR(status.st_mode):
            heapq.heappush(self.folders, (entry.is_symlink(), path))
        elif stat.S_ISREG(status.st_mode):
            self._add(path, status.st_size)

    def _add(self, path: str, size: int) -> None:
        if path.isascii() or escaped(path) == path:
            self.listing.sizes[path] = size
        else:
            self.listing.faults[escaped(path)] = "its name is not UTF-8"


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
