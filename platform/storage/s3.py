"""The S3-compatible store behind a URI: its connection, the first question to it, and its errors as one line each.

pyarrow repeats a failed request itself, with growing random pauses, for some seconds; what takes longer is
storage.patiently()'s. Not here: URIs, bytes and folders, see platform/storage/files.py.
"""

from __future__ import annotations

import functools
import os
import re
import time
from typing import Any

import boto3
from botocore.config import Config as ClientConfig
from botocore.exceptions import BotoCoreError
from pyarrow import fs

from animediffusion.platform.errors import StorageError

Settings = tuple[tuple[str, str], ...]

CONNECT_S = 3
PROBE_S = 6
"""The first question to a store must be answered in this time; later ones may take longer and are retried."""
STALLED_S = 15
"""Seconds without a single byte after which a request is given up and made again."""
ATTEMPTS = 5
"""Of each request, by pyarrow: pauses of up to 1, 2, 4 and 8 s between them."""

_BUSY = r"SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|THROTTL|TOO_MANY|HTTP status (429|500|502|503|504)"
_SILENT = r"NETWORK_CONNECTION|curlCode|REQUEST_TIMEOUT"
# The first answer to the end of an upload was lost; the upload itself is there or can be made again.
_LOST = r"NO_SUCH_UPLOAD|NoSuchUpload"
_CREDENTIALS = r"INVALID_ACCESS_KEY|INVALID_CLIENT|SIGNATURE|InvalidAccessKeyId|CREDENTIALS|EXPIRED|ExpiredToken"
_DENIED = r"ACCESS_DENIED|HTTP (status )?403|INVALID_OBJECT_STATE|InvalidObjectState"

_CHECK_ADDRESS = "check AWS_ENDPOINT_URL_S3 (or AWS_ENDPOINT_URL, the AWS profile) and the network"

_answered: set[tuple[str | None, str]] = set()


class UnreachableError(StorageError):
    """The store does not answer, or answers that it is too busy: no file can be blamed for it."""


class StoreFailedError(UnreachableError):
    """A store that worked has failed for longer than we wait; the same command goes on later."""

    exit_code = 1


class FileError(StorageError):
    """This one file is gone, or may not be read; others of the same store may be fine."""


def expect(endpoint: str | None, bucket: str) -> None:
    """Ask no first question: another process had an answer, so that failures from now on are worth waiting for."""
    _answered.add((endpoint, bucket))


def settings() -> Settings:
    """The environment that decides what boto3 and pyarrow are configured with; a key for caches."""
    return tuple(sorted((name, value) for name, value in os.environ.items() if name == "HOME" or name[:4] == "AWS_"))


def configured(uri: str) -> tuple[str | None, str | None]:
    """(endpoint, region) by AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or the AWS profile; the endpoint of AWS is None.

    Raises:
        StorageError: the profile does not exist, or its file cannot be read.
    """
    try:
        return _configured(settings())
    except (BotoCoreError, ValueError) as error:
        raise StorageError(uri, " ".join(str(error).split()), "check AWS_PROFILE and the AWS_* variables") from error


@functools.lru_cache(maxsize=16)
def _configured(_: Settings) -> tuple[str | None, str | None]:
    session = boto3.Session()
    region = session.region_name or "us-east-1"
    plain = ClientConfig(ignore_configured_endpoint_urls=True)
    given, own = (session.client("s3", region_name=region, config=config).meta.endpoint_url for config in (None, plain))
    return (None if given == own else given), session.region_name


def endpoint_source(endpoint: str) -> str:
    """The setting that a configured endpoint comes from, for people."""
    named = (name for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") if os.environ.get(name) == endpoint)
    return next(named, f"AWS profile {os.environ.get('AWS_PROFILE', 'default')}")


@functools.lru_cache(maxsize=64)
def connect(endpoint: str | None, region: str | None, bucket: str, environment: Settings) -> fs.FileSystem:  # noqa: ARG001
    """A filesystem for one bucket, after one quick question; the environment is an argument so that new keys are used.

    Raises:
        OSError: as pyarrow words it; see explain().
    """
    if endpoint:
        # Off AWS the SDK would look for credentials at a link-local address, for seconds, before it gives up.
        os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
    if region is None:
        region = "us-east-1" if endpoint else fs.resolve_s3_region(bucket)
    # Delayed open: a file below 10 MB is one request, not three.
    options: dict[str, Any] = {
        "region": region,
        "endpoint_override": endpoint,
        "connect_timeout": CONNECT_S,
        "allow_delayed_open": True,
    }
    if (endpoint, bucket) not in _answered:
        once = fs.AwsStandardS3RetryStrategy(max_attempts=1)
        _probe(fs.S3FileSystem(**options, request_timeout=PROBE_S, retry_strategy=once), bucket)
        _answered.add((endpoint, bucket))
    retry = fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS)
    return fs.S3FileSystem(**options, request_timeout=STALLED_S, retry_strategy=retry)


def _probe(files: fs.FileSystem, bucket: str) -> None:
    started = time.monotonic()
    try:
        info = files.get_file_info(bucket)
    except OSError as error:
        if "ACCESS_DENIED" in str(error):
            return  # a policy may allow the objects and not the question about the bucket
        if re.search(_BUSY, str(error)):
            return  # it is there; the work itself is patient
        if not re.search(_SILENT, str(error)) or time.monotonic() - started > 1:
            raise
        time.sleep(1)  # a store that is just restarting
        info = files.get_file_info(bucket)
    if info.type == fs.FileType.NotFound:
        raise OSError("NO_SUCH_BUCKET")


def explain(uri: str, endpoint: str | None, bucket: str, error: Exception) -> StorageError:
    """An error of pyarrow, about a file of a store, in our words."""
    message = " ".join(str(error).split())
    where = endpoint or "AWS S3"
    if "NO_SUCH_BUCKET" in message:
        return StorageError(uri, f"bucket {bucket!r} does not exist", "create it, or correct its name")
    if re.search(_SILENT, message):
        reason = message.rpartition("Details: ")[2] or message
        return UnreachableError(uri, f"{where} does not answer ({reason})", _CHECK_ADDRESS)
    if re.search(f"{_BUSY}|{_LOST}", message):
        reason = message.rpartition("AWS Error ")[2] or message
        return UnreachableError(uri, f"{where} is too busy ({reason[:200]})", "try again later, or with fewer workers")
    keys = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the policy"
    if re.search(_CREDENTIALS, message):
        return StorageError(uri, "access denied", keys)
    if re.search(_DENIED, message):
        return FileError(uri, "access denied", keys)
    if isinstance(error, FileNotFoundError):
        hint = "; a % in a name is written %25" if "%" in uri else ""
        return FileError(uri, "does not exist", f"check the path{hint}")
    return StorageError(uri, message[:300], "check the path")
