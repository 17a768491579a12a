"""Record runs in MLflow: parameters, metrics by step, pictures, files.

Without MLFLOW_TRACKING_URI, everything is stored in the workspace (SQLite and a folder) and no server is needed.
Several processes may write to a run: the driver starts it, and a worker joins with `Run.attach(tracking_uri, run_id)`.
Not here: model versions, see `animediffusion.platform.registry.client`.
"""

from __future__ import annotations

import base64
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Param, RunTag
from mlflow.exceptions import MlflowException

from animediffusion.platform.config import Settings
from animediffusion.platform.errors import ConfigError, RegistryError
from animediffusion.platform.images.codec import encode_png
from animediffusion.platform.network import why_unreachable, without_password
from animediffusion.platform.tracking import embedded
from animediffusion.platform.tracking.records import groups, is_permanent, send_records
from animediffusion.platform.tracking.spool import Entry, Spool
from animediffusion.platform.tracking.system_metrics import SystemMetrics

TRAINING = "animediffusion-training"
TUNING = "animediffusion-tuning"
"""Names of the experiments for runs of `train` and of `tune`."""

Warn = Callable[[str], object]
"""Shows a warning of one line."""

_FLUSH_TIMEOUT_S = 30.0
_PATIENCE_S = 20.0
"""Seconds that the end of a run waits for an unreachable store."""
_MAX_PARAM_LENGTH = 6000
"""Characters that MLflow allows in the value of a parameter."""

_STORE = re.compile(r"https?://[^/]|(sqlite|postgresql|mysql|mssql)(\+\w+)?:|databricks|uc\b")
"""The beginning of every tracking URI that MLflow supports without MLFLOW_ALLOW_FILE_STORE."""

# Libraries read these variables, most of them when they are imported, and MLflow has no other settings for them.
_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # By default, MLflow retries 7 times with growing pauses, which hides an unreachable server for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}

log = logging.getLogger(__name__)


def setup(settings: Settings) -> MlflowClient:
    """Return a client of the tracking store and registry; without a server, create the store in the workspace.

    Raises:
        ConfigError: if MLFLOW_TRACKING_URI is not the address of a server or a database.
        RegistryError: if the MLflow server does not answer or the database cannot be opened.
    """
    client = connect(settings.tracking_uri)
    if is_embedded(settings):
        with _opening(settings.tracking_uri):
            embedded.relocate(settings.database, settings.artifact_root)
    return client


def is_embedded(settings: Settings) -> bool:
    """Whether the store is the database in the workspace; its artifacts are then in the workspace, too."""
    return embedded.database(settings.tracking_uri) == settings.database


def connect(tracking_uri: str) -> MlflowClient:
    """Return a client for a tracking URI, for workers, whose environment may name another store.

    Raises:
        ConfigError: if the URI is not the address of a server or a database.
        RegistryError: if the MLflow server does not answer or the database cannot be opened.
    """
    _be_quiet()
    if not _STORE.match(tracking_uri) and not os.environ.get("MLFLOW_ALLOW_FILE_STORE"):
        found = f"{without_password(tracking_uri)!r} is not the address of an MLflow server or a database"
        raise ConfigError("MLFLOW_TRACKING_URI", found, "write http://HOST:PORT, or unset it to use the workspace")
    with _opening(tracking_uri):
        if tracking_uri.startswith(("http://", "https://")):
            reason = why_unreachable(tracking_uri)
            if reason is not None:
                raise RegistryError(store_name(tracking_uri), reason, "check MLFLOW_TRACKING_URI, or unset it")
        with embedded.one_creator(tracking_uri):
            client = MlflowClient(tracking_uri)
            client.search_experiments(max_results=1)
    return client


@contextmanager
def _opening(tracking_uri: str) -> Iterator[None]:
    """Convert errors that occur while a store is opened to a RegistryError."""
    try:
        yield
    except RegistryError:
        raise
    except Exception as error:  # includes the errors of database drivers
        if "error code 401" in str(error):
            allowed = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            raise RegistryError(store_name(tracking_uri), "requires a user and password", allowed) from error
        found = f"cannot be opened ({first_line(error)})"
        raise RegistryError(store_name(tracking_uri), found, "check MLFLOW_TRACKING_URI and the workspace") from error


