"""infra/compose.yaml, as podman-compose reads it; and that databases of an older MLflow are migrated."""

import os

import pytest
from alembic import command
from alembic.script import ScriptDirectory
from manifests import amount
from mlflow.exceptions import MlflowException
from mlflow.store.db import utils
from mlflow.store.tracking.dbmodels.initial_models import Base
from servers import postgres
from stack import composed, migrate, mlflow_environment, podman_compose

ONCE = {"buckets", "migrate"}
OURS = {"buckets", "migrate", "mlflow", "ray", "serve"}


@pytest.fixture(scope="module")
def services() -> dict:
    return composed()


def test_it_is_read_and_refused_without_its_secrets(services: dict) -> None:
    assert set(services) == OURS | {"minio", "postgres"}
    bare = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
    done = podman_compose(bare)
    assert done.returncode != 0
    assert "set it in infra/.env" in done.stderr


def test_every_port_is_published_on_loopback(services: dict) -> None:
    ports = [port for one in services.values() for port in one.get("ports", [])]
    assert len(ports) == 5
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_servers_come_back_after_a_reboot_and_tasks_do_not(services: dict) -> None:
    restarts = {name: one["restart"] for name, one in services.items()}
    assert {name for name, value in restarts.items() if value == "on-failure"} == ONCE
    assert {value for name, value in restarts.items() if name not in ONCE} == {"unless-stopped"}


def test_what_runs_our_image_has_no_capabilities(services: dict) -> None:
    for name in OURS:
        assert services[name]["cap_drop"] == ["ALL"]
        assert services[name]["security_opt"] == ["no-new-privileges:true"]


def test_ray_keeps_its_objects_in_memory_and_has_time_to_drain(services: dict) -> None:
    ray = services["ray"]
    [store] = [int(one.partition("=")[2]) for one in ray["command"] if one.startswith("--object-store-memory=")]
    assert store < amount(ray["shm_size"].replace("gb", "Gi"))
    assert int(ray["stop_grace_period"].removesuffix("s")) >= 30 + 15


def test_a_health_check_starts_no_ray(services: dict) -> None:
    """`ray health-check` takes seconds of a core, and this is every few seconds."""
    assert services["ray"]["healthcheck"]["test"][:2] == ["CMD", "python"]
    assert "import ray" not in services["ray"]["healthcheck"]["test"][-1]


def test_a_command_in_the_ray_container_uses_its_cluster(services: dict) -> None:
    assert services["ray"]["environment"]["RAY_ADDRESS"] == "127.0.0.1:6379"
    assert "--port=6379" in services["ray"]["command"]


def test_compose_and_kubernetes_migrate_the_same(services: dict) -> None:
    assert services["migrate"]["command"] == ['exec mlflow db upgrade "$MLFLOW_BACKEND_STORE_URI"']
    assert services["mlflow"]["depends_on"]["migrate"]["condition"] == "service_completed_successfully"
    uri = services["migrate"]["environment"]["MLFLOW_BACKEND_STORE_URI"]
    assert uri == services["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"]
    assert uri.partition("://")[0] == mlflow_environment("x://y", {})["MLFLOW_BACKEND_STORE_URI"].partition("://")[0]


@pytest.mark.slow
def test_a_database_of_an_older_mlflow_is_migrated() -> None:
    with postgres() as database:
        variables = mlflow_environment(database, {})
        engine = utils.create_sqlalchemy_engine_with_retry(database)
        Base.metadata.create_all(engine)
        config = utils._get_alembic_config(database)
        [_, _, older, *_] = ScriptDirectory.from_config(config).walk_revisions()
        command.upgrade(config, older.revision)
        with pytest.raises(MlflowException, match="out-of-date database schema"):
            utils._verify_schema(engine)
        migrate(variables)
        utils._verify_schema(engine)
        engine.dispose()
