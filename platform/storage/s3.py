"""Connect to the S3-compatible store of a URI, probe it, and turn its errors into one line each.

pyarrow itself retries a failed request for some seconds, with growing random pauses; storage.patiently() retries for
longer. Not here: URIs, files and folders, see platform/storage/storage.py.
"""

from __future__ import annotations

import functools
import os
import re
import time
from typing import Any

from pyarrow import fs

from animediffusion.platform.errors import FileError, StorageError, UnreachableError

Settings = tuple[tuple[str, str], ...]

CONNECT_S = 3
PROBE_S = 6
"""Timeout in seconds of the first request to a store; later requests may take longer, and are retried."""
STALLED_S = 15
"""Seconds without a single byte after which a request is aborted and retried."""
ATTEMPTS = 5
"""Number of times that pyarrow tries each request, with pauses of up to 1, 2, 4 and 8 s in between."""
PAGE_KEYS = 1000
"""Keys of a page of a listing; stores allow no more."""

_BUSY = r"SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|THROTTL|TOO_MANY|HTTP status (429|500|502|503|504)"
_SILENT = r"NETWORK_CONNECTION|curlCode|REQUEST_TIMEOUT"
# The response to the end of an upload was lost; the upload is complete or can be repeated.
_LOST = r"NO_SUCH_UPLOAD|NoSuchUpload"
_CREDENTIALS = r"INVALID_ACCESS_KEY|INVALID_CLIENT|SIGNATURE|InvalidAccessKeyId|CREDENTIALS|EXPIRED|ExpiredToken"
_DENIED = r"ACCESS_DENIED|HTTP (status )?403|INVALID_OBJECT_STATE|InvalidObjectState"

_CHECK_ADDRESS = "check AWS_ENDPOINT_URL_S3 (or AWS_ENDPOINT_URL, the AWS profile) and the network"

_answered: set[tuple[str | None, str]] = set()
"""(endpoint, bucket) of the stores that have answered this process or, see expect(), another one."""


def expect(endpoint: str | None, bucket: str) -> None:
    """Skip the probe of a store that has answered another process, so that its failures are retried."""
    _answered.add((endpoint, bucket))


def settings() -> Settings:
    """Return the environment variables that configure boto3 and pyarrow, as a key for caches."""
    return tuple(sorted((name, value) for name, value in os.environ.items() if name == "HOME" or name[:4] == "AWS_"))


def configured(uri: str) -> tuple[str | None, str | None]:
    """Return (endpoint, region) of AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or the AWS profile; AWS's endpoint is None.

    Raises:
        StorageError: if the profile does not exist or its file cannot be read.
    """
    from botocore.exceptions import BotoCoreError  # here, because it takes time to import and most files are local

    try:
        return _configured(settings())
    except (BotoCoreError, ValueError) as error:
        variables = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
        name = next((name for name in variables if "Invalid endpoint" in str(error) and os.environ.get(name)), None)
        if name is not None:
            raise StorageError(name, repr(os.environ[name]), "an address, for example http://127.0.0.1:9000") from error
        raise StorageError(uri, " ".join(str(error).split()), "check AWS_PROFILE and the AWS_* variables") from error


@functools.lru_cache(maxsize=16)
def _configured(_: Settings) -> tuple[str | None, str | None]:
    import boto3  # here, because it takes time to import and most files are local
    from botocore.config import Config as ClientConfig

    session = boto3.Session()
    region = session.region_name or "us-east-1"
    plain = ClientConfig(ignore_configured_endpoint_urls=True)
    given, own = (session.client("s3", region_name=region, config=config).meta.endpoint_url for config in (None, plain))
    return (None if given == own else given), session.region_name


