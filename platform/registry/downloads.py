"""Folders that are downloaded: where they are kept, and how each appears whole or not at all.

Not here: which files a registered version has, see registry.py.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from animediffusion.platform.config import Settings
from animediffusion.platform.errors import BundleError
from animediffusion.platform.network import is_uri
from animediffusion.platform.storage import files as storage


@functools.cache
def _own_cache() -> tempfile.TemporaryDirectory[str]:
    """A cache of this process alone, removed at its end."""
    return tempfile.TemporaryDirectory(prefix="animediffusion-cache-")


def cache_folder(settings: Settings) -> Path:
    """Parent of downloads: WORKSPACE/cache, or a temporary folder where the workspace cannot be written."""
    cache = settings.workspace / "cache"
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    return cache if os.access(existing, os.W_OK) else Path(_own_cache().name)


def fetch_folder(model: str | Path, cache: Path) -> Path:
    """The local folder of a bundle given by path or URI; a URI is downloaded each time, as it may have changed."""
    if is_uri(str(model)) and not str(model).startswith("file:"):
        destination = cache / "uri" / hashlib.sha256(str(model).encode()).hexdigest()[:16]
        with whole_folder(destination) as temporary:
            storage.download_folder(str(model), temporary)
        return destination
    folder = Path(storage.absolute(str(model)))
    if not folder.is_dir():
        raise BundleError(str(model), "no such folder", "give a bundle folder, its s3:// URI or models:/NAME@champion")
    return folder


@contextmanager
def whole_folder(destination: Path) -> Iterator[Path]:
    """A folder to fill, which takes its place in one rename; another process may do the same at the same time."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        yield temporary
        shutil.rmtree(destination, ignore_errors=True)
        try:
            temporary.rename(destination)
        except OSError:
            if not destination.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
