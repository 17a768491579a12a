"""Bundles on their way from the registry: whole, or an error and nothing in the cache."""

from pathlib import Path

import pytest
from bundles import write_bundle

from animediffusion.models.bundle import verify, with_metrics
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import BundleError, RegistryError
from animediffusion.platform.registry.client import Registry
from animediffusion.platform.registry.downloads import cache_folder, fetch_folder


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture
def registry(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry with one version."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    registry = Registry(Settings.from_environment(workspace=workspace, model_name=f"model-{tmp_path.name}"))
    bundle = write_bundle(tmp_path / "bundle")
    (bundle / "averages.safetensors").write_bytes(b"averages")
    with_metrics(bundle, {})  # lists the new file, too
    registry.register(bundle, sha256=verify(bundle))
    return registry


def stored(registry: Registry) -> Path:
    """The folder that holds version 1."""
    return Path(registry.location(1).removeprefix("file://"))


def fetch(registry: Registry, **options) -> Path:
    return registry.fetch(f"models:/{registry.name}/1", **options)


def cached(registry: Registry) -> list[Path]:
    folder = registry.settings.workspace / "cache" / registry.name
    return list(folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("lost", ["all", "empty", "model.safetensors", "config.json", "checksums.json"])
def test_a_version_whose_files_are_missing_is_named_and_leaves_no_trace(registry: Registry, lost: str) -> None:
    folder = stored(registry)
    file = folder if lost in ("all", "empty") else folder / lost
    hidden = folder.with_name("hidden")
    file.rename(hidden)
    if lost == "empty":
        folder.mkdir()
    if lost == "checksums.json":  # without the list, the files that are there are all there is
        assert fetch(registry).is_dir()
        return
    for _ in range(2):
        with pytest.raises(RegistryError, match=r"version 1: has no .* at file://.*; restore the files there"):
            fetch(registry)
        assert cached(registry) == []
    if lost == "empty":
        folder.rmdir()
    hidden.rename(file)
    assert verify(fetch(registry)) == registry.get(1).sha256


@pytest.mark.parametrize("harm", ["emptied", "truncated", "lost", "list"])
def test_a_damaged_copy_is_downloaded_again(registry: Registry, harm: str) -> None:
    folder = fetch(registry)
    for path in folder.iterdir():
        if harm == "emptied" or (harm == "lost" and path.name == "config.json"):
            path.unlink()
    if harm == "truncated":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
    if harm == "list":
        (folder / "checksums.json").write_text("{")
    assert fetch(registry) == folder
    assert verify(folder) == registry.get(1).sha256


def test_a_whole_copy_is_not_downloaded_again(registry: Registry) -> None:
    folder = fetch(registry)
    stored(registry).rename(stored(registry).with_name("hidden"))
    assert fetch(registry) == folder


@pytest.mark.parametrize("name", ["model.safetensors", "averages.safetensors"])
def test_files_that_were_changed_in_the_store_raise_bundle_error(registry: Registry, name: str) -> None:
    (stored(registry) / name).write_bytes(b"changed")
    with pytest.raises(BundleError, match=f"version 1: {name} was changed"):
        fetch(registry, averages=True)
    assert all(not (folder / name).exists() for folder in cached(registry))


def test_the_file_kept_aside_comes_where_it_is_asked_for(registry: Registry) -> None:
    assert not (fetch(registry) / "averages.safetensors").exists()
    assert (fetch(registry, averages=True) / "averages.safetensors").read_bytes() == b"averages"


def test_a_forgotten_copy_is_gone(registry: Registry) -> None:
    folder = fetch(registry)
    registry.forget(f"models:/{registry.name}/1")
    assert not folder.exists()


def test_a_folder_may_be_given_as_a_uri(tmp_path: Path) -> None:
    (tmp_path / "a b%41?").mkdir()
    assert fetch_folder((tmp_path / "a b%41?").as_uri(), tmp_path) == tmp_path / "a b%41?"
    with pytest.raises(BundleError, match="no such folder"):
        fetch_folder((tmp_path / "a bA?").as_uri(), tmp_path)
    assert cache_folder(Settings(workspace=tmp_path / "new")) == tmp_path / "new" / "cache"


def test_a_number_that_no_database_holds_is_an_unknown_version(registry: Registry) -> None:
    with pytest.raises(RegistryError, match="version 99999999999999999999: no such version; versions: 1"):
        registry.get("99999999999999999999")
