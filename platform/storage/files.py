"""Bytes and folders behind a local path or an s3:// URI.

    write_bytes(join("s3://bucket/faces", "manifest.json"), data)
    for name in list_files("data/faces"): ...

The endpoint is that of `?endpoint_override=` in a URI, else the one boto3 and with it MLflow are configured with:
AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, or the AWS profile. Credentials come from the environment or the machine, never
from a URI. All errors are a StorageError that names the URI. A store
that throttles, resets or stalls is asked again for a minute, then it is a StoreFailedError.
Not here: what the bytes mean; how addresses are read, see addresses.py; how an S3 store is asked, see s3.py.
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

from animediffusion.platform.errors import ConfigError, StorageError
from animediffusion.platform.storage import s3
from animediffusion.platform.storage.addresses import is_remote, join, parse
from animediffusion.platform.storage.local_files import Listing, list_folder, reason
from animediffusion.platform.storage.s3 import FileError, StoreFailedError, UnreachableError

__all__ = ["FileError", "StoreFailedError", "UnreachableError", "is_remote", "join"]

T = TypeVar("T")

PATIENCE_S = 90.0
"""Seconds for which a store that fails is asked again, enough for one that is away for a minute."""
PATIENCE_VARIABLE = "ANIMEDIFFUSION_STORAGE_PATIENCE_S"
"""Sets another number of seconds."""
_LONGEST_PAUSE_S = 10.0
_PARTIAL = ".part"

_NOT_THE_FILE = (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE, errno.ETIMEDOUT)
"""Errors of the machine or of a mount, which any file would meet."""


def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """The pyarrow filesystem that holds `uri`, and the path inside it.

    Raises:
        StorageError: for an unknown scheme, credentials in the URI, no bucket, or a store that does not answer.
    """
    location = parse(uri)
    if not location.bucket:
        return fs.LocalFileSystem(), location.path
    region = location.region or os.environ.get("AWS_REGION") or s3.configured(uri)[1]
    with explained(uri):
        return s3.connect(location.endpoint, region, location.bucket, s3.settings()), location.path


def absolute(uri: str) -> str:
    """The same place, meant the same from any working directory (Ray's workers have another one)."""
    return uri if is_remote(uri) else str(Path(parse(uri).path))


def s3_object(uri: str) -> tuple[str, str, str | None, str | None]:
    """(bucket, key, endpoint, region) of an s3:// URI, for what only boto3 can ask."""
    location = parse(uri)
    return location.bucket, location.path.removeprefix(f"{location.bucket}/"), location.endpoint, location.region


def expect(*uris: str) -> None:
    """Places that have answered, perhaps in another process: that they are silent now is a fault to wait out."""
    for uri in uris:
        location = parse(uri)
        if location.bucket:
            s3.expect(location.endpoint, location.bucket)


def patiently(uri: str, work: Callable[[fs.FileSystem, str], T]) -> T:
    """What `work` returns for the filesystem and the path of `uri`, called again while the store fails.

    pyarrow repeats single requests for some seconds; this repeats the whole for PATIENCE_S, with pauses that
    double up to 10 s, each at random length, so that a hundred workers do not come back together.

    Args:
        uri: what is read or written, for messages too.
        work: may be called several times, so it must not matter how far a call before came.

    Raises:
        StoreFailedError: if the store still fails after that time.
        UnreachableError: if it did not answer the very first question, in under 10 s.
        StorageError: for all that waiting does not mend.
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
                raise StoreFailedError(uri, found, "run the same command again when the store is well") from error
        time.sleep(random.uniform(pause / 2, pause))
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def patience_s() -> float:
    """Seconds for which a failing store is asked again, 0 or more.

    Raises:
        ConfigError: if the variable holds something else.
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
    """Whether a file, or a folder with something in it, is there."""
    return patiently(uri, lambda files, path: bool(files.get_file_info(path).type != fs.FileType.NotFound))


def read_bytes(uri: str) -> bytes:
    """The content of one file."""

    def read(files: fs.FileSystem, path: str) -> bytes:
        with files.open_input_stream(path) as stream:
            return bytes(stream.read())

    return patiently(uri, read)


def write_bytes(uri: str, data: bytes | pa.Buffer) -> None:
    """Create or replace one file; a reader sees the old content or the new, never a part."""

    def write(files: fs.FileSystem, path: str) -> None:
        if is_remote(uri):
            with files.open_output_stream(path) as stream:
                stream.write(data)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{uuid.uuid4().hex}{_PARTIAL}")  # not longer than the target's name may be
        try:
            partial.write_bytes(data)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    patiently(uri, write)


def survey(uri: str) -> Listing:
    """Every file below a folder, hidden ones included, and what of it cannot be used.

    Raises:
        StorageError: if there is no such folder.
    """

    def look(files: fs.FileSystem, path: str) -> Listing:
        if is_remote(uri):
            start = len(path.rstrip("/")) + 1
            infos = files.get_file_info(fs.FileSelector(path, recursive=True))
            return Listing(dict(sorted((info.path[start:], info.size) for info in infos if info.is_file)), {})
        if not Path(path).is_dir():
            raise StorageError(uri, "is not a folder" if Path(path).exists() else "does not exist", "check the path")
        return list_folder(path)

    return patiently(uri, look)


def list_sizes(uri: str) -> dict[str, int]:
    """Bytes of every file below a folder, by path relative to it, sorted; hidden files included.

    Raises:
        StorageError: if there is no such folder, or something in it cannot be listed.
    """
    found = survey(uri)
    for path, fault in found.faults.items():
        raise StorageError(join(uri, path), fault, "rename it, or check its permissions")
    return found.sizes


def list_files(uri: str) -> list[str]:
    """Paths of every file below a folder, relative to it, sorted."""
    return list(list_sizes(uri))


def delete(uri: str) -> None:
    """Remove a file, or a folder with all that is in it; nothing happens when it is not there."""

    def remove(files: fs.FileSystem, path: str) -> None:
        kind = files.get_file_info(path).type
        if kind == fs.FileType.Directory:
            files.delete_dir(path)
        elif kind == fs.FileType.File:
            files.delete_file(path)

    patiently(uri, remove)


def is_partial(path: str) -> bool:
    """Whether a file is what write_bytes() leaves when it is killed: nobody reads it."""
    name = path.rpartition("/")[2]
    return name.startswith(".") and name.endswith(_PARTIAL)


def download_folder(uri: str, local: Path) -> None:
    """Copy every file below `uri` into a local folder."""
    for name in list_files(uri):
        write_bytes(str(local / name), read_bytes(join(uri, name)))


def upload_folder(local: Path, uri: str) -> None:
    """Copy every file of a local folder below `uri`."""
    for name in list_files(str(local)):
        write_bytes(join(uri, name), (local / name).read_bytes())


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Any error of pyarrow or the system as a StorageError of one line."""
    try:
        yield
    except StorageError:
        raise
    except UnicodeEncodeError as error:  # pyarrow
        raise FileError(uri, "its name is not UTF-8", "rename it") from error
    except (OSError, pa.ArrowException) as error:
        raise _explain(uri, error) from error


def _explain(uri: str, error: Exception) -> StorageError:
    location = parse(uri)
    if location.bucket:
        return s3.explain(uri, location.endpoint, location.bucket, error)
    if isinstance(error, FileNotFoundError):
        is_link = Path(location.path).is_symlink()
        return FileError(uri, "is a link to nothing" if is_link else "does not exist", "check the path")
    if isinstance(error, OSError) and error.errno:
        kind = StorageError if error.errno in _NOT_THE_FILE else FileError
        return kind(uri, reason(error), "check the path and its permissions")
    return StorageError(uri, " ".join(str(error).split())[:300], "check the path")
