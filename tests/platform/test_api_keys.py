import hashlib
import json
import multiprocessing
import os
import stat
import time

import pytest

from animediffusion.platform.api_keys import Keyring, Keys
from animediffusion.platform.atomic_update import update
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import ConfigError, StorageError
from animediffusion.platform.storage import storage


@pytest.fixture
def keys(tmp_path):
    return Keys(str(tmp_path / "workspace" / "keys.json"))


@pytest.fixture(params=["disk", "store"])
def anywhere(request, tmp_path):
    """A place for keys that does not exist yet: on disk, and in an S3 store."""
    if request.param == "disk":
        return str(tmp_path / "keys.json")
    request.getfixturevalue("moto_server")
    return f"s3://bucket/{tmp_path.name}/keys.json"


def test_a_key_opens_until_it_is_revoked(anywhere):
    keys = Keys(anywhere)
    assert keys.entries() == ()
    studio, artist = keys.create("studio"), keys.create("artist")
    keyring = Keyring(anywhere)
    assert (keyring.name_of(studio), keyring.name_of(artist)) == ("studio", "artist")
    assert keyring.name_of(studio + "x") is None
    keys.revoke("studio")
    keyring.refresh()
    assert (keyring.name_of(studio), keyring.name_of(artist)) == (None, "artist")
    assert [(key.name, key.revoked is None) for key in keys.entries()] == [("studio", False), ("artist", True)]
    assert [key.name for key in keys.active()] == ["artist"]


def test_only_the_hash_is_kept_in_a_file_for_its_owner(keys):
    key = keys.create("studio")
    text = storage.read_bytes(keys.uri).decode()
    assert key not in text
    [entry] = json.loads(text)["keys"]
    assert entry["sha256"] == hashlib.sha256(key.encode()).hexdigest()
    assert stat.S_IMODE(os.stat(keys.uri).st_mode) == 0o600
    assert len(key) > 40


def test_a_name_is_taken_until_its_key_is_revoked(keys):
    first = keys.create("studio")
    with pytest.raises(ConfigError, match="'studio': already exists"):
        keys.create("studio")
    keys.revoke("studio")
    assert keys.create("studio") != first
    assert len(keys.active()) == 1


@pytest.mark.parametrize("name", ["", "-x", "a b", "a/b", "../keys", "x" * 65, "a\nb", "\u00e9"])
def test_an_unusable_name_raises_config_error(keys, name):
    with pytest.raises(ConfigError, match="NAME"):
        keys.create(name)
    assert not storage.exists(keys.uri)


def test_revoking_a_key_that_is_not_there_names_those_that_are(keys):
    keys.create("studio")
    with pytest.raises(ConfigError, match="'studios': does not exist; one of studio"):
        keys.revoke("studios")


def test_a_damaged_file_is_named_but_not_quoted(keys):
    storage.write_bytes(keys.uri, b'{"format": 1, "keys": ["ad_planted"]}')
    with pytest.raises(ConfigError, match="is not a key file") as caught:
        keys.create("studio")
    assert "planted" not in f"{caught.value!r} {caught.value.__cause__!r}"
    assert b"planted" in storage.read_bytes(keys.uri)


def _create_many(uri, prefix, count):
    for number in range(count):
        Keys(uri).create(f"{prefix}{number}")


def test_two_concurrent_processes_lose_nothing(keys):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_create_many, args=(keys.uri, letter, 25)) for letter in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert {key.name for key in keys.active()} == {f"{letter}{number}" for letter in "ab" for number in range(25)}


def test_a_change_in_a_store_that_was_overtaken_is_made_again_on_what_is_there_now(moto_server, tmp_path):
    uri = f"s3://bucket/{tmp_path.name}/list"
    calls = []

    def add(old):
        calls.append(old)
        if len(calls) in (1, 2):  # another process is faster: first by creating the file, then by changing it
            storage.write_bytes(uri, (old or b"") + b"theirs ")
        return (old or b"") + b"ours"

    update(uri, add)
    assert storage.read_bytes(uri) == b"theirs theirs ours"
    assert calls == [None, b"theirs ", b"theirs theirs "]


def test_a_change_that_fails_leaves_the_file(anywhere):
    storage.write_bytes(anywhere, b"old")

    def fail(old):
        raise ConfigError("thing", "found", "allowed")

    with pytest.raises(ConfigError):
        update(anywhere, fail)
    assert storage.read_bytes(anywhere) == b"old"


def test_a_store_that_refuses_is_one_line(moto_server):
    with pytest.raises(StorageError, match="no-such-bucket"):
        Keys("s3://no-such-bucket/keys.json").create("studio")


def test_a_server_stays_closed_when_its_last_key_is_revoked_or_the_file_is_gone(keys):
    assert not Keyring(None).is_closed
    keyring = Keyring(keys.uri)
    assert not keyring.is_closed
    key = keys.create("studio")
    keyring.refresh()
    assert keyring.is_closed
    storage.delete(keys.uri)
    keyring.refresh()
    assert keyring.is_closed
    assert keyring.name_of(key) == "studio"
    storage.write_bytes(keys.uri, b"no json")
    keyring.refresh()
    assert keyring.name_of(key) == "studio"
    storage.delete(keys.uri)
    keys.create("other")
    keys.revoke("other")
    keyring.refresh()
    assert keyring.is_closed
    assert keyring.name_of(key) is None


def test_a_node_without_the_file_lets_nobody_in(keys, caplog):
    assert Keyring(keys.uri, is_closed=True).is_closed
    assert f"no API key in {keys.uri}" in caplog.text


def test_a_watched_keyring_notices_changes_by_itself(keys):
    keyring = Keyring(keys.uri)
    with keyring.watching(0.05):
        key = keys.create("studio")
        end = time.monotonic() + 30
        while keyring.name_of(key) is None and time.monotonic() < end:
            time.sleep(0.01)
    assert keyring.name_of(key) == "studio"


def test_where_the_keys_are_is_a_setting(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Settings(workspace=tmp_path).keys_uri == str(tmp_path / "keys.json")
    monkeypatch.setenv("ANIMEDIFFUSION_KEYS", "s3://bucket/keys.json")
    assert Settings.from_environment().keys_uri == "s3://bucket/keys.json"
    monkeypatch.setenv("ANIMEDIFFUSION_KEYS", "some/keys.json")
    assert Settings.from_environment().keys_uri == str(tmp_path / "some" / "keys.json")
