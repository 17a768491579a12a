"""Storage: the same calls on a folder and on S3, and one line for everything that goes wrong."""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import Fault, FaultyStore

from animediffusion.platform.errors import ConfigError, FileError, StorageError, StoreFailedError, UnreachableError
from animediffusion.platform.storage import s3
from animediffusion.platform.storage.s3 import CONNECT_S, PROBE_S
from animediffusion.platform.storage.storage import (
    PATIENCE_VARIABLE,
    delete,
    download_folder,
    exists,
    expect,
    join,
    list_files,
    list_names,
    list_sizes,
    read_bytes,
    write_bytes,
)


@pytest.fixture(params=["local", "s3", "s3 with its own endpoint"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "place")
    url = request.getfixturevalue("moto_server")
    uri = f"s3://bucket/{tmp_path.name}"
    return uri if request.param == "s3" else f"{uri}?endpoint_override={url}"


@pytest.fixture
def silent_endpoint() -> Iterator[str]:
    """A server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_what_is_written_is_read_listed_and_deleted(place: str) -> None:
    write_bytes(join(place, "b", "two words.bin"), b"12")
    write_bytes(join(place, "a 100%+.bin"), b"1")
    write_bytes(join(place, "a 100%+.bin"), b"123")

    assert list_sizes(place) == {"a 100%+.bin": 3, "b/two words.bin": 2}
    assert read_bytes(join(place, "b/two words.bin")) == b"12"
    assert exists(place)
    delete(join(place, "b"))
    assert list_files(place) == ["a 100%+.bin"]
    delete(join(place, "b"))
    assert not exists(join(place, "b"))


def test_the_names_in_a_folder_come_by_pages_without_those_of_folders_in_it(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PAGE_KEYS", 2)
    for name in ("b 1%.png", "a.png", "inner/c.png", "d+é.png", "e.png"):
        write_bytes(join(place, "names", *name.split("/")), b"x")
    names = list(list_names(join(place, "names")))
    assert names == ["a.png", "b 1%.png", "d+é.png", "e.png"]
    assert read_bytes(join(place, "names", names[1])) == b"x"


def test_a_folder_is_downloaded_with_its_subfolders(place: str, tmp_path: Path) -> None:
    write_bytes(join(place, "deep", "file"), b"x")

    download_folder(place, tmp_path / "local")

    assert (tmp_path / "local" / "deep" / "file").read_bytes() == b"x"


def test_a_missing_file_is_named(place: str) -> None:
    with pytest.raises(StorageError, match=r"nothing.* does not exist"):
        read_bytes(join(place, "nothing"))
    with pytest.raises(StorageError, match="does not exist"):
        list_files(join(place, "nothing"))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()

    with pytest.raises(StorageError, match="folder"):
        write_bytes(str(tmp_path / "folder"), b"x")
    assert list_files(str(tmp_path)) == []


def test_a_file_in_place_of_a_folder_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(StorageError, match=r"taken/a.txt: a file has the name of its folder; check the path"):
        write_bytes(str(tmp_path / "taken" / "a.txt"), b"")


def test_a_missing_bucket_is_one_line(moto_server: str) -> None:
    for attempt in (read_bytes, list_files, delete, exists):
        with pytest.raises(StorageError, match="bucket 'nowhere' does not exist; create it") as error:
            attempt("s3://nowhere/file")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://nosuch.invalid:9000", "silent"])
def test_an_endpoint_that_does_not_answer_is_reported_within_ten_seconds(
    endpoint: str, silent_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", silent_endpoint if endpoint == "silent" else endpoint)
    started = time.monotonic()

    with pytest.raises(UnreachableError, match=r"http://.* does not answer .*; check AWS_ENDPOINT_URL_S3") as error:
        list_files("s3://bucket/path")

    assert CONNECT_S + PROBE_S < 10
    assert time.monotonic() - started < 15  # one attempt: three would take 18 s of the silent one
    assert "\n" not in str(error.value)


def test_an_endpoint_switches_the_search_for_machine_credentials_off(
    silent_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "")
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")

    with pytest.raises(UnreachableError):
        exists("s3://another/path")
    assert os.environ["AWS_EC2_METADATA_DISABLED"] == "true"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://key:hidden@bucket/path", "credentials in the URI; set AWS_ACCESS_KEY_ID"),
        ("s3://bucket/path?secret_key=hidden&region=x", "credentials in the URI"),
        ("s3:///path", "does not name a bucket"),
        ("s3://bucket/path?speed=9", "option 'speed' is not known; one of endpoint_override"),
        ("ftp://bucket/path", "scheme 'ftp' is not known; give a local path or s3://"),
        ("gs://", "does not name a bucket; write gs://bucket/path"),
        ("gs://bucket/path?region=x", "has options, which only s3:// URIs have"),
        ("hf://datasets//name", "has an empty part between two slashes"),
        ("", "the path is empty"),
    ],
)
def test_a_uri_that_cannot_be_used_raises_storage_error_without_its_secret(uri: str, message: str) -> None:
    with pytest.raises(StorageError, match=message) as error:
        exists(uri)
    assert "hidden" not in str(error.value)


def test_a_path_is_joined_before_the_query() -> None:
    assert join("s3://b/a/?endpoint_override=http://x:1", "c d", "e") == "s3://b/a/c d/e?endpoint_override=http://x:1"
    assert join("file:///tmp/a", "b") == "/tmp/a/b"


FAULTS: list[Fault] = ["slow_down", "reset", "stall", "refuse"]


@pytest.fixture
def faulty(faulty_s3: tuple[str, FaultyStore], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A place behind the faulty way that has answered; a silent request is given up after one second, not 15."""
    monkeypatch.setattr(s3, "STALLED_S", 1)
    uri = f"s3://bucket/{tmp_path.name}?endpoint_override={faulty_s3[0]}"
    write_bytes(join(uri, "big.bin"), bytes(2_000_000))
    return uri


@pytest.mark.parametrize("kind", FAULTS)
def test_a_listing_goes_on_after_a_fault(
    kind: Fault, faulty: str, faulty_s3: tuple[str, FaultyStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "ATTEMPTS", 1)
    monkeypatch.setattr(s3, "PAGE_KEYS", 1)
    write_bytes(join(faulty, "small.bin"), b"x")
    names = list_names(faulty)
    assert next(names) == "big.bin"
    if kind == "refuse":
        faulty_s3[1].fail(kind, seconds=1)
    else:
        faulty_s3[1].fail(kind, requests=2, where="list-type")
    assert list(names) == ["small.bin"]


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_that_passes_is_waited_out(
    kind: Fault, faulty: str, faulty_s3: tuple[str, FaultyStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "ATTEMPTS", 1)
    s3.connect.cache_clear()
    _, store = faulty_s3

    for work in (
        lambda: write_bytes(join(faulty, "new.bin"), b"12"),
        lambda: read_bytes(join(faulty, "big.bin")),
        lambda: list_sizes(faulty),
        lambda: exists(join(faulty, "new.bin")),
        lambda: delete(join(faulty, "new.bin")),
    ):
        store.fail(kind, requests=None if kind == "refuse" else 1, seconds=0.4 if kind == "refuse" else None)
        work()

    assert list_sizes(faulty) == {"big.bin": 2_000_000}
    assert kind == "refuse" or store.hits[kind] == 5


@pytest.mark.parametrize("where", ["PUT /bucket", "uploads", "partNumber=2", "uploadId"])
def test_a_large_file_survives_a_lost_answer_to_any_request(
    where: str, faulty: str, faulty_s3: tuple[str, FaultyStore]
) -> None:
    data = os.urandom(11 * 2**20)
    faulty_s3[1].fail("reset", requests=1, where=where)

    write_bytes(join(faulty, "large.bin"), data)

    assert faulty_s3[1].hits["reset"] == 1
    assert read_bytes(join(faulty, "large.bin")) == data


def test_a_read_cut_in_the_middle_is_never_short(faulty: str, faulty_s3: tuple[str, FaultyStore]) -> None:
    faulty_s3[1].fail("reset", requests=3, where="GET /bucket")

    assert read_bytes(join(faulty, "big.bin")) == bytes(2_000_000)
    assert faulty_s3[1].hits["reset"] == 3


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_that_stays_is_one_line_after_the_patience(
    kind: Fault, faulty: str, faulty_s3: tuple[str, FaultyStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PATIENCE_VARIABLE, "1")
    monkeypatch.setattr(s3, "ATTEMPTS", 1)
    s3.connect.cache_clear()
    read_bytes(join(faulty, "big.bin"))
    faulty_s3[1].fail(kind)

    with pytest.raises(StoreFailedError, match=r"s3://.*big.bin.* for \d s; run the same command again") as error:
        read_bytes(join(faulty, "big.bin"))

    assert error.value.exit_code == 1
    assert "\n" not in str(error.value)


def test_a_busy_store_is_not_taken_for_a_wrong_address(faulty_s3: tuple[str, FaultyStore], tmp_path: Path) -> None:
    url, store = faulty_s3
    store.fail("slow_down", requests=2)

    write_bytes(f"s3://bucket/{tmp_path.name}/file?endpoint_override={url}", b"1")
    assert store.hits["slow_down"] == 2


def test_a_store_that_another_process_reached_is_retried(faulty_s3: tuple[str, FaultyStore], tmp_path: Path) -> None:
    url, store = faulty_s3
    uri = f"s3://bucket/{tmp_path.name}/file?endpoint_override={url}"
    store.fail("refuse", seconds=2)
    expect(uri)

    write_bytes(uri, b"1")
    assert read_bytes(uri) == b"1"


def test_only_a_file_of_its_own_is_blamed(faulty: str, tmp_path: Path) -> None:
    for uri in (join(faulty, "nothing"), str(tmp_path / "nothing")):
        with pytest.raises(FileError):
            read_bytes(uri)


def test_a_patience_that_is_not_a_number_is_rejected(moto_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATIENCE_VARIABLE, "long")

    with pytest.raises(ConfigError, match=f"{PATIENCE_VARIABLE}: 'long'; seconds, 0 or more"):
        exists("s3://bucket/path")
