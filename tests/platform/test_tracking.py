import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from mlflow.exceptions import MlflowException

from animediffusion.platform import tracking
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import RegistryError
from animediffusion.platform.tracking import TRAINING, Run

START = """
import sys
from animediffusion.platform.config import Settings
from animediffusion.platform.tracking import TRAINING, Run
run = Run.start(Settings.from_environment(workspace=sys.argv[1]), TRAINING, "r")
run.finish()
print(run.run_id)
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture
def settings(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Settings.from_environment(workspace=workspace)


def test_two_processes_may_create_the_database_at_once(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    command = [sys.executable, "-c", START, str(tmp_path / "workspace")]
    started = [
        subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=-1, stderr=-1, text=True) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    assert [error for _, error in outputs] == ["", ""]
    runs = {output.strip() for output, _ in outputs}
    client = tracking.connect(f"sqlite:///{tmp_path}/workspace/mlflow.db")
    experiment = client.get_experiment_by_name(TRAINING)
    assert {run.info.run_id for run in client.search_runs([experiment.experiment_id])} == runs
    assert sorted(path.name for path in tmp_path.iterdir()) == ["workspace"]


def test_a_run_keeps_parameters_metrics_pictures_and_files(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("hello")
    run = Run.start(settings, TRAINING, "r", {"seed": 1, "network": {"base": 32}}, tags={"phase": "1"})
    for step in range(500):
        run.log({"loss": 1 / (step + 1), "broken": float("nan")}, step)
    run.log_image(np.zeros((8, 8, 3), np.uint8), "grid")
    run.log_image(np.zeros((8, 8), np.uint8), "series", step=3)
    run.log_artifact(tmp_path / "note.txt")
    run.finish()
    client = tracking.setup(settings)
    stored = client.get_run(run.run_id)
    assert stored.data.params == {"seed": "1", "network.base": "32"}
    assert stored.data.tags["phase"] == "1"
    assert stored.info.status == "FINISHED"
    assert [metric.step for metric in client.get_metric_history(run.run_id, "loss")] == list(range(500))
    assert {item.path for item in client.list_artifacts(run.run_id)} == {"grid.png", "images", "note.txt"}
    assert stored.info.artifact_uri.startswith(settings.artifact_root.as_uri())


def test_another_process_writes_to_the_same_run(settings: Settings) -> None:
    run = Run.start(settings, TRAINING, "r")
    worker = Run.attach(run.tracking_uri, run.run_id)
    worker.log({"loss": 1.0}, 1)
    worker.flush()
    assert tracking.setup(settings).get_run(run.run_id).data.metrics == {"loss": 1.0}


def test_a_run_that_goes_on_keeps_its_first_parameters(settings: Settings) -> None:
    first = Run.start(settings, TRAINING, "r", {"seed": 1})
    first.finish("KILLED")
    second = Run.start(settings, TRAINING, "r", {"seed": 2, "new": 3}, run_id=first.run_id)
    stored = tracking.setup(settings).get_run(first.run_id)
    assert second.run_id == first.run_id
    assert (stored.data.params, stored.info.status) == ({"seed": "1", "new": "3"}, "RUNNING")


def test_an_unknown_run_starts_a_new_one(settings: Settings) -> None:
    assert Run.start(settings, TRAINING, "r", run_id="0" * 32).run_id != "0" * 32


def test_system_metrics_are_sampled(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    run = Run.start(settings, TRAINING, "r", system_metrics=True)
    time.sleep(1.5)
    run.finish()
    assert "system/cpu_utilization_percentage" in tracking.setup(settings).get_run(run.run_id).data.metrics


def test_a_store_that_goes_away_stops_nobody_and_gets_the_metrics_later(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run.start(settings, TRAINING, "r")

    def away(*arguments: object, **values: object) -> None:
        raise MlflowException("connection lost")

    with monkeypatch.context() as broken:
        broken.setattr(run._client, "log_batch", away)
        for step in range(3):
            run.log({"loss": 1.0}, step)
            run.flush()
    assert [record.message for record in caplog.records if "connection lost" in record.message] == [
        f"MLflow at {settings.tracking_uri}: metrics not stored (connection lost)"
    ]
    run.finish()
    assert len(tracking.setup(settings).get_metric_history(run.run_id, "loss")) == 3


def test_a_database_that_is_none_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlflow.db").write_text("not a database " * 100)
    with pytest.raises(RegistryError, match="cannot be opened") as caught:
        tracking.setup(Settings.from_environment(workspace=tmp_path))
    assert "\n" not in str(caught.value)


def test_an_experiment_that_was_deleted_is_used_again(settings: Settings) -> None:
    client = tracking.setup(settings)
    first = tracking.experiment_id(client, "again", settings.artifact_root)
    client.delete_experiment(first)
    assert tracking.experiment_id(client, "again", settings.artifact_root) == first
