from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from animediffusion.platform.corrections import counts as counts_module
from animediffusion.platform.corrections import store as store_module
from animediffusion.platform.corrections.counts import VersionCounts
from animediffusion.platform.corrections.store import Correction, Corrections, Entry, KeptRequest, now, surplus_of
from animediffusion.platform.errors import DataError, StorageError

NOW = datetime(2026, 1, 31, tzinfo=UTC)


def request_of(request_id: str, key: str = "studio", **values) -> KeptRequest:
    fields = {"time": now(), "model_version": "3", "options": {"seed": 1}, "sketch": b"s", "references": (b"1", b"2")}
    return KeptRequest(request_id=request_id, key=key, picture=b"p", **{**fields, **values})


def correction_of(request_id: str, key: str = "studio", version: str = "3", picture: str = "a") -> Correction:
    record = {"format": store_module.FORMAT, "request_id": request_id, "key": key, "model_version": version}
    record |= {"answered": "2026-01-31T12:00:00Z", "sha256": {"corrected.png": picture}}
    return Correction(record=record, files={"corrected.png": picture.encode()})


def entry(key: str, minutes: int, num_bytes: int = 1) -> Entry:
    return Entry(key, f"kept/{key}/{minutes}.zip", num_bytes, NOW - timedelta(minutes=minutes))


@pytest.fixture
def store(tmp_path) -> Corrections:
    return Corrections(str(tmp_path / "store"))


def test_a_kept_request_comes_back_as_it_was(store):
    request = request_of("one", files={"palette": b"colors"})
    store.keep(request)
    assert store.find("studio", "one") == request
    assert store.find("other", "one") is None
    assert store.find("", "one") is None


@pytest.mark.parametrize("request_id", [".", "..", ".hidden", "a" * 64])
def test_every_id_of_a_request_is_a_name_of_a_file(store, request_id):
    store.keep(request_of(request_id))
    assert store.find("studio", request_id).request_id == request_id
    assert [path.name for path in Path(store.uri).glob("kept/studio/*")] == [f"{request_id}.zip"]


def test_old_requests_and_those_above_the_number_are_surplus_and_no_key_displaces_others(monkeypatch):
    monkeypatch.setattr(store_module, "MAX_KEPT", 4)
    studio, other = [entry("studio", minutes) for minutes in range(1, 9)], [entry("other", 100), entry("other", 200)]
    old = entry("third", 7 * 24 * 60 + 1)
    surplus = surplus_of([*studio, *other, old], NOW)
    assert set(surplus) == {*studio[2:], old}
    assert surplus_of([*studio[:2], *other], NOW) == []


def test_requests_above_the_size_are_surplus(monkeypatch):
    monkeypatch.setattr(store_module, "MAX_KEPT_BYTES", 100)
    kept = [entry("studio", minutes, 40) for minutes in (1, 2, 3)]
    assert surplus_of(kept, NOW) == [kept[2]]


def test_cleaning_deletes_what_is_too_old_and_nothing_else(store):
    store.keep(request_of("one"))
    store.save(correction_of("one"))
    later = datetime.now(UTC) + timedelta(seconds=store_module.KEEP_S + 60)
    assert (store.clean(), store.clean(later), store.clean(later)) == (0, 1, 0)
    assert len(store.entries()) == 1


def test_a_key_is_deleted_from_an_s3_store(moto_server, tmp_path):
    store = Corrections(f"s3://bucket/{tmp_path.name}")
    for key in ("studio", "other"):
        store.keep(request_of("one", key))
        store.save(correction_of("one", key))
    assert store.delete("studio") == (1, 1)
    assert [one.key for one in store.entries()] == ["other"]
    assert store.find("studio", "one") is None
    assert store.find("other", "one") is not None
    assert store.clean() == 0
    assert store.clean(datetime.now(UTC) + timedelta(seconds=store_module.KEEP_S + 60)) == 1
    assert store.find("other", "one") is None


def test_deleting_a_key_touches_nothing_else(store):
    for key in ("studio", "studio2", ""):
        store.keep(request_of("one", key))
        store.save(correction_of("one", key))
    store.save(correction_of("two"))
    assert store.num_of("studio") == (2, 1)
    assert store.delete("studio") == (2, 1)
    assert store.delete("studio") == (0, 0)
    assert {path.name for path in Path(store.uri).glob("*/*")} == {"_", "studio2"}
    assert [one.key for one in store.entries()] == ["", "studio2"]
    assert store.find("studio2", "one") is not None
    assert store.counts()["3"].corrected == 4  # Counts name nobody.


def test_an_unfinished_file_of_a_killed_server_is_no_correction(store, tmp_path):
    store.save(correction_of("one"))
    (tmp_path / "store/corrections/studio/3/.0123.part").write_bytes(b"PK")
    assert len(store.entries()) == 1
    assert store.delete("studio") == (1, 0)
    assert not (tmp_path / "store/corrections/studio").exists()


def test_a_damaged_record_is_named_and_the_others_are_read(store, tmp_path):
    store.save(correction_of("one"))
    (tmp_path / "store/corrections/studio/3/two.zip").write_bytes(b"PK")
    one, two = store.read_records(store.entries())
    assert one["request_id"] == "one"
    assert isinstance(two, DataError)


@pytest.mark.parametrize("place", ["folder", "s3"])
def test_counts_of_many_writers_are_added_up(tmp_path, moto_server, place):
    store = Corrections(str(tmp_path / "store") if place == "folder" else f"s3://bucket/{tmp_path.name}")
    store.prepare()
    assert store.counts() == {}
    with ThreadPoolExecutor(4) as pool:
        days = ("2026-01-30", "2026-01-31")
        writers = [{(day, "3"): VersionCounts(2, 0), (day, "sha256:1"): VersionCounts(1, 1)} for day in days * 4]
        list(pool.map(store.add_counts, writers))
    assert store.counts() == {"3": VersionCounts(16, 0), "sha256:1": VersionCounts(8, 8)}
    assert store.counts("2026-01-31") == {"3": VersionCounts(8, 0), "sha256:1": VersionCounts(4, 4)}
    assert store.counts()["sha256:1"].rate == 1


def test_counts_stay_small_and_keep_their_sum(store, monkeypatch):
    monkeypatch.setattr(counts_module, "MAX_DAYS", 2)
    for day in range(1, 6):
        store.add_counts({(f"2026-01-0{day}", "3"): VersionCounts(1, 0)})
    assert store.counts() == {"3": VersionCounts(5, 0)}
    assert store.counts("2026-01-01") == {"3": VersionCounts(2, 0)}


def test_a_store_that_cannot_be_written_is_reported_before_a_server_starts(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        Corrections(str(tmp_path / "file" / "store")).prepare()
    with pytest.raises(StorageError, match="s3://"):
        Corrections("gs://bucket/store").prepare()
