"""The commands `corrections`, in this process."""

import json
from pathlib import Path

import pytest

from animediffusion.cli import app as cli
from animediffusion.platform.config import Settings
from animediffusion.platform.corrections.counts import VersionCounts
from animediffusion.platform.corrections.store import FORMAT, Correction, Corrections, KeptRequest, now
from animediffusion.platform.registry import audit_log
from animediffusion.platform.registry.client import Registry
from animediffusion.platform.storage import storage


@pytest.fixture
def store(tmp_path, monkeypatch) -> Corrections:
    """A store with one correction and one kept request of two keys, and of clients without a key."""
    monkeypatch.setenv("ANIMEDIFFUSION_WORKSPACE", str(tmp_path / "workspace"))
    monkeypatch.setenv("ANIMEDIFFUSION_CORRECTIONS", str(tmp_path / "store"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = Corrections(str(tmp_path / "store"))
    for key in ("studio", "atelier", ""):
        kept = {"sketch": b"s", "references": (b"r",), "picture": b"p", "options": {}}
        store.keep(KeptRequest(request_id="two", key=key, time=now(), model_version="3", **kept))
        record = {"format": FORMAT, "request_id": "one", "key": key, "model_version": "3", "kind": "hints"}
        record |= {"answered": now(), "time": now(), "changed": 0.25, "sha256": {"corrected.png": "a"}}
        store.save(Correction(record=record, files={"corrected.png": b"c"}))
    store.add_counts({(now()[:10], "3"): VersionCounts(12, 0)})
    return store


@pytest.fixture
def command(capsys):
    def run(*words: str):
        code = cli.run(list(words))
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err.splitlines()

    return run


def test_the_list_has_every_correction_and_the_rate_of_each_version(store, command):
    code, out, _ = command("corrections", "list", "--json")
    found = json.loads(out[-1])
    assert code == 0
    assert [(one["key"], one["request_id"], one["changed"]) for one in found["corrections"]] == [
        ("", "one", 0.25),
        ("atelier", "one", 0.25),
        ("studio", "one", 0.25),
    ]
    assert found["versions"] == {"3": {"answered": 12, "corrected": 3, "rate": 0.25}}
    assert len(json.loads(command("corrections", "list", "--key", "studio", "--json")[1][-1])["corrections"]) == 1
    shown = "\n".join(command("corrections", "list")[1])
    assert "atelier" in shown
    assert "0.25" in shown


def test_delete_removes_all_of_one_key_and_is_in_the_audit_log(store, command):
    code, out, err = command("corrections", "delete", "--key", "studio")
    assert (code, out) == (0, ["deleted 1 correction and 1 kept request of studio"])
    assert "datasets that were made earlier still contain the deleted corrections" in err[-1]
    names = storage.list_files(store.uri)
    assert [name for name in names if "studio" in name] == []
    assert len([name for name in names if name.endswith(".zip")]) == 4
    assert store.counts() == {"3": VersionCounts(12, 3)}
    registry = Registry(Settings.from_environment())
    experiment = registry.client.get_experiment_by_name(audit_log.EXPERIMENT)
    [run] = registry.client.search_runs([experiment.experiment_id])
    assert {name: run.data.tags[name] for name in ("action", "key", "corrections", "requests")} == {
        "action": "corrections delete",
        "key": "studio",
        "corrections": "1",
        "requests": "1",
    }
    assert run.data.tags["user"] == audit_log.user_name()
    assert audit_log.read(registry) == []  # It is no event of an alias.
    code, out, _ = command("corrections", "delete", "--key", "studio", "--json")
    assert json.loads(out[-1]) == {"key": "studio", "corrections": 0, "requests": 0}
    code, out, _ = command("corrections", "delete", "--key", "_", "--json")
    assert json.loads(out[-1]) == {"key": "", "corrections": 1, "requests": 1}
    assert [entry.key for entry in store.entries()] == ["atelier"]


def test_wrong_usage_is_one_line(store, command, monkeypatch):
    for name in ("../studio", "", "a b"):
        code, _, err = command("corrections", "delete", "--key", name)
        assert (code, len(err)) == (2, 1)
    assert len(store.entries()) == 3
    monkeypatch.delenv("ANIMEDIFFUSION_CORRECTIONS")
    code, _, err = command("corrections", "list")
    assert (code, err) == (
        2,
        ["error: ANIMEDIFFUSION_CORRECTIONS: is not set; set it to the store of your servers"],
    )


def test_an_empty_store_is_said_so(tmp_path: Path, command, monkeypatch):
    monkeypatch.setenv("ANIMEDIFFUSION_CORRECTIONS", str(tmp_path / "none"))
    assert command("corrections", "list")[1] == [f"no corrections in {tmp_path}/none"]
