import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from servers import MlflowServer

from animediffusion.platform.config import Settings
from animediffusion.platform.errors import ConfigError, RegistryError
from animediffusion.platform.tracking import tracking
from animediffusion.platform.tracking.tracking import TRAINING, Run

START = """
import sys
from animediffusion.platform.config import Settings
from animediffusion.platform.tracking.tracking import TRAINING, Run
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


@pytest.mark.slow
def test_two_processes_may_create_the_database_concurrently(tmp_path: Path) -> None:
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
    assert worker.flush()
    assert tracking.setup(settings).get_run(run.run_id).data.metrics == {"loss": 1.0}


def test_a_resumed_run_keeps_its_first_parameters(settings: Settings) -> None:
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
    started = Run.start(settings, TRAINING, "r")
    run = Run.attach(started.tracking_uri, started.run_id, system_metrics=True)
    time.sleep(1.5)
    run.finish()
    assert "system/cpu_utilization_percentage" in tracking.setup(settings).get_run(run.run_id).data.metrics


@pytest.mark.slow
def test_a_server_that_is_killed_stops_nobody_and_gets_everything_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    unsent = tmp_path / "unsent"
    with MlflowServer(tmp_path) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
        monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")
        driver = Run.start(Settings.from_environment(workspace=tmp_path), TRAINING, "r")
        worker = Run.attach(
            server.url, driver.run_id, system_metrics=True, unsent=unsent, warn=lambda line: warnings.append(line)
        )
        worker.log({"loss": 1.0}, 0)
        assert worker.flush()
        server.stop()
        began = time.monotonic()
        for step in range(1, 300):
            worker.log({"loss": 1.0 / step, "learning_rate": 0.1}, step)
        worker.log_image(np.zeros((8, 8, 3), np.uint8), "samples", step=299)
        assert time.monotonic() - began < 30  # one request that is waited for would be repeated for minutes
        assert not worker.flush()
        time.sleep(3)
        server.start()
        worker.log({"loss": 0.0}, 300)
        assert worker.finish(patience_s=60) == 0
        client = tracking.connect(server.url)
        stored = client.get_run(driver.run_id)
        assert [metric.step for metric in client.get_metric_history(driver.run_id, "loss")] == list(range(301))
        assert len(client.list_artifacts(driver.run_id, "images")) == 2  # the picture, and MLflow's small one
        system = client.get_metric_history(driver.run_id, "system/cpu_utilization_percentage")
        assert [metric.step for metric in system] == list(range(len(system)))
        assert len(system) >= 3
        assert stored.info.status == "FINISHED"
    assert len(warnings) == 1, warnings
    assert "does not answer" in warnings[0]
    assert list(unsent.iterdir()) == []


def test_what_a_server_that_stays_away_did_not_get_is_sent_by_the_next_run(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    run = Run.start(settings, TRAINING, "r")
    gone = Run.attach("http://127.0.0.1:9", run.run_id, unsent=tmp_path, warn=warnings.append)
    gone.log({"loss": 1.0}, 1)
    assert gone.finish("KILLED", patience_s=0.1) == 2
    assert "2 records wait in" in warnings[-1]
    again = Run.start(settings, TRAINING, "r", run_id=run.run_id, unsent=tmp_path)
    stored = tracking.setup(settings).get_run(run.run_id)
    assert (again.run_id, stored.data.metrics, stored.info.status) == (run.run_id, {"loss": 1.0}, "RUNNING")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_kept_where_the_runs_folder_is_not(settings: Settings, tmp_path: Path) -> None:
    warnings: list[str] = []
    elsewhere = tmp_path / "of-another-machine"
    gone = Run.attach("http://127.0.0.1:9", "1", unsent=elsewhere / "unsent", warn=warnings.append)
    gone.log({"loss": 1.0}, 1)
    assert gone.finish(patience_s=0.1) == 2
    assert "2 records are lost" in warnings[-1]
    assert not elsewhere.exists()


def test_a_record_that_no_store_would_take_does_not_hold_up_the_others(settings: Settings) -> None:
    warnings: list[str] = []
    run = Run.attach(settings.tracking_uri, Run.start(settings, TRAINING, "r").run_id, warn=warnings.append)
    run.set_tags({"": "no name"})
    run.log({"loss": 1.0}, 1)
    assert run.finish() == 0
    assert tracking.setup(settings).get_run(run.run_id).data.metrics == {"loss": 1.0}
    assert "a record is dropped" in warnings[0]


def test_an_artifact_that_was_deleted_before_it_was_sent_is_named(settings: Settings, tmp_path: Path) -> None:
    warnings: list[str] = []
    run = Run.attach(settings.tracking_uri, Run.start(settings, TRAINING, "r").run_id, warn=warnings.append)
    run.log_artifact(tmp_path / "gone.txt")
    run.log({"loss": 1.0}, 1)
    assert run.finish() == 0
    assert tracking.setup(settings).get_run(run.run_id).data.metrics == {"loss": 1.0}
    (warning,) = warnings
    assert "gone.txt: was deleted before it was sent to MLflow" in warning


@pytest.mark.parametrize("address", ["foo", "./mlruns", "file:///tmp/mlruns", "http:/host", "ftp://host"])
def test_an_address_that_mlflow_does_not_support_is_one_clear_line(
    address: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(ConfigError, match=f"MLFLOW_TRACKING_URI: '{address}' is not the address of .*; write http://"):
        tracking.setup(settings)


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
