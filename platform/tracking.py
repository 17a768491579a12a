"""Record runs in MLflow: parameters, metrics by step, pictures, files.

Without MLFLOW_TRACKING_URI everything is in the workspace (SQLite and a folder), no server. Several processes may
write at once: the driver starts a run, a worker continues it with `Run.attach(tracking_uri, run_id)`.
Not here: model versions, see `animediffusion.platform.registry`.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from animediffusion.platform.config import Settings
from animediffusion.platform.errors import RegistryError
from animediffusion.platform.network import why_unreachable, without_password

TRAINING = "animediffusion-training"
TUNING = "animediffusion-tuning"

_FLUSH_METRICS = 200
_FLUSH_SECONDS = 2.0
_KEEP_METRICS = 100_000
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
    return connect(settings.tracking_uri)


def connect(tracking_uri: str) -> MlflowClient:
    """The same for a URI, as a worker gets it: nothing is read from this process's environment."""
    _be_quiet()
    try:
        if tracking_uri.startswith(("http://", "https://")):
            reason = why_unreachable(tracking_uri)
            if reason is not None:
                raise RegistryError(place(tracking_uri), reason, "check MLFLOW_TRACKING_URI, or unset it")
        with _one_creator(tracking_uri):
            client = MlflowClient(tracking_uri)
            client.search_experiments(max_results=1)
    except RegistryError:
        raise
    except Exception as error:  # a database driver's own errors come through, too
        found = f"cannot be opened ({first_line(error)})"
        raise RegistryError(place(tracking_uri), found, "check MLFLOW_TRACKING_URI, workspace") from error
    return client


@contextmanager
def _one_creator(tracking_uri: str) -> Iterator[None]:
    """Hold a lock while a SQLite database may be created: MLflow's own start fails when two processes do it at once."""
    if not tracking_uri.startswith("sqlite:///"):
        yield
        return
    database = Path(tracking_uri.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    with open(database.with_name(database.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


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

    A store that stops answering does not stop the caller: metrics wait in memory and are sent with the next batch.

        run = Run.start(settings, TRAINING, "demo-1234abcd", {"seed": 0}, system_metrics=True)
        run.log({"loss": 0.1}, step=1)
        run.finish()
    """

    def __init__(self, client: MlflowClient, tracking_uri: str, run_id: str, *, system_metrics: bool = False) -> None:
        self.tracking_uri = tracking_uri
        self.run_id = run_id
        self._client = client
        self._waiting: list[Metric] = []
        self._sent_at = time.monotonic()
        self._warned = False
        self._monitor = _start_monitor(run_id, tracking_uri) if system_metrics else None

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
        system_metrics: bool = False,
    ) -> Run:
        """Start a run, or continue `run_id` (an unknown one starts a new run).

        Args:
            settings: where to record.
            experiment: created if there is none.
            name: run name.
            params: nested dictionaries become dotted names; a value once recorded stays.
            run_id: run to continue.
            tags: added to the run.
            system_metrics: sample CPU, memory and GPU every 10 s from this process.
        """
        client = setup(settings)
        run = _existing(client, run_id)
        if run is None:
            experiment_of_run = experiment_id(client, experiment, artifact_root(settings))
            run = client.create_run(experiment_of_run, run_name=name, tags=tags)
        else:
            client.update_run(run.info.run_id, status="RUNNING")
        new = {key: value for key, value in flatten(params or {}).items() if key not in run.data.params}
        client.log_batch(
            run.info.run_id,
            params=[Param(key, value[:_MAX_PARAM_LENGTH]) for key, value in new.items()],
            tags=[RunTag(key, value) for key, value in (tags or {}).items()],
        )
        return cls(client, settings.tracking_uri, run.info.run_id, system_metrics=system_metrics)

    @classmethod
    def attach(cls, tracking_uri: str, run_id: str, *, system_metrics: bool = False) -> Run:
        """Write to a run that another process started."""
        return cls(connect(tracking_uri), tracking_uri, run_id, system_metrics=system_metrics)

    def log(self, metrics: dict[str, float], step: int = 0) -> None:
        """Record numbers; sent in batches, at the latest with `flush` or `finish`."""
        now = int(time.time() * 1000)
        self._waiting += [Metric(key, float(value), now, step) for key, value in metrics.items()]
        if len(self._waiting) >= _FLUSH_METRICS or time.monotonic() - self._sent_at > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Send what waits."""
        self._sent_at = time.monotonic()
        while self._waiting:
            batch = self._waiting[:1000]
            if not self._try("metrics", lambda batch=batch: self._client.log_batch(self.run_id, metrics=batch)):
                del self._waiting[:-_KEEP_METRICS]
                return
            del self._waiting[: len(batch)]

    def log_image(self, image: np.ndarray[Any, Any], name: str, step: int | None = None) -> None:
        """Store a uint8 picture [H, W, 3] or [H, W]: NAME.png, or one frame of the series NAME when `step` is given."""
        if step is None:
            self._try(name, lambda: self._client.log_image(self.run_id, image, artifact_file=f"{name}.png"))
        else:
            self._try(name, lambda: self._client.log_image(self.run_id, image, key=name, step=step))

    def log_artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Store a file, or everything in a folder."""
        path = Path(path)
        send = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        self._try(path.name, lambda: send(self.run_id, str(path), folder))

    def set_tags(self, tags: dict[str, str]) -> None:
        """Set tags of the run."""
        self._try("tags", lambda: self._client.log_batch(self.run_id, tags=[RunTag(k, v) for k, v in tags.items()]))

    def finish(self, status: str = "FINISHED") -> None:
        """Send what waits and end the run.

        Args:
            status: FINISHED, FAILED or KILLED.
        """
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None
        self.flush()
        self._try("status", lambda: self._client.set_terminated(self.run_id, status))

    def _try(self, what: str, action: Any) -> bool:
        """Do it, or warn once: no training run ends because its diary is away."""
        try:
            action()
        except (MlflowException, OSError) as error:
            if not self._warned:
                log.warning("%s: %s not stored (%s)", place(self.tracking_uri), what, first_line(error))
            self._warned = True
            return False
        self._warned = False
        return True


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


def _start_monitor(run_id: str, tracking_uri: str) -> Any:
    logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
    monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=tracking_uri)
    monitor.start()
    return monitor


def _be_quiet() -> None:
    """No telemetry, no migration diary, no addresses printed in between; what the user set stays."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    mlflow.telemetry.set_telemetry_client()
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.tracking", "mlflow.store.model_registry"):
        logging.getLogger(name).setLevel(logging.WARNING)
