"""Bytes and folders behind a local path or an s3:// URI.

    write_bytes(join("s3://bucket/faces", "manifest.json"), data)
    for name in list_files("data/faces"): ...

One endpoint setting, AWS_ENDPOINT_URL_S3 (boto3 and MLflow read it too), or `?endpoint_override=` in a URI. Credentials
come from the environment or the machine, never from a URI. All errors are a StorageError that names the URI.
Not here: what the bytes mean.
"""

from __future__ import annotations

import functools
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

import pyarrow as pa
from pyarrow import fs

from animediffusion.platform.errors import StorageError

PROBE_CONNECT_S = 3
PROBE_REQUEST_S = 6
"""The first question to a store must be answered in this time; later ones may take longer and are retried."""
_REQUEST_S = 60
_ATTEMPTS = 5

_QUERY_KEYS = ("endpoint_override", "region", "scheme")
_SECRET_KEYS = ("access_key", "secret_key", "session_token", "password")


class UnreachableError(StorageError):
    """The store does not answer: no file can be blamed for it."""


class _Location(NamedTuple):
    """A parsed URI; `bucket` is empty for a local path."""

    bucket: str
    path: str
    endpoint: str | None = None
    region: str | None = None


def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """The pyarrow filesystem that holds `uri`, and the path inside it.

    Raises:
        StorageError: for an unknown scheme, credentials in the URI, no bucket, or a store that does not answer.
    """
    location = _parse(uri)
    if not location.bucket:
        return fs.LocalFileSystem(), location.path
    key_id = os.environ.get("AWS_ACCESS_KEY_ID", "")
    with explained(uri):
        return _s3(location.endpoint, location.region, location.bucket, key_id), location.path


def join(uri: str, *parts: str) -> str:
    """`uri` with path parts added, before its query where it has one; parts are taken literally."""
    if not is_remote(uri):
        return str(Path(_parse(uri).path).joinpath(*parts))
    base, mark, query = uri.partition("?")
    names = [quote(part.strip("/"), safe="/ +=&,;:@!$'()~") for part in parts]
    return "/".join([base.rstrip("/"), *names]) + mark + query


def is_remote(uri: str) -> bool:
    """Whether `uri` names an object store, not a local path."""
    return uri.startswith("s3://")


def absolute(uri: str) -> str:
    """The same place, meant the same from any working directory (Ray's workers have another one)."""
    return uri if is_remote(uri) else str(Path(_parse(uri).path))


def exists(uri: str) -> bool:
    """Whether a file, or a folder with something in it, is there."""
    files, path = filesystem(uri)
    with explained(uri):
        return bool(files.get_file_info(path).type != fs.FileType.NotFound)


def read_bytes(uri: str) -> bytes:
    """The content of one file."""
    files, path = filesystem(uri)
    with explained(uri), files.open_input_stream(path) as stream:
        return bytes(stream.read())


def write_bytes(uri: str, data: bytes) -> None:
    """Create or replace one file; a reader sees the old content or the new, never a part."""
    files, path = filesystem(uri)
    with explained(uri):
        if is_remote(uri):
            with files.open_output_stream(path) as stream:
                stream.write(data)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
        try:
            partial.write_bytes(data)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)


def list_sizes(uri: str) -> dict[str, int]:
    """Bytes of every file below a folder, by path relative to it, sorted; hidden files included.

    Raises:
        StorageError: if there is no such folder.
    """
    files, path = filesystem(uri)
    with explained(uri):
        if not is_remote(uri) and not Path(path).is_dir():
            raise StorageError(uri, "is not a folder" if Path(path).exists() else "does not exist", "check the path")
        infos = files.get_file_info(fs.FileSelector(path, recursive=True))
    start = len(path.rstrip("/")) + 1
    return {info.path[start:]: info.size for info in sorted(infos, key=lambda info: info.path) if info.is_file}


def list_files(uri: str) -> list[str]:
    """Paths of every file below a folder, relative to it, sorted."""
    return list(list_sizes(uri))


def delete(uri: str) -> None:
    """Remove a file, or a folder with all that is in it; nothing happens when it is not there."""
    files, path = filesystem(uri)
    with explained(uri):
        kind = files.get_file_info(path).type
        if kind == fs.FileType.Directory:
            files.delete_dir(path)
        elif kind == fs.FileType.File:
            files.delete_file(path)


def download_folder(uri: str, local: Path) -> None:
    """Copy every file below `uri` into a local folder."""
    for name in list_files(uri):
        write_bytes(str(local / name), read_bytes(join(uri, name)))


def upload_folder(local: Path, uri: str) -> None:
    """Copy every file of a local folder below `uri`."""
    for name in list_files(str(local)):
        write_bytes(join(uri, name), (local / name).read_bytes())


