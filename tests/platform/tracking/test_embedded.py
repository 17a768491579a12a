"""A workspace that is moved, copied, linked, read-only or oddly named."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import databases
import pytest
from bundles import write_bundle

from animediffusion.models.bundle import verify
from animediffusion.platform.config import Settings
from animediffusion.platform.registry import audit_log
from animediffusion.platform.registry.client import CHAMPION, Registry
from animediffusion.platform.tracking import embedded, tracking
from animediffusion.platform.tracking.tracking import TRAINING, Run

READ = """
import sys
from animediffusion.models.bundle import verify
from animediffusion.platform.registry import audit_log
from animediffusion.platform.config import Settings
from animediffusion.platform.registry.client import Registry
registry = Registry(Settings.from_environment(workspace=sys.argv[1]))
folder = registry.fetch("models:/animediffusion@champion")
print(verify(folder), registry.versions()[0].aliases, len(audit_log.read(registry)), folder)
"""


def opened(folder: Path) -> Registry:
    return Registry(Settings.from_environment(workspace=folder))


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a promoted version, as it was made; copy it."""
    folder = tmp_path_factory.mktemp("made") / "workspace"
    bundle = write_bundle(tmp_path_factory.mktemp("bundle") / "b")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        registry = opened(folder)
        registry.register(bundle, sha256=verify(bundle))
        with audit_log.recorded(registry, "promote", CHAMPION, None, 1):
            registry.set_alias(CHAMPION, 1)
    return folder


@pytest.fixture
def original(made: Path, tmp_path: Path) -> Path:
    """A workspace where it was made: the URIs in its database are its own."""
    shutil.copytree(made, tmp_path / "original")
    opened(tmp_path / "original")
    return tmp_path / "original"


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file but the lock."""
    stats = {path.relative_to(folder): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items() if path.suffix != ".lock"}


def use(folder: Path, tmp_path: Path) -> None:
    """Read and write everything that a workspace holds."""
    registry = opened(folder)
    assert registry.location(1).startswith((folder / "artifacts").as_uri() + "/")
    assert verify(registry.fetch("models:/animediffusion@champion")) == registry.get(1).sha256
    again = write_bundle(tmp_path / "again", seed=1)
    assert registry.register(again, sha256=verify(again)) == 2
    with audit_log.recorded(registry, "promote", CHAMPION, 1, 2):
        registry.set_alias(CHAMPION, 2)
    (tmp_path / "note.txt").write_text("hello")
    run = Run.start(registry.settings, TRAINING, "r")
    run.log_artifact(tmp_path / "note.txt")
    assert run.finish() == 0
    assert [path.name for path in (folder / "artifacts" / TRAINING).rglob("*.txt")] == ["note.txt"]
    assert verify(registry.fetch("models:/animediffusion/2")) == verify(again)


def test_a_copy_works_and_never_writes_to_its_original(original: Path, tmp_path: Path) -> None:
    before = files(original)
    shutil.copytree(original, tmp_path / "copy")
    use(tmp_path / "copy", tmp_path)
    assert files(original) == before


def test_a_workspace_that_was_moved_works(original: Path, tmp_path: Path) -> None:
    original.rename(tmp_path / "moved ?%41#")
    use(tmp_path / "moved ?%41#", tmp_path)
    assert not original.exists()


def test_a_copy_of_a_copy_works_below_a_folder_named_as_an_experiment(original: Path, tmp_path: Path) -> None:
    place = tmp_path / "artifacts" / "animediffusion-x"
    shutil.copytree(original, place / "one")
    opened(place / "one")
    shutil.copytree(place / "one", place / "two")
    shutil.rmtree(place / "one")
    use(place / "two", tmp_path)


def test_a_link_to_a_workspace_is_the_workspace(original: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(original)
    before = files(original)
    registry = opened(tmp_path / "link")
    assert registry.client.get_run(registry.get(1).run).info.artifact_uri.startswith(original.as_uri())
    assert registry.file_names(1) > {"model.safetensors"}
    assert files(original) == before


def test_what_another_store_says_is_left_as_it_is(original: Path, tmp_path: Path, monkeypatch) -> None:
    shutil.copytree(original, tmp_path / "copy")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/copy/mlflow.db")
    shared = opened(tmp_path / "another")
    assert shared.location(1).startswith(original.as_uri())
    for uri in ("s3://b/artifacts/animediffusion-models/x", "models:/m-1", "file:///data/artifacts/mine/x"):
        assert embedded.relocated(uri, tmp_path) == uri


def test_a_database_is_where_the_workspace_is_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "one_creator", databases.create)  # MLflow creates this one itself
    folder = tmp_path / "p?q%41" / "a?x%41b%#c d&e;f@g:h+i~'\u7dda\nj"
    settings = Settings.from_environment(workspace=folder)
    run = Run.start(settings, TRAINING, "r")
    (tmp_path / "note.txt").write_text("hello")
    run.log_artifact(tmp_path / "note.txt")
    assert run.finish() == 0
    assert tracking.setup(settings).list_artifacts(run.run_id)[0].path == "note.txt"
    assert {path.name for path in folder.iterdir()} == {"mlflow.db", "mlflow.db.lock", "artifacts"}
    assert {path.name for path in tmp_path.iterdir()} == {"p?q%41", "note.txt"}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert len(list(folder.rglob("note.txt"))) == 1


@pytest.mark.parametrize(
    ("uri", "file"),
    [
        ("sqlite:////a/b.db", "/a/b.db"),
        ("sqlite+pysqlite:////a%3Fb/c%2541.db", "/a?b/c%41.db"),
        ("sqlite:///:memory:", None),
        ("sqlite://", None),
        ("http://127.0.0.1:5000", None),
        ("postgresql://host/name", None),
        ("databricks", None),
    ],
)
def test_the_file_of_a_database_is_known_by_its_uri(uri: str, file: str | None) -> None:
    assert embedded.database(uri) == (Path(file) if file else None)


@pytest.mark.slow
def test_a_workspace_that_cannot_be_written_is_read(original: Path) -> None:
    # Root obeys permissions without this capability only.
    as_others = ["setpriv", "--bounding-set=-dac_override"] if os.getuid() == 0 else []
    with tempfile.TemporaryDirectory(prefix="readable-") as name:
        place = Path(name)
        shutil.copytree(original, place / "workspace", ignore=shutil.ignore_patterns("*.lock", "cache"))
        for path in (place, *place.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = files(place)
        done = subprocess.run(
            [*as_others, sys.executable, "-c", READ, str(place / "workspace")],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        sha256, aliases, num_events, cache = done.stdout.split()
        assert (sha256, aliases, num_events) == (opened(original).get(1).sha256, "['champion']", "1")
        assert not Path(cache).exists()
        assert files(place) == before
        for path in (place, *place.rglob("*")):
            path.chmod(0o755)
