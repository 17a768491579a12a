"""The registry behind `mlflow server` as a team runs it: PostgreSQL, artifacts on S3, passwords; and two at once."""

import sqlite3
import subprocess
import sys

import pytest
from bundles import evaluation, new_model, write_bundle
from servers import MlflowServer, postgres
from werkzeug.security import generate_password_hash

from animediffusion.pipelines.release import release
from animediffusion.pipelines.release.checks import check_bundle
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import RegistryError
from animediffusion.platform.registry.alias_lock import alias_lock
from animediffusion.platform.registry.client import Registry

PROMOTE = """
import sys
from animediffusion.pipelines.release import release
from animediffusion.platform.config import Settings
settings = Settings.from_environment(workspace=sys.argv[1], model_name=sys.argv[2])
for version in sys.argv[3:]:
    release.promote(settings, version, why=f"promoted {version}")
"""


@pytest.fixture(scope="module")
def team(moto_server, tmp_path_factory):
    """URL of a server with all of it; a user is needed."""
    folder = tmp_path_factory.mktemp("mlflow-team")
    (folder / "auth.ini").write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{folder}/auth.db\nadmin_username = admin\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    passwords = {
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": "correct horse battery",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "not a secret",
    }
    with postgres() as database:
        options = [
            f"--backend-store-uri={database}",
            "--artifacts-destination=s3://bucket/mlflow",
            "--app-name=basic-auth",
        ]
        with MlflowServer(folder, options, passwords) as running:
            # The server checks the password in every request; a minute of the tests would go into the default hash.
            with sqlite3.connect(folder / "auth.db") as users:
                quick = generate_password_hash(passwords["MLFLOW_AUTH_ADMIN_PASSWORD"], "pbkdf2:sha256:1")
                users.execute("UPDATE users SET password_hash = ?", (quick,))
            yield running.url


def promote_at_once(settings, *lists_of_versions):
    """Every list is promoted in its own process, one version after the other."""
    command = [sys.executable, "-c", PROMOTE, str(settings.workspace), settings.model_name]
    started = [
        subprocess.Popen([*command, *map(str, versions)], stdout=-1, stderr=-1, text=True)
        for versions in lists_of_versions
    ]
    outputs = [process.communicate(timeout=240) for process in started]
    assert [process.returncode for process in started] == [0] * len(started), outputs


def check_ledger(settings, num_events):
    """No entry is missing, each begins where the one before ended, and the alias is where the last one says."""
    events = release.history(settings)
    assert len(events) == num_events
    assert [event["from"] for event in events] == [None, *(event["to"] for event in events[:-1])]
    assert Registry(settings).alias("champion") == events[-1]["to"]


@pytest.mark.slow
def test_two_concurrent_promotions_lose_no_entry(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    settings = new_model(tmp_path)
    for seed in (1, 2, 3, 4):
        release.register(settings, write_bundle(tmp_path / "bundle", seed, evaluation()))
    promote_at_once(settings, (1, 2), (3, 4))
    check_ledger(settings, 4)
    assert release.rollback(settings).version == release.history(settings)[-1]["to"]


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    registry = Registry(new_model(tmp_path))
    registry.client.create_registered_model(f"{registry.name}-turn")
    with alias_lock(registry, stale_s=0.5):
        pass
    assert registry.client.search_registered_models() == []


@pytest.mark.slow
def test_a_team_has_postgresql_s3_and_passwords(team, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", team)
    settings = Settings.from_environment(workspace=tmp_path, model_name="team")
    with pytest.raises(RegistryError, match="requires a user and password; set MLFLOW_TRACKING_USERNAME"):
        release.versions(settings)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct horse battery")
    first = release.register(settings, write_bundle(tmp_path / "first", 1, evaluation(20.0)))
    release.register(settings, write_bundle(tmp_path / "second", 2, evaluation(20.0), parent=first.sha256))
    promote_at_once(settings, (1,), (2,))
    check_ledger(settings, 2)
    fetched = Registry(settings).fetch(f"models:/{settings.model_name}@champion")
    champion = Registry(settings).get("champion")
    assert check_bundle(fetched).sha256 == champion.sha256
    shown = release.show(settings, 2, tmp_path / "samples.png")
    assert [one["version"] for one in shown["lineage"]] == [2, 1]
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert release.rollback(settings).changed
