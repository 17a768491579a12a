"""Record runs in MLflow: parameters, metrics by step, pictures, files.

Without MLFLOW_TRACKING_URI everything is in the workspace (SQLite and a folder), no server. Several processes may
write at once: the driver starts a run, a worker continues it with `Run.attach(tracking_uri, run_id)`.
Not here: model versions, see `animediffusion.platform.registry.client`.
"""

from __future__ import annotations

import base64
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Param, RunTag
from mlflow.exceptions import MlflowException

from animediffusion.platform.config import Settings
from animediffusion.platform.errors import RegistryError
from animediffusion.platform.images.codec import encode_png
from animediffusion.platform.network import why_unreachable, without_password
from animediffusion.platform.tracking import embedded
from animediffusion.platform.tracking.embedded import one_creator
from animediffusion.platform.tracking.records import groups, is_hopeless, send_records
from animediffusion.platform.tracking.spool import Entry, Outbox
from animediffusion.platform.tracking.system_metrics import SystemMetrics

TRAINING = "animediffusion-training"
TUNING = "animediffusion-tuning"

Warn = Callable[[str], object]

_FLUSH_TIMEOUT_S = 30.0
_PATIENCE_S = 20.0
"""How long the end of a run waits for a store that is away."""
_MAX_PARAM_LENGTH = 6000

_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # The default, 7 retries with growing pauses, hides a dead server for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}

log = logging.getLogger(__name__)


def setup(settings: Settings) -> MlflowClient:
    """A client of the tracking store and registry, which is created in the workspace where no server is named.

    Raises:
        RegistryError: if the MLflow server does not answer, or the database cannot be opened.
    """
    client = connect(settings.tracking_uri)
    if is_embedded(settings):
        with _opening(settings.tracking_uri):
            embedded.relocate(settings.database, settings.artifact_root)
    return client


def is_embedded(settings: Settings) -> bool:
    """Whether the store is the database of the workspace, whose artifacts are in the workspace, too."""
    return embedded.database(settings.tracking_uri) == settings.database


def connect(tracking_uri: str) -> MlflowClient:
    """The same for a URI, as a worker gets it: nothing is read from this process's environment."""
    _be_quiet()
    with _opening(tracking_uri):
        if tracking_uri.startswith(("http://", "https://")):
            reason = why_unreachable(tracking_uri)
            if reason is not None:
                raise RegistryError(place(tracking_uri), reason, "check MLFLOW_TRACKING_URI, or unset it")
        with one_creator(tracking_uri):
            client = MlflowClient(tracking_uri)
            client.search_experiments(max_results=1)
    return client


@contextmanager
def _opening(tracking_uri: str) -> Iterator[None]:
    """Any error of opening a store as one of ours."""
    try:
        yield
    except RegistryError:
        raise
    except Exception as error:  # a database driver's own errors come through, too
        if "error code 401" in str(error):
            found, allowed = "asks who you are", "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            raise RegistryError(place(tracking_uri), found, allowed) from error
        found = f"cannot be opened ({first_line(error)})"
        raise RegistryError(place(tracking_uri), found, "check MLFLOW_TRACKING_URI, workspace") from error


