"""Read and write files and folders at local paths or s3:// URIs, and at gs:// and hf:// with packages of fsspec.

    write_bytes(join("s3://bucket/faces", "manifest.json"), data)
    for name in list_files("data/faces"): ...

The endpoint comes from `?endpoint_override=` in a URI, else from the configuration of boto3, which MLflow uses, too:
AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or the AWS profile. Credentials come from the environment or the machine, never
from a URI. All errors are a StorageError that names the URI. Requests to a store that throttles, resets or stalls are
retried for PATIENCE_S, then a StoreFailedError is raised.
Not here: the meaning of the bytes; the syntax of addresses, see addresses.py; S3 requests, see s3.py;
gs:// and hf://, see fsspec_stores.py.
"""

from __future__ import annotations

import errno
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
from pyarrow import fs

from animediffusion.platform.errors import (
    AnimeDiffusionError,
    ConfigError,
    FileError,
    StorageError,
    StoreFailedError,
    UnreachableError,
)
from animediffusion.platform.storage import fsspec_stores, s3
from animediffusion.platform.storage.addresses import is_remote, join, parse
from animediffusion.platform.storage.local_files import Listing, escaped, list_folder, reason

__all__ = ["is_remote", "join"]

T = TypeVar("T")

PATIENCE_S = 90.0
"""Seconds for which failed requests to a store are retried, enough to survive an outage of one minute."""
PATIENCE_VARIABLE = "ANIMEDIFFUSION_STORAGE_PATIENCE_S"
"""Environment variable that overrides PATIENCE_S."""
_LONGEST_PAUSE_S = 10.0
_PARTIAL = ".part"
"""Suffix of a file that is being written."""

_NOT_THE_FILE = (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE, errno.ETIMEDOUT)
"""Errors of the machine or of a mount, which do not depend on the file."""


def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """Return the pyarrow filesystem of `uri` and the path inside it.

    Raises:
        StorageError: for an unknown scheme, credentials in the URI, a missing bucket, or a store that does not answer.
    """
    location = parse(uri)
    if not location.bucket:
        return fs.LocalFileSystem(), location.path
    if location.scheme:
        with explained(uri):
            return fsspec_stores.connect(uri, location.scheme), location.path
    region = location.region or os.environ.get("AWS_REGION") or s3.configured(uri)[1]
    with explained(uri):
        return s3.connect(location.endpoint, region, location.bucket, s3.settings()), location.path


def absolute(uri: str) -> str:
    """Make a local path absolute, because Ray's workers have another working directory; an s3:// URI is unchanged."""
    return uri if is_remote(uri) else str(Path(parse(uri).path))


def s3_object(uri: str) -> tuple[str, str, str | None, str | None]:
    """Return (bucket, key, endpoint, region) of an s3:// URI, for requests that only boto3 supports."""
    location = parse(uri)
    if location.scheme:
        raise StorageError(uri, "only s3:// and local files can be changed while others read them", "give one of these")
    return location.bucket, location.path.removeprefix(f"{location.bucket}/"), location.endpoint, location.region


def expect(*uris: str) -> None:
    """Mark stores as known to answer, perhaps to another process, so that their failures are retried."""
    for uri in uris:
        location = parse(uri)
        if location.bucket and not location.scheme:
            s3.expect(location.endpoint, location.bucket)


def patiently(uri: str, work: Callable[[fs.FileSystem, str], T]) -> T:
    """Return `work(filesystem, path)` for `uri`, and call `work` again while the store fails.

    pyarrow retries single requests for some seconds. This function retries all of `work` for patience_s() seconds; the
    pauses double up to 10 s and have a random length, so that a hundred workers do not retry at the same moment.

    Args:
        uri: address that is read or written; it is also named in error messages.
        work: may be called several times, so it must be safe to repeat after a partial call.

    Raises:
        StoreFailedError: if the store still fails after that time.
        UnreachableError: if the store did not answer the first probe; this takes less than 10 s.
        StorageError: for errors that a retry cannot fix.
    """
    files, path = filesystem(uri)
    patience, started, pause = patience_s(), time.monotonic(), 0.5
    while True:
        try:
            with explained(uri):
                return work(files, path)
        except UnreachableError as error:
            waited = time.monotonic() - started
            if waited + pause > patience:
                found = f"{error.found}, for {waited:.0f} s"
                raise StoreFailedError(uri, found, "run the same command again when the store is available") from error
        time.sleep(random.uniform(pause / 2, pause))
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def patience_s() -> float:
    """Return the seconds for which failed requests to a store are retried, 0 or more.

    Raises:
        ConfigError: if the environment variable has an invalid value.
    """
    value = os.environ.get(PATIENCE_VARIABLE) or str(PATIENCE_S)
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1
    if not 0 <= seconds < float("inf"):
        raise ConfigError(PATIENCE_VARIABLE, repr(value), "seconds, 0 or more")
    return seconds


def exists(uri: str) -> bool:
    """Whether a file or a folder exists; in an object store, only a folder that contains something exists."""
    return patiently(uri, lambda files, path: bool(files.get_file_info(path).type != fs.FileType.NotFound))


def file_size(uri: str) -> int | None:
    """Return the size of a file in bytes, or None if `uri` is a folder or does not exist."""

    def find(files: fs.FileSystem, path: str) -> int | None:
        info = files.get_file_info(path)
        return int(info.size) if info.type == fs.FileType.File else None

    return patiently(uri, find)


