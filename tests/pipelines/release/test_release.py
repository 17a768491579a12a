import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from bundles import NETWORK, evaluation, new_model, write_bundle
from servers import MlflowServer
from uploads import upload_folder

from animediffusion.cli import app as cli
from animediffusion.models.bundle import BundleConfig, SamplerDefaults, save_bundle, with_sampler
from animediffusion.pipelines.release import release
from animediffusion.pipelines.release.checks import check_bundle
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import BundleError, ConfigError, RegistryError, StorageError
from animediffusion.platform.images.codec import decode_rgb
from animediffusion.platform.registry import audit_log
from animediffusion.platform.registry.client import Registry
from animediffusion.platform.tracking.tracking import TRAINING, Run


@pytest.fixture
def bundle(tmp_path):
    """A function that writes an untrained bundle, another one for each seed, and returns its folder."""

    def write(seed=0, metrics=None, parent=None):
        return write_bundle(tmp_path / f"bundle-{seed}", seed, metrics, parent=parent)

    return write


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A real `mlflow server` on loopback with SQLite and proxied artifacts."""
    with MlflowServer(tmp_path_factory.mktemp("mlflow-server")) as running:
        yield running.url


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture
def settings(embedded, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return new_model(embedded)


@pytest.mark.slow
def test_a_release_goes_from_folder_to_champion_and_back_on_an_mlflow_server(server, bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    settings = Settings.from_environment(workspace=tmp_path)
    first = release.register(settings, bundle(1, evaluation(20.0)))
    second = release.register(settings, bundle(2, evaluation(21.0)), parent=1)
    assert (first.version, second.version, second.parent) == (1, 2, 1)
    release.promote(settings, 1, why="first")
    release.promote(settings, 2, why="better")
    fetched = Registry(settings).fetch("models:/animediffusion@champion")
    assert check_bundle(fetched).sha256 == second.sha256
    assert release.rollback(settings, why="regret").to_json() == {
        "version": 1, "alias": "champion", "from": 2, "changed": True
    }  # fmt: skip
    events = [(e["action"], e["from"], e["to"], e["reason"]) for e in release.history(settings)]
    assert events == [("promote", None, 1, "first"), ("promote", 1, 2, "better"), ("rollback", 2, 1, "regret")]
    assert not (tmp_path / "mlflow.db").exists()


def test_an_unreachable_server_is_named_in_seconds(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(RegistryError, match=r"MLflow at http://127.0.0.1:9: does not answer .*MLFLOW_TRACKING_URI"):
        release.versions(Settings.from_environment(workspace=tmp_path))
    assert time.monotonic() - started < 60  # MLflow alone would ask again for minutes


def test_nothing_registered_is_an_empty_list(settings):
    assert release.versions(settings) == []
    assert release.history(settings) == []


def test_a_version_knows_its_bundle_run_and_numbers(settings, bundle):
    run = Run.start(settings, TRAINING, "r", {"seed": 1})
    version = release.register(settings, bundle(1, evaluation(20.5)), run_id=run.run_id)
    listed = release.versions(settings)
    keys = {"version", "aliases", "parent", "run", "sha256", "created", "metrics", "share"}
    assert [set(v) for v in listed] == [keys]
    assert (version.run, len(version.sha256), version.metrics["tracks"]["same"]["psnr"]) == (run.run_id, 64, 20.5)
    shown = release.show(settings, 1)
    assert shown["tags"]["sampler"] == "euler, 4 steps, guidance 1"
    assert shown["evaluations"][0]["same.psnr"] == 20.5
    assert Registry(settings).client.get_run(run.run_id).data.metrics["same.psnr"] == 20.5
    json.dumps(shown)


def test_the_parent_is_found_by_its_hash(settings, bundle):
    first = release.register(settings, bundle(1))
    assert release.register(settings, bundle(2, parent=first.sha256)).parent == 1
    assert release.register(settings, bundle(3, parent="f" * 64)).parent is None
    assert release.show(settings, 1)["tags"]["recipe"] == "demo"


def test_the_run_is_found_next_to_the_bundle(settings, bundle):
    run = Run.start(settings, TRAINING, "r")
    folder = bundle(1)
    (folder.parent / "run.json").write_text(json.dumps({"mlflow_run_id": run.run_id}))
    assert release.register(settings, folder).run == run.run_id


def test_the_same_bundle_twice_is_one_version(settings, bundle):
    assert [release.register(settings, bundle(1)).version for _ in range(2)] == [1, 1]


def test_a_changed_byte_raises_bundle_error(settings, bundle):
    folder = bundle(1)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(BundleError, match=r"model.safetensors was changed"):
        release.register(settings, folder)
    assert release.versions(settings) == []


def test_weights_that_are_not_finite_raise_bundle_error(settings, tmp_path):
    config = BundleConfig(network=NETWORK, image_size=16)
    denoiser = config.build()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.fill_(float("nan"))
    save_bundle(tmp_path / "nan", denoiser, config)
    with pytest.raises(BundleError, match="smoke sample is not a finite"):
        release.register(settings, tmp_path / "nan")


def test_a_missing_folder_is_named(settings, tmp_path):
    with pytest.raises(BundleError, match="no such folder"):
        release.register(settings, tmp_path / "nothing")


def test_an_unknown_alias_or_version_lists_what_exists(settings, bundle):
    registry = Registry(settings)
    with pytest.raises(
        RegistryError, match=r"no version of .* is registered; run `animediffusion models register DIR`"
    ):
        registry.get("champion")
    release.register(settings, bundle(1, evaluation()))
    release.promote(settings, 1)
    with pytest.raises(RegistryError, match=r"no such alias; versions: 1; aliases: champion \(version 1\)"):
        registry.fetch(f"models:/{settings.model_name}@challenger")
    with pytest.raises(RegistryError, match=r"^version 7: no such version; versions: 1"):
        registry.get(7)
    with pytest.raises(RegistryError, match="has no model 'other'"):
        registry.fetch("models:/other@champion")
    with pytest.raises(RegistryError, match="is not a model reference"):
        registry.fetch("models:/")


def test_a_version_is_downloaded_once(settings, bundle):
    release.register(settings, bundle(1, evaluation()))
    registry = Registry(settings)
    folder = registry.fetch(f"models:/{settings.model_name}/1")
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert registry.fetch(f"models:/{settings.model_name}/1") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["card.md", "checksums.json", "config.json", "metrics.json", "model.safetensors"]
    )  # the bundle alone, whatever else the version holds


def test_a_folder_is_fetched_as_it_is(settings, bundle):
    folder = bundle(1)
    assert Registry(settings).fetch(folder) == folder
    assert Registry(settings).fetch(folder.as_uri()) == folder


def test_a_bundle_changed_in_the_store_is_not_promoted(settings, bundle):
    release.register(settings, bundle(1, evaluation()))
    location = Registry(settings).client.get_model_version_download_uri(settings.model_name, "1")
    stored = Path(location.removeprefix("file://")) / "model.safetensors"
    stored.write_bytes(stored.read_bytes()[:-1] + b"\xff")
    with pytest.raises(BundleError, match=r"version 1: .*model.safetensors was changed"):
        release.promote(settings, 1, force=True)
    assert release.versions(settings)[0]["aliases"] == []


def test_an_unevaluated_version_raises_registry_error_with_the_command_to_run(settings, bundle):
    release.register(settings, bundle(1))
    command = f"animediffusion evaluate models:/{settings.model_name}/1 DATA"
    with pytest.raises(RegistryError, match=f"was not evaluated; run `{command}`"):
        release.promote(settings, 1)
    release.record_evaluation(settings, f"models:/{settings.model_name}/1", evaluation())
    assert release.promote(settings, 1).changed
    assert release.versions(settings)[0]["metrics"] == evaluation()
    assert release.history(settings)[0]["metrics"]["same.psnr"] == 20.0


@pytest.mark.parametrize(
    ("psnr", "ciede2000", "refusal"),
    [
        (19.8, 8.0, None),
        (19.79, 8.0, "same-reference PSNR 19.79 against the champion's 20.00"),
        (20.0, 8.5, None),
        (20.0, 8.51, "cross-reference CIEDE2000 8.51 against the champion's 8.00"),
        (float("nan"), 8.0, "PSNR nan"),
    ],
)
def test_the_gate_compares_with_the_champion(settings, bundle, psnr, ciede2000, refusal):
    release.register(settings, bundle(1, evaluation(20.0, 8.0)))
    release.register(settings, bundle(2, evaluation(psnr, ciede2000)))
    release.promote(settings, 1)
    if refusal is None:
        assert release.promote(settings, 2).changed
        return
    with pytest.raises(RegistryError, match=refusal):
        release.promote(settings, 2)
    assert Registry(settings).alias("champion") == 1
    release.promote(settings, 2, force=True, why="I know")
    last = release.history(settings)[-1]
    assert (last["forced"], last["reason"], last["to"]) == (True, "I know", 2)


def test_other_data_raises_registry_error_until_evaluated_on_the_champions(settings, bundle):
    release.register(settings, bundle(1, evaluation(20.0)))
    release.register(settings, bundle(2, evaluation(30.0, data_hash="b" * 64)))
    release.promote(settings, 1)
    with pytest.raises(RegistryError, match=f"evaluate models:/{settings.model_name}/2 data/real`"):
        release.promote(settings, 2)
    release.record_evaluation(settings, f"models:/{settings.model_name}/2", evaluation(20.1))
    release.promote(settings, 2)


def test_a_version_must_hold_on_all_data_that_both_were_evaluated_on(settings, bundle):
    release.register(settings, bundle(1, evaluation(20.0)))
    release.register(settings, bundle(2, evaluation(21.0)))
    release.promote(settings, 1)
    for version, psnr in ((1, 18.0), (2, 17.5)):
        reference = f"models:/{settings.model_name}/{version}"
        release.record_evaluation(settings, reference, {**evaluation(psnr, data_hash="b" * 64), "data": "data/night"})
    with pytest.raises(RegistryError, match=r"PSNR 17.50 against the champion's 18.00 on data/night"):
        release.promote(settings, 2)
    release.record_evaluation(settings, f"models:/{settings.model_name}/1", evaluation(30.0, data_hash="c" * 64))
    release.record_evaluation(settings, f"models:/{settings.model_name}/2", evaluation(17.9, data_hash="b" * 64))
    assert release.promote(settings, 2).changed


def test_promoting_the_champion_again_changes_nothing(settings, bundle):
    release.register(settings, bundle(1, evaluation()))
    release.promote(settings, 1)
    assert not release.promote(settings, 1).changed
    assert len(release.history(settings)) == 1


def test_rollback_goes_back_through_all_champions(settings, bundle):
    for seed in (1, 2, 3, 4):
        release.register(settings, bundle(seed, evaluation()))
    for version in (1, 2, 3):
        release.promote(settings, version)
    assert [release.rollback(settings).version for _ in range(2)] == [2, 1]
    with pytest.raises(RegistryError, match="alias champion: there is no version before 1"):
        release.rollback(settings)
    release.promote(settings, 4)
    assert release.rollback(settings).version == 1


def test_rollback_after_a_move_by_hand_returns_to_the_last_promotion(settings, bundle):
    for seed in (1, 2):
        release.register(settings, bundle(seed, evaluation()))
    release.promote(settings, 1)
    Registry(settings).set_alias("champion", 2)
    assert release.rollback(settings).version == 1


def test_rollback_names_the_version_that_was_deleted(settings, bundle):
    release.register(settings, bundle(1, evaluation()))
    release.promote(settings, 1)
    Registry(settings).client.delete_model_version(settings.model_name, "1")
    with pytest.raises(RegistryError, match="its previous version 1 was deleted, and no other version was promoted"):
        release.rollback(settings)


def test_a_deleted_audit_log_is_not_an_empty_one(settings, bundle):
    release.register(settings, bundle(1, evaluation()))
    release.promote(settings, 1)
    client = Registry(settings).client
    experiment = client.get_experiment_by_name(audit_log.EXPERIMENT).experiment_id
    client.delete_experiment(experiment)
    with pytest.raises(RegistryError, match=f"was deleted in MLflow; run `mlflow experiments restore -x {experiment}`"):
        release.history(settings)
    client.restore_experiment(experiment)
    assert [event["to"] for event in release.history(settings)] == [1]


def test_aliases_are_two(settings):
    with pytest.raises(ConfigError, match="champion or challenger"):
        release.promote(settings, 1, alias="best")


def test_artifacts_land_in_the_workspace_whatever_the_working_directory(settings, bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = bundle(1, evaluation())
    before = set(Path.cwd().iterdir())
    release.register(settings, folder)
    assert set(Path.cwd().iterdir()) == before
    shutil.rmtree(folder)
    assert check_bundle(Registry(settings).fetch(f"models:/{settings.model_name}/1"))


def test_a_bundle_may_lie_in_an_object_store(settings, bundle, moto_server):
    folder = bundle(1, evaluation())
    upload_folder(folder, "s3://bucket/models/one")
    version = release.register(settings, "s3://bucket/models/one")
    assert version.sha256 == check_bundle(folder).sha256
    with pytest.raises(StorageError, match="s3://bucket/models/two: does not exist"):
        release.register(settings, "s3://bucket/models/two")


def test_a_version_tells_where_it_comes_from(settings, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ANIMEDIFFUSION_MODEL_NAME", settings.model_name)
    first = tmp_path / "first"
    first.mkdir()
    (first / "config.yaml").write_text("recipe: phase1\nbatch_size: 8\n")
    (first / "run.json").write_text("{}")
    made = {
        "run": "first",
        "objective": "denoising",
        "steps": 20,
        "batch_size": 8,
        "data": "faces",
        "data_hash": "d" * 64,
    }
    one = release.register(settings, write_bundle(first / "bundle", 1, evaluation(), **made))
    tuned = tmp_path / "tuned"
    sha256 = with_sampler(first / "bundle", tuned, SamplerDefaults(steps=1), metrics={})
    release.register(settings, tuned, parent=one.version)
    second = {**made, "run": "second", "objective": "reconstruction", "parent": sha256}
    release.register(settings, write_bundle(tmp_path / "second", 2, evaluation(21.0), **second))

    shown = release.show(settings, 3, tmp_path / "samples.png")
    assert [(step["version"], step["made"], step["run"]) for step in shown["lineage"]] == [
        (3, "phase 2", "second"), (2, "tuned", "first"), (1, "phase 1", "first")
    ]  # fmt: skip
    assert shown["dataset"] == {"uri": "faces", "hash": "d" * 64}
    assert release.show(settings, 2)["config"] == {"recipe": "phase1", "batch_size": 8}
    assert shown["config"] is None
    assert decode_rgb((tmp_path / "samples.png").read_bytes()).shape[0] > 300
    assert Path(shown["samples"].removeprefix("file://")).read_bytes() == (tmp_path / "samples.png").read_bytes()
    capsys.readouterr()
    assert cli.run(["models", "show", "2", "--workspace", str(settings.workspace)]) == 0
    page = capsys.readouterr().out
    for text in (
        f"version 2 of {settings.model_name}",
        "tuned",
        "faces, hash dddddddddddd",
        "first, recipe demo, 20 steps",
    ):
        assert text in page