def _parse(uri: str) -> _Location:
    scheme = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]+)://", uri)
    if not uri:
        raise StorageError("storage", "the path is empty", "give a local path or s3://bucket/path")
    if scheme is None or scheme[1] == "file":
        local = unquote(urlsplit(uri, allow_fragments=False).path) if scheme else uri
        return _Location("", str(Path(local).expanduser().absolute()))
    if scheme[1] != "s3":
        raise StorageError(_without_secrets(uri), f"scheme {scheme[1]!r} is not known", "a local path or s3://")
    parts = urlsplit(uri, allow_fragments=False)
    query = parse_qs(parts.query)
    if "@" in parts.netloc or any(key in query for key in _SECRET_KEYS):
        raise StorageError(
            _without_secrets(uri), "credentials in the URI", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead"
        )
    unknown = sorted(set(query) - set(_QUERY_KEYS))
    if unknown:
        raise StorageError(uri, f"option {unknown[0]!r} is not known", f"one of {', '.join(_QUERY_KEYS)}")
    if not parts.netloc:
        raise StorageError(uri, "no bucket", "write s3://bucket/path")
    endpoint = query.get("endpoint_override", [None])[0] or _endpoint_setting()
    if endpoint and "://" not in endpoint:
        endpoint = f"{query.get('scheme', ['https'])[0]}://{endpoint}"
    path = parts.netloc + "/" + unquote(parts.path).strip("/")
    return _Location(parts.netloc, path.rstrip("/"), endpoint, query.get("region", [None])[0])


def _endpoint_setting() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def _without_secrets(uri: str) -> str:
    parts = urlsplit(uri, allow_fragments=False)
    host = parts.netloc.rpartition("@")[2]
    query = {key: values[0] for key, values in parse_qs(parts.query).items() if key not in _SECRET_KEYS}
    return parts._replace(netloc=host, query=urlencode(query)).geturl()


@functools.lru_cache(maxsize=64)
def _s3(endpoint: str | None, region: str | None, bucket: str, key_id: str) -> fs.FileSystem:  # noqa: ARG001
    """A filesystem for one bucket, after one quick question; the key is an argument so that a new one is noticed."""
    if endpoint:
        # Off AWS the SDK would look for credentials at a link-local address, for seconds, before it gives up.
        os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
    region = region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None:
        region = "us-east-1" if endpoint else fs.resolve_s3_region(bucket)
    options: dict[str, Any] = {"region": region, "endpoint_override": endpoint, "connect_timeout": PROBE_CONNECT_S}
    _probe(
        fs.S3FileSystem(
            **options, request_timeout=PROBE_REQUEST_S, retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1)
        ),
        bucket,
    )
    retry = fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS)
    return fs.S3FileSystem(**options, request_timeout=_REQUEST_S, retry_strategy=retry)


def _probe(files: fs.FileSystem, bucket: str) -> None:
    started = time.monotonic()
    try:
        info = files.get_file_info(bucket)
    except OSError as error:
        if "ACCESS_DENIED" in str(error):
            return  # a policy may allow the objects and not the question about the bucket
        if "NETWORK_CONNECTION" not in str(error) or time.monotonic() - started > 1:
            raise
        time.sleep(1)  # a store that is just restarting
        info = files.get_file_info(bucket)
    if info.type == fs.FileType.NotFound:
        raise OSError("NO_SUCH_BUCKET")


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Any error of pyarrow or the system as a StorageError of one line."""
    try:
        yield
    except StorageError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise _explain(uri, error) from error


def _explain(uri: str, error: Exception) -> StorageError:
    message = " ".join(str(error).split())
    location = _parse(uri)
    if "NO_SUCH_BUCKET" in message:
        return StorageError(uri, f"bucket {location.bucket!r} does not exist", "create it, or correct its name")
    if "NETWORK_CONNECTION" in message or "curlCode" in message or "REQUEST_TIMEOUT" in message:
        reason = message.rpartition("Details: ")[2] or message
        where = location.endpoint or "AWS S3"
        return UnreachableError(uri, f"{where} does not answer ({reason})", "check AWS_ENDPOINT_URL_S3 and the network")
    if re.search(r"ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE|InvalidAccessKeyId|CREDENTIALS|HTTP 403", message):
        return StorageError(uri, "access denied", "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the policy")
    if isinstance(error, FileNotFoundError):
        return StorageError(uri, "does not exist", "check the path")
    if isinstance(error, OSError) and error.strerror and not location.bucket:
        return StorageError(uri, error.strerror.lower(), "check the path and its permissions")
    return StorageError(uri, message[:300], "check the path")