def experiment_id(client: MlflowClient, name: str, artifact_root: Path | None) -> str:
    """Return the id of an experiment and create it if needed; several processes may do so concurrently.

    Args:
        client: a client from setup().
        name: experiment name.
        artifact_root: absolute folder for the experiment's artifacts, or None to let a server decide. Without a server
            it must be set: MLflow would use the working directory of the first process, which Ray changes.
    """
    found = client.get_experiment_by_name(name)
    if found is None:
        location = (artifact_root / name).as_uri() if artifact_root is not None else None
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def artifact_root(settings: Settings) -> Path | None:
    """Return the artifact folder for new experiments of the embedded store; None if a server decides."""
    return None if settings.tracking_uri.startswith(("http://", "https://")) else settings.artifact_root


class Run:
    """One MLflow run that is being written.

    If the store stops answering, the caller neither fails nor waits: another thread sends the records, keeps them while
    the store is unreachable (in the folder `unsent`, if given), and sends them when the store answers again.

        run = Run.start(settings, TRAINING, "demo-1234abcd", {"seed": 0})
        run.log({"loss": 0.1}, step=1)
        run.finish()

    Args:
        tracking_uri: URI of the store.
        run_id: id of an existing run in the store.
        system_metrics: sample CPU, memory and GPU every 10 s from this process.
        unsent: folder for records that cannot be sent yet; records that killed processes left there are sent, too.
        warn: is called with a one-line warning if the store is unreachable; the log by default.
    """

    def __init__(
        self,
        tracking_uri: str,
        run_id: str,
        *,
        system_metrics: bool = False,
        unsent: Path | None = None,
        warn: Warn | None = None,
    ) -> None:
        self.tracking_uri = tracking_uri
        self.run_id = run_id
        self._unsent = unsent
        self._warn = warn or log.warning
        self._warned = False
        self._client: MlflowClient | None = None
        self._spool = Spool(self._send, unsent)
        self._monitor = SystemMetrics(run_id, tracking_uri, self.log) if system_metrics else None

    @classmethod
    def start(
        cls,
        settings: Settings,
        experiment: str,
        name: str,
        params: Mapping[str, object] | None = None,
        *,
        run_id: str | None = None,
        tags: dict[str, str] | None = None,
        unsent: Path | None = None,
    ) -> Run:
        """Start a run, or continue the run `run_id`; an unknown `run_id` starts a new run.

        Args:
            settings: the settings with the address of the store.
            experiment: name of the experiment, which is created if needed.
            name: run name.
            params: parameters; nested dictionaries become dotted names, and recorded values are never changed.
            run_id: run to continue.
            tags: tags to add to the run.
            unsent: folder for records that cannot be sent yet; records of an earlier process are sent first.

        Raises:
            RegistryError: if the store does not answer; a run cannot start without its store.
        """
        client = setup(settings)
        run = _existing(client, run_id)
        if run is None:
            experiment_of_run = experiment_id(client, experiment, artifact_root(settings))
            run = client.create_run(experiment_of_run, run_name=name, tags=tags)
            started = cls(settings.tracking_uri, run.info.run_id, unsent=unsent)
        else:
            started = cls(settings.tracking_uri, run.info.run_id, unsent=unsent)
            started._spool.deliver()
            client.update_run(run.info.run_id, status="RUNNING")
        new = {key: value for key, value in flatten(params or {}).items() if key not in run.data.params}
        client.log_batch(
            run.info.run_id,
            params=[Param(key, value[:_MAX_PARAM_LENGTH]) for key, value in new.items()],
            tags=[RunTag(key, value) for key, value in (tags or {}).items()],
        )
        return started

    @classmethod
    def attach(
        cls,
        tracking_uri: str,
        run_id: str,
        *,
        system_metrics: bool = False,
        unsent: Path | None = None,
        warn: Warn | None = None,
    ) -> Run:
        """Write to a run that another process started; the store may be unreachable at this time.

        `unsent` is ignored if its parent folder does not exist: on another machine, no later process would send it.
        """
        if unsent is not None and not unsent.parent.is_dir():
            unsent = None
        return cls(tracking_uri, run_id, system_metrics=system_metrics, unsent=unsent, warn=warn)

    def log(self, metrics: dict[str, float], step: int = 0) -> None:
        """Record metrics; they are sent in batches, at the latest by flush() or finish()."""
        now = _now()
        self._spool.put(*({"metric": [key, float(value), now, step]} for key, value in metrics.items()))

    def log_image(self, image: np.ndarray[Any, Any], name: str, step: int | None = None) -> None:
        """Store a uint8 picture [H, W, 3] or [H, W] as NAME.png, or as a frame of the series NAME if `step` is set."""
        self._spool.put({"image": base64.b64encode(encode_png(image)).decode(), "name": name, "step": step})

    def log_artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Store a file or the content of a folder, which must not be moved or deleted before it is sent."""
        self._spool.put({"artifact": str(Path(path).absolute()), "folder": folder})

    def set_tags(self, tags: dict[str, str]) -> None:
        """Set tags of the run."""
        self._spool.put({"tags": tags})

    def flush(self, timeout_s: float = _FLUSH_TIMEOUT_S) -> bool:
        """Send the waiting records; return False if the store did not accept all of them."""
        return self._spool.flush(timeout_s)

    def finish(self, status: str = "FINISHED", patience_s: float = _PATIENCE_S) -> int:
        """Send the waiting records and end the run.

        Args:
            status: FINISHED, FAILED or KILLED.
            patience_s: seconds to wait for an unreachable store.

        Returns:
            Number of unsent records. The next run with the same folder `unsent` sends them; without a folder, they are
            lost.
        """
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None
        self._spool.put({"status": status, "time": _now()})
        left = self._spool.close(patience_s)
        if left:
            where = f"wait in {self._unsent}; the same command sends them" if self._unsent is not None else "are lost"
            self._warn(f"{store_name(self.tracking_uri)} still does not answer: {left} records {where}")
        return left

    def _send(self, entries: list[Entry]) -> int:
        """Send entries for the spool (see spool.Send); records that MLflow rejects are dropped with a warning."""
        sent = 0
        for group in groups(entries):
            try:
                self._client = self._client or _client(self.tracking_uri)
                send_records(self._client, self.run_id, group)
            except Exception as error:  # of any kind: tracking errors must never stop training
                if not is_permanent(error):
                    return self._unreachable(sent, error)
                self._warn(f"{store_name(self.tracking_uri)}: a record is dropped ({first_line(error)})")
            sent += len(group)
            self._warned = False
        return sent

    def _unreachable(self, sent: int, error: Exception) -> int:
        if not self._warned:
            self._warned = True
            self._warn(f"{store_name(self.tracking_uri)} does not answer ({first_line(error)}); records are sent later")
        return sent


def send_left(settings: Settings, run_id: str, unsent: Path) -> None:
    """Send the records that the processes of an ended run left in `unsent`, if there are any."""
    if any(unsent.glob("*.jsonl")):
        Run.attach(settings.tracking_uri, run_id, unsent=unsent).flush()


def flatten(params: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Flatten nested parameters to names of the form `group.key` with text values."""
    flat: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def store_name(tracking_uri: str) -> str:
    """Return the name of a store for messages, without its password."""
    return f"MLflow at {without_password(tracking_uri)}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].strip()


def _existing(client: MlflowClient, run_id: str | None) -> Any:
    if run_id is None:
        return None
    try:
        return client.get_run(run_id)
    except MlflowException:
        return None


def _client(tracking_uri: str) -> MlflowClient:
    """Return a client without a test whether the store answers."""
    _be_quiet()
    with embedded.one_creator(tracking_uri):
        return MlflowClient(tracking_uri)


def _now() -> int:
    return int(time.time() * 1000)


def _be_quiet() -> None:
    """Turn off MLflow's telemetry, migration logs and printed URLs; variables that the user set are kept."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    mlflow.telemetry.set_telemetry_client()
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.tracking", "mlflow.store.model_registry"):
        logging.getLogger(name).setLevel(logging.WARNING)