def endpoint_source(endpoint: str) -> str:
    """Return the name of the setting that a configured endpoint comes from, for messages."""
    named = (name for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") if os.environ.get(name) == endpoint)
    return next(named, f"AWS profile {os.environ.get('AWS_PROFILE', 'default')}")


@functools.lru_cache(maxsize=64)
def connect(endpoint: str | None, region: str | None, bucket: str, environment: Settings) -> fs.FileSystem:  # noqa: ARG001
    """Return a filesystem for one bucket after a quick probe of the store.

    The environment is an argument so that changed credentials are not hidden by the cache.

    Raises:
        OSError: an error of pyarrow, which explain() translates.
    """
    if endpoint:
        # Outside AWS, the SDK would look for credentials at a link-local address for seconds. It has no other setting.
        os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
    if region is None:
        region = "us-east-1" if endpoint else fs.resolve_s3_region(bucket)
    # With delayed open, a file below 10 MB takes one request instead of three.
    bucket_filesystem = functools.partial(
        fs.S3FileSystem,
        region=region,
        endpoint_override=endpoint,
        connect_timeout=CONNECT_S,
        allow_delayed_open=True,
    )
    if (endpoint, bucket) not in _answered:
        once = fs.AwsStandardS3RetryStrategy(max_attempts=1)
        _probe(bucket_filesystem(request_timeout=PROBE_S, retry_strategy=once), bucket)
        _answered.add((endpoint, bucket))
    retry = fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS)
    return bucket_filesystem(request_timeout=STALLED_S, retry_strategy=retry)


def list_page(
    bucket: str, prefix: str, token: str | None, endpoint: str | None, region: str | None
) -> tuple[list[str], str | None]:
    """Return up to PAGE_KEYS keys directly below a prefix, in order, and the token of the next page.

    The token is None after the last page. pyarrow returns a folder only as a whole.

    Args:
        bucket: name of the bucket.
        prefix: empty, or a key with a slash at its end.
        token: token of the page, None for the first one.
        endpoint: address of the store; None is AWS.
        region: region of the bucket; None is the configured one.

    Raises:
        OSError: an error of boto3, which explain() translates.
    """
    from botocore.exceptions import BotoCoreError, ClientError  # here, because it takes time to import

    given = {"ContinuationToken": token} if token else {}
    try:
        page = _client(endpoint, region, settings()).list_objects_v2(
            Bucket=bucket, Prefix=prefix, Delimiter="/", MaxKeys=PAGE_KEYS, **given
        )
    except ClientError as error:
        code, status = error.response["Error"]["Code"], error.response["ResponseMetadata"]["HTTPStatusCode"]
        raise OSError(f"{error} ({code}, HTTP status {status})") from error
    except BotoCoreError as error:  # no answer
        raise OSError(f"NETWORK_CONNECTION Details: {error}") from error
    return [found["Key"] for found in page.get("Contents", [])], page.get("NextContinuationToken")


@functools.lru_cache(maxsize=16)
def _client(endpoint: str | None, region: str | None, _: Settings) -> Any:
    import boto3
    from botocore.config import Config as ClientConfig

    patient = ClientConfig(
        connect_timeout=CONNECT_S, read_timeout=STALLED_S, retries={"mode": "standard", "max_attempts": ATTEMPTS}
    )
    return boto3.client("s3", endpoint_url=endpoint, region_name=region, config=patient)


def _probe(files: fs.FileSystem, bucket: str) -> None:
    started = time.monotonic()
    try:
        info = files.get_file_info(bucket)
    except OSError as error:
        if "ACCESS_DENIED" in str(error):
            return  # a policy may allow access to the objects but not to the bucket itself
        if re.search(_BUSY, str(error)):
            return  # the store answers, and later requests are retried
        if not re.search(_SILENT, str(error)) or time.monotonic() - started > 1:
            raise
        time.sleep(1)  # the store may be restarting
        info = files.get_file_info(bucket)
    if info.type == fs.FileType.NotFound:
        raise OSError("NO_SUCH_BUCKET")


def explain(uri: str, endpoint: str | None, bucket: str, error: Exception) -> StorageError:
    """Turn an error of pyarrow about a file in a store into a one-line StorageError."""
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