def experiment_id(client: MlflowClient, name: str, artifact_root: Path | None) -> str:
    """The experiment of this name, created if there is none; safe when several processes ask at once.

    Args:
        client: from `setup`.
        name: experiment name.
        artifact_root: absolute folder for its artifacts, or None where a server decides. Left out without a server,
            artifacts would land in the working directory of whoever came first, and Ray changes that.
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
    """Where new experiments of the embedded store keep artifacts; None where a server decides."""
    return None if settings.tracking_uri.startswith(("http://", "https://")) else settings.artifact_root


class Run:
    """One MLflow run that is being written.

    A store that stops answering does not stop the caller, nor make it wait: what is recorded is sent by another
    thread, waits while the store is away (in `unsent`, if that is given), and is sent when it is back.

        run = Run.start(settings, TRAINING, "demo-1234abcd", {"seed": 0})
        run.log({"loss": 0.1}, step=1)
        run.finish()

    Args:
        tracking_uri: the store.
        run_id: a run that exists there.
        system_metrics: sample CPU, memory and GPU every 10 s from this process.
        unsent: folder in which records wait while the store is away, those of processes that were killed, too.
        warn: takes the one line that says so; the log by default.
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
        self._outbox = Outbox(self._send, unsent)
        self._monitor = SystemMetrics(run_id, tracking_uri, self.log) if system_metrics else None

    @classmethod
    def start(
        cls,
        settings: Settings,
        experiment: str,
        name: str,
        params: dict[str, Any] | None = None,
        *,
        run_id: str | None = None,
        tags: dict[str, str] | None = None,
        unsent: Path | None = None,
    ) -> Run:
        """Start a run, or continue `run_id` (an unknown one starts a new run).

        Args:
            settings: where to record.
            experiment: created if there is none.
            name: run name.
            params: nested dictionaries become dotted names; a value once recorded stays.
            run_id: run to continue.
            tags: added to the run.
            unsent: folder in which records wait while the store is away; what an earlier process left is sent first.

        Raises:
            RegistryError: the store does not answer: a run begins with it, or not at all.
        """
        client = setup(settings)
        run = _existing(client, run_id)
        if run is None:
            experiment_of_run = experiment_id(client, experiment, artifact_root(settings))
            run = client.create_run(experiment_of_run, run_name=name, tags=tags)
            started = cls(settings.tracking_uri, run.info.run_id, unsent=unsent)
        else:
            started = cls(settings.tracking_uri, run.info.run_id, unsent=unsent)
            started._outbox.deliver()
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
        """Write to a run that another process started; the store may be away for now.

        Without `unsent` where the folder that it belongs into is not there: on another machine, nobody would look.
        """
        if unsent is not None and not unsent.parent.is_dir():
            unsent = None
        return cls(tracking_uri, run_id, system_metrics=system_metrics, unsent=unsent, warn=warn)

    def log(self, metrics: dict[str, float], step: int = 0) -> None:
        """Record numbers; sent in batches, at the latest with `flush` or `finish`."""
        now = _now()
        self._outbox.put(*({"metric": [key, float(value), now, step]} for key, value in metrics.items()))

    def log_image(self, image: np.ndarray[Any, Any], name: str, step: int | None = None) -> None:
        """Store a uint8 picture [H, W, 3] or [H, W]: NAME.png, or one frame of the series NAME when `step` is given."""
        self._outbox.put({"image": base64.b64encode(encode_png(image)).decode(), "name": name, "step": step})

    def log_artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Store a file, or everything in a folder; it must stay where it is."""
        self._outbox.put({"artifact": str(Path(path).absolute()), "folder": folder})

    def set_tags(self, tags: dict[str, str]) -> None:
        """Set tags of the run."""
        self._outbox.put({"tags": tags})

    def flush(self, timeout_s: float = _FLUSH_TIMEOUT_S) -> bool:
        """Send what waits; False where the store did not take it."""
        return self._outbox.flush(timeout_s)

    def finish(self, status: str = "FINISHED", patience_s: float = _PATIENCE_S) -> int:
        """Send what waits and end the run.

        Args:
            status: FINISHED, FAILED or KILLED.
            patience_s: how long to wait for a store that is away.

        Returns:
            How many records are left to be sent by the next run with this folder.
        """
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None
        self._outbox.put({"status": status, "time": _now()})
        return self.leave(patience_s)

    def leave(self, patience_s: float = _PATIENCE_S) -> int:
        """Send what waits, of a run that goes on elsewhere; arguments and result as of finish()."""
        left = self._outbox.close(patience_s)
        if left:
            where = f"wait in {self._unsent}; the same command sends them" if self._unsent is not None else "are lost"
            self._warn(f"{place(self.tracking_uri)} is still away: {left} records {where}")
        return left

    def _send(self, entries: list[Entry]) -> int:
        """An outbox's Send."""
        sent = 0
        for group in groups(entries):
            try:
                self._client = self._client or _client(self.tracking_uri)
                send_records(self._client, self.run_id, group)
            except Exception as error:  # connections break in many ways, and no training run ends for its diary
                if not is_hopeless(error):
                    return self._away(sent, error)
                self._warn(f"{place(self.tracking_uri)}: a record is refused ({first_line(error)})")
            sent += len(group)
            self._warned = False
        return sent

    def _away(self, sent: int, error: Exception) -> int:
        if not self._warned:
            self._warned = True
            self._warn(f"{place(self.tracking_uri)} does not answer ({first_line(error)}); records are sent later")
        return sent


def send_left(settings: Settings, run_id: str, unsent: Path) -> None:
    """Send what an ended run's processes left behind in `unsent`, if anything."""
    if any(unsent.glob("*.jsonl")):
        Run.attach(settings.tracking_uri, run_id, unsent=unsent).flush()


def flatten(params: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested parameters as `group.key`: text."""
    flat: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def place(tracking_uri: str) -> str:
    """How messages name a store."""
    return f"MLflow at {without_password(tracking_uri)}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for a one-line message of ours."""
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
    """A client without a question whether the store is there."""
    _be_quiet()
    with one_creator(tracking_uri):
        return MlflowClient(tracking_uri)


def _now() -> int:
    return int(time.time() * 1000)


def _be_quiet() -> None:
    """No telemetry, no migration diary, no addresses printed in between; what the user set stays."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    mlflow.telemetry.set_telemetry_client()
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.tracking", "mlflow.store.model_registry"):
        logging.getLogger(name).setLevel(logging.WARNING)
