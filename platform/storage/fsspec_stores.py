"""Google Cloud Storage (gs://) and the Hugging Face Hub (hf://), where the package of fsspec for them is installed.

Credentials come from the environment, as those packages read them: GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN. The
packages retry failed requests themselves. Not here: URIs, files and folders, see platform/storage/storage.py.
"""

from __future__ import annotations

import functools
import importlib.util

from pyarrow import fs

from animediffusion.platform.errors import FileError, StorageError

PACKAGES = {"gs": "gcsfs", "hf": "huggingface_hub"}
"""The package that a scheme needs."""


def connect(uri: str, scheme: str) -> fs.FileSystem:
    """Return the pyarrow filesystem of a scheme.

    Raises:
        StorageError: if its package is not installed, or it finds no credentials.
    """
    package = PACKAGES[scheme]
    if importlib.util.find_spec(package) is None:
        raise StorageError(uri, f"{scheme}:// needs the package {package}", f"pip install {package}")
    return file_system(scheme)


def explain(uri: str, error: Exception) -> StorageError:
    """Return the error of one line for what fsspec or a package of it raised."""
    if isinstance(error, FileNotFoundError):
        return FileError(uri, "does not exist", "check the path")
    if isinstance(error, PermissionError):
        return StorageError(uri, "access is denied", "check the credentials")
    found = " ".join(str(error).split())[:300] or type(error).__name__
    return StorageError(uri, found, "check the path and the network, then run the same command again")


@functools.cache
def file_system(scheme: str) -> fs.FileSystem:
    """Return the store of a scheme whose package is installed."""
    import fsspec  # takes time to import, and most files are local

    return fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem(scheme)))
