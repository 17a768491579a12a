"""Atomic read-modify-write of a small file that several processes share.

    update("workspace/keys.json", lambda old: add(old, entry))
    update("s3://bucket/keys.json", lambda old: add(old, entry))

A local file is locked during the update, and only its owner may read it (mode 0600). An object store has no locks: its
write is conditional on the version that was read (If-Match), and if another process was faster, the update is repeated
with the new version. AWS, MinIO and moto support conditional writes. Not here: the meaning of the bytes.
"""

from __future__ import annotations

import os
import random
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from animediffusion.platform.errors import StorageError
from animediffusion.platform.storage import storage

Change = Callable[[bytes | None], bytes]
"""Maps the old content, None if there is no file, to the new content; may be called several times."""

ATTEMPTS = 20
"""Number of attempts to write an object that other processes change, too."""
OWNER_ONLY = 0o600
"""Mode of the file and of its lock file."""


def update(uri: str, change: Change) -> None:
    """Replace the content of a file by the result of `change`.

    An exception raised by `change` propagates and leaves the file unchanged.

    Raises:
        StorageError: if the file cannot be read or written, or other processes changed it during every attempt.
    """
    storage.filesystem(uri)  # probes a store, so that an unreachable one fails within seconds
    if storage.is_remote(uri):
        _update_object(uri, change)
        return
    with storage.explained(uri):
        _update_file(Path(storage.absolute(uri)), change)


def _update_file(path: Path, change: Change) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock"), mode=OWNER_ONLY):
        _replace(path, change(path.read_bytes() if path.exists() else None))


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, OWNER_ONLY), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _update_object(uri: str, change: Change) -> None:
    import boto3  # here, because it takes time to import and most files are local
    from botocore.config import Config as ClientConfig
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, key, endpoint, region = storage.s3_object(uri)
    patient = ClientConfig(connect_timeout=3, read_timeout=15, retries={"mode": "standard", "max_attempts": 5})
    client = boto3.client("s3", endpoint_url=endpoint, region_name=region, config=patient)
    try:
        for _ in range(ATTEMPTS):
            old, condition = _read(client, bucket, key)
            if _write(client, bucket, key, change(old), condition):
                return
            time.sleep(random.uniform(0, 0.2))
    except (BotoCoreError, ClientError) as error:
        raise StorageError(uri, " ".join(str(error).split())[:300], "check the store and its policy") from error
    raise StorageError(uri, f"was changed by other processes during all {ATTEMPTS} attempts", "try again")


def _read(client: Any, bucket: str, key: str) -> tuple[bytes | None, dict[str, str]]:
    """Return the content of an object, None if it does not exist, and the condition for replacing it."""
    try:
        found = client.get_object(Bucket=bucket, Key=key)
    except client.exceptions.NoSuchKey:
        return None, {"IfNoneMatch": "*"}
    return found["Body"].read(), {"IfMatch": found["ETag"]}


def _write(client: Any, bucket: str, key: str, data: bytes, condition: dict[str, str]) -> bool:
    """Write an object; return False if another process has written it since it was read."""
    from botocore.exceptions import ClientError

    try:
        client.put_object(Bucket=bucket, Key=key, Body=data, **condition)
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] in (409, 412):
            return False
        raise
    return True
