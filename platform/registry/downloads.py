"""Find the folder of a bundle: the starter model, a local folder, or a download that appears completely or not at all.

Not here: the files of a registered version, see client.py.
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
from animediffusion.platform.storage import storage

STARTER = "starter"
"""MODEL and version of the starter model, the bundle that comes with the package."""
STARTER_FOLDER = Path(__file__).with_name("starter")


@functools.cache
def _own_cache() -> tempfile.TemporaryDirectory[str]:
    """Return a cache folder for this process only, which is deleted when the process ends."""
    return tempfile.TemporaryDirectory(prefix="animediffusion-cache-")


def cache_folder(settings: Settings) -> Path:
    """Return the parent folder of downloads: WORKSPACE/cache, or a temporary folder if the workspace is read-only."""
    cache = settings.workspace / "cache"
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    return cache if os.access(existing, os.W_OK) else Path(_own_cache().name)


def fetch_folder(model: str | Path, cache: Path) -> Path:
    """Return the local folder of a bundle; a URI is downloaded each time, because its content may have changed.

    Args:
        model: a bundle folder or URI, or STARTER.
        cache: parent folder of downloads.

    Raises:
        BundleError: the folder does not exist.
        StorageError: the URI cannot be read.
    """
    if str(model) == STARTER:
        return STARTER_FOLDER
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
    """Yield a temporary folder and rename it to `destination` at the end; several processes may do so concurrently."""
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
