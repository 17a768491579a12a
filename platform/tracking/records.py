"""Records of a run as entries that can be stored in a file, and how each kind is sent to MLflow.

{"metric": [key, value, milliseconds, step]}    {"tags": {...}}    {"artifact": path, "folder": name or None}
{"image": PNG as base64, "name": ..., "step": number or None}      {"status": "FINISHED", "time": milliseconds}
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Metric, RunTag
from mlflow.exceptions import MlflowException
from PIL import Image

from animediffusion.platform.errors import FileError
from animediffusion.platform.tracking.spool import Entry

BATCH = 1000
"""Maximum number of metrics in one request to MLflow."""
_PERMANENT = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST", "INVALID_STATE", "PERMISSION_DENIED")
"""MLflow's error codes for a record that it will never accept."""


def groups(entries: list[Entry]) -> Iterator[list[Entry]]:
    """Group consecutive metrics into batches and yield every other entry alone, in the original order."""
    batch: list[Entry] = []
    for entry in entries:
        if batch and (len(batch) == BATCH or "metric" not in entry):
            yield batch
            batch = []
        if "metric" in entry:
            batch.append(entry)
        else:
            yield [entry]
    if batch:
        yield batch


def send_records(client: MlflowClient, run_id: str, group: list[Entry]) -> None:
    """Send one group of groups(); errors of MLflow propagate.

    Raises:
        FileError: if the file of an artifact was deleted before it was sent.
    """
    first = group[0]
    if "metric" in first:
        client.log_batch(run_id, metrics=[Metric(*entry["metric"]) for entry in group])
    elif "tags" in first:
        client.log_batch(run_id, tags=[RunTag(key, value) for key, value in first["tags"].items()])
    elif "artifact" in first:
        path = Path(first["artifact"])
        if not path.exists():
            raise FileError(str(path), "was deleted before it was sent to MLflow", "the run has no copy of it")
        send = client.log_artifacts if path.is_dir() else client.log_artifact
        send(run_id, str(path), first["folder"])
    elif "image" in first:
        image = np.asarray(Image.open(io.BytesIO(base64.b64decode(first["image"]))))
        if first["step"] is None:
            client.log_image(run_id, image, artifact_file=f"{first['name']}.png")
        else:
            client.log_image(run_id, image, key=first["name"], step=first["step"])
    else:
        client.set_terminated(run_id, first["status"], first["time"])


def is_permanent(error: Exception) -> bool:
    """Whether the record itself is the cause, so that a retry would fail again."""
    return isinstance(error, FileError) or (isinstance(error, MlflowException) and error.error_code in _PERMANENT)
