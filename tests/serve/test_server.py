import socket
from pathlib import Path

import pytest
from ports import free_port

from animediffusion.platform.api_keys import Keys
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import BundleError, ConfigError, RegistryError, StorageError
from animediffusion.serve.deployments import ServeConfig, build_app
from animediffusion.serve.server import app_config, check_address, check_model, for_host, running


def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}: already in use; choose another with --port"):
            check_address("127.0.0.1", port)


def test_an_address_of_another_machine_is_not_called_in_use() -> None:
    with pytest.raises(ConfigError, match=r"^--host: '192\.0\.2\.1' \(.*\); an address of this machine"):
        check_address("192.0.2.1", free_port(), is_open=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_only_loopback_is_served(host: str):
    with pytest.raises(ConfigError, match="--host"):
        check_address(host, free_port())


def test_a_server_with_keys_may_listen_anywhere():
    check_address("0.0.0.0", free_port(), is_open=False)


def test_an_application_without_keys_is_not_built_unless_that_is_meant(tmp_path):
    closed = ServeConfig(workspace=tmp_path, engine_gpus=0)
    meant = ServeConfig(workspace=tmp_path, engine_gpus=0, allow_anonymous=True)
    with pytest.raises(ConfigError, match=r"API keys: none in .*keys\.json; make one .* or set allow_anonymous"):
        build_app(closed)
    assert build_app(meant)
    keys = Keys(str(tmp_path / "keys.json"))
    keys.create("studio")
    assert build_app(closed)
    keys.revoke("studio")
    for config in (closed, meant):  # a key was made once: that its owner wants it open to all is not to be guessed
        with pytest.raises(ConfigError, match="API keys"):
            build_app(config)


def test_a_store_of_corrections_that_cannot_be_written_is_named_before_the_server_starts(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    wrong = f"{tmp_path}/file/store"
    with pytest.raises(StorageError, match=wrong):
        build_app(ServeConfig(workspace=tmp_path, engine_gpus=0, allow_anonymous=True, corrections=wrong))
    monkeypatch.setenv("ANIMEDIFFUSION_CORRECTIONS", str(tmp_path / "store"))
    settings = Settings.from_environment(workspace=tmp_path)
    config = app_config(settings)
    assert config.corrections == str(tmp_path / "store")
    assert build_app(config.model_copy(update={"allow_anonymous": True, "engine_gpus": 0}))
    assert (tmp_path / "store" / "counts.json").exists()


def test_the_keys_of_a_cluster_may_be_in_a_store(moto_server, tmp_path):
    uri = f"s3://bucket/{tmp_path.name}/keys.json"
    config = ServeConfig(workspace=tmp_path, keys=uri, engine_gpus=0)
    with pytest.raises(ConfigError, match=uri):
        build_app(config)
    Keys(uri).create("studio")
    assert build_app(config)


def test_engines_on_other_nodes_use_the_workspaces_of_those(tmp_path, monkeypatch):
    settings = Settings(workspace=tmp_path)
    assert app_config(settings).workspace == tmp_path
    monkeypatch.setenv("RAY_ADDRESS", "ray:6379")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    config = app_config(settings)
    assert (config.workspace, config.request_log) == (None, None)
    assert config.keys == str(tmp_path / "keys.json")


def test_the_log_of_requests_is_in_the_workspace_where_that_can_be_written(tmp_path):
    assert app_config(Settings(workspace=tmp_path)).request_log == tmp_path / "logs" / "requests.jsonl"
    assert app_config(Settings(workspace=Path("/proc/workspace"))).request_log is None


def test_a_folder_is_given_to_replicas_by_its_full_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for model, meant in (
        ("run:1/b", str(tmp_path / "run:1/b")),
        ("s3://b/k", "s3://b/k"),
        ("models:/a/1", "models:/a/1"),
        ("starter", "starter"),
        ("./starter", str(tmp_path / "starter")),
    ):
        assert app_config(Settings(workspace=tmp_path), model).model == meant


def test_a_body_limit_that_is_not_a_number_is_rejected_before_anything_starts(tmp_path, monkeypatch):
    for value in ("32MiB", "0", "-1"):
        monkeypatch.setenv("ANIMEDIFFUSION_MAX_BODY_BYTES", value)
        with (
            pytest.raises(ConfigError, match=f"ANIMEDIFFUSION_MAX_BODY_BYTES: '{value}'; a number of bytes"),
            running(Settings(workspace=tmp_path), ServeConfig(workspace=tmp_path)),
        ):
            pass


def test_an_ingress_on_a_node_without_the_keys_lets_nobody_in(tmp_path):
    config = ServeConfig(workspace=tmp_path)
    assert for_host(config, "127.0.0.1").allow_anonymous
    Keys(str(tmp_path / "keys.json")).create("studio")
    assert not for_host(config, "127.0.0.1").allow_anonymous


def test_a_free_port_is_fine():
    check_address("127.0.0.1", free_port())


def test_a_missing_or_damaged_model_is_found_before_anything_starts(tmp_path, bundle_folder):
    settings = Settings(workspace=tmp_path / "workspace")
    with pytest.raises(RegistryError, match="no version"):
        check_model(settings, "models:/animediffusion@champion")
    with pytest.raises(BundleError, match="no such folder"):
        check_model(settings, str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match="is not a bundle"):
        check_model(settings, str(tmp_path / "empty"))
    check_model(settings, str(bundle_folder))