def read_bytes(uri: str) -> bytes:
    """Return the content of one file."""

    def read(files: fs.FileSystem, path: str) -> bytes:
        with files.open_input_stream(path) as stream:
            return bytes(stream.read())

    return patiently(uri, read)


def read_range(uri: str, start: int, length: int) -> bytes:
    """Return `length` bytes of one file from the byte `start` on, or fewer if the file ends before."""

    def read(files: fs.FileSystem, path: str) -> bytes:
        with files.open_input_file(path) as source:
            size = source.size()
            return bytes(source.read_at(min(length, max(0, size - start)), min(start, size)))

    return patiently(uri, read)


def write_bytes(uri: str, data: bytes | pa.Buffer) -> None:
    """Create or replace one file; a reader sees either the old or the new content, never a part of it."""

    def write(files: fs.FileSystem, path: str) -> None:
        if is_remote(uri):
            with files.open_output_stream(path) as stream:
                stream.write(data)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{uuid.uuid4().hex}{_PARTIAL}")  # the target's name may be too long for a suffix
        try:
            partial.write_bytes(data)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    patiently(uri, write)


def survey(uri: str) -> Listing:
    """List all files below a folder, hidden files included, and the entries that cannot be used.

    Raises:
        StorageError: if the folder does not exist.
    """

    def find(files: fs.FileSystem, path: str) -> Listing:
        if is_remote(uri):
            start = len(path.rstrip("/")) + 1
            infos = files.get_file_info(fs.FileSelector(path, recursive=True))
            return Listing(dict(sorted((info.path[start:], info.size) for info in infos if info.is_file)), {})
        if not Path(path).is_dir():
            raise StorageError(uri, "is not a folder" if Path(path).exists() else "does not exist", "check the path")
        return list_folder(path)

    return patiently(uri, find)


def list_sizes(uri: str) -> dict[str, int]:
    """Return the size in bytes of every file below a folder, hidden files included, sorted by relative path.

    Raises:
        StorageError: if the folder does not exist or an entry in it cannot be used.
    """
    found = survey(uri)
    for path, fault in found.faults.items():
        raise StorageError(join(uri, path), fault, "rename the entry, or check its permissions")
    return found.sizes


def list_files(uri: str) -> list[str]:
    """Return the sorted relative paths of all files below a folder."""
    return list(list_sizes(uri))


def list_names(uri: str) -> Iterator[str]:
    """Yield the sorted names of the files directly in a folder; those of S3 arrive by pages of 1,000.

    Names that are not UTF-8 are left out.

    Raises:
        StorageError: if the folder does not exist or cannot be listed.
    """
    location = parse(uri)
    if not location.bucket:
        with explained(uri), os.scandir(location.path) as entries:
            names = [entry.name for entry in entries if entry.is_file() or _is_broken_link(entry)]
        yield from sorted(name for name in names if escaped(name) == name)
        return
    if location.scheme:

        def find(files: fs.FileSystem, path: str) -> list[str]:
            return sorted(info.base_name for info in files.get_file_info(fs.FileSelector(path)) if info.is_file)

        yield from patiently(uri, find)
        return
    prefix = f"{location.path}/".removeprefix(f"{location.bucket}/")
    token: str | None = None
    while True:

        def page(_: fs.FileSystem, __: str, token: str | None = token) -> tuple[list[str], str | None]:
            return s3.list_page(location.bucket, prefix, token, location.endpoint, location.region)

        keys, token = patiently(uri, page)
        yield from (key[len(prefix) :] for key in keys if key != prefix)
        if token is None:
            return


def _is_broken_link(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)


def delete(uri: str) -> None:
    """Delete a file, or a folder with its content; a missing file or folder is ignored."""

    def remove(files: fs.FileSystem, path: str) -> None:
        kind = files.get_file_info(path).type
        if kind == fs.FileType.Directory:
            files.delete_dir(path)
        elif kind == fs.FileType.File:
            files.delete_file(path)

    patiently(uri, remove)


def is_partial(path: str) -> bool:
    """Whether a file is an unfinished file that a killed write_bytes() left behind; such files are not read."""
    name = path.rpartition("/")[2]
    return name.startswith(".") and name.endswith(_PARTIAL)


def download_folder(uri: str, local: Path) -> None:
    """Copy all files below `uri` into a local folder."""
    for name in list_files(uri):
        write_bytes(str(local / name), read_bytes(join(uri, name)))


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Convert errors of pyarrow and of the system to a one-line StorageError."""
    try:
        yield
    except StorageError:
        raise
    except UnicodeEncodeError as error:  # raised by pyarrow
        raise FileError(uri, "its name is not UTF-8", "rename it") from error
    except (OSError, pa.ArrowException) as error:
        raise _explain(uri, error) from error
    except Exception as error:  # packages of fsspec have errors of their own
        if isinstance(error, AnimeDiffusionError) or not parse(uri).scheme:
            raise
        raise fsspec_stores.explain(uri, error) from error


def _explain(uri: str, error: Exception) -> StorageError:
    location = parse(uri)
    if location.scheme:
        return fsspec_stores.explain(uri, error)
    if location.bucket:
        return s3.explain(uri, location.endpoint, location.bucket, error)
    if isinstance(error, FileNotFoundError):
        is_link = Path(location.path).is_symlink()
        return FileError(uri, "is a broken link" if is_link else "does not exist", "check the path")
    if isinstance(error, OSError) and error.errno:
        kind = StorageError if error.errno in _NOT_THE_FILE else FileError
        return kind(uri, reason(error), "check the path and its permissions")
    return StorageError(uri, " ".join(str(error).split())[:300], "check the path")
