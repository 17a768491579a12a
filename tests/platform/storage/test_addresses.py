"""Addresses: what is written is what is read, and which store an s3:// URI means."""

from pathlib import Path

import boto3
import pytest

from animediffusion.platform import doctor
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import FileError, StorageError
from animediffusion.platform.network import is_uri
from animediffusion.platform.storage import s3
from animediffusion.platform.storage.addresses import join, parse
from animediffusion.platform.storage.storage import list_files, read_bytes, write_bytes


@pytest.fixture(autouse=True)
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty configuration of AWS; returns its file."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_REGION", "MLFLOW_S3_ENDPOINT_URL"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    return tmp_path / "config"


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("s3://pics/q", "pics/q"),
        ("s3://pics", "pics"),
        ("s3://pics/", "pics"),
        ("s3://pics/folder/", "pics/folder"),
        ("s3://pics/what%3F", "pics/what?"),
        ("s3://pics/a#b", "pics/a#b"),
        ("s3://pics/a+b c", "pics/a+b c"),
        ("s3://pics/100%", "pics/100%"),
        ("s3://pics/per%2520cent", "pics/per%20cent"),
        ("s3://pics/a\nb\tc", "pics/a\nb\tc"),
        ("s3://pics/\u7dda", "pics/\u7dda"),
        ("s3://pics/a;b@c:d", "pics/a;b@c:d"),
        ("file:///tmp/a%20b%3F", "/tmp/a b?"),
        ("file:/tmp/a", "/tmp/a"),
        ("file://localhost/tmp/a#b", "/tmp/a#b"),
        ("/tmp/a?b%20#c", "/tmp/a?b%20#c"),
        ("/tmp/s3:/x", "/tmp/s3:/x"),
    ],
)
def test_an_address_is_read_exactly(uri: str, path: str) -> None:
    assert parse(uri).path == path


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://pics/q?x", "option 'x' is not known; .* a \\? in a name is written %3F"),
        ("s3://pics/q?", "option '' is not known"),
        ("s3://pics/q?x=1&region=a", "option 'x' is not known"),
        ("s3://pics/q?region=a&region=b", "option 'region' has 2 values"),
        ("s3://pics/q?region=", "option 'region' has no value"),
        ("s3://pics/q?scheme=http", "scheme 'http' cannot be used here"),
        ("s3://pics/q?endpoint_override=http://x&scheme=http", "scheme 'http' cannot be used here"),
        ("s3://pics//q", "empty part"),
        ("s3://pics/q//", "empty part"),
        ("s3://pics/a%2F/b", "empty part"),
        ("s3://pics/%FF", "not UTF-8"),
        ("s3://pi cs/q", "'pi cs' is not the name of a bucket"),
        ("s3://pics#a/q", "'pics#a' is not the name of a bucket"),
        ("s3:/pics/q", "is not an s3:// URI; write s3://bucket/path"),
        ("s3:pics", "is not an s3:// URI"),
        ("file://tmp/a", "is not the URI of a file; write file:///path"),
        ("file:a", "is not the URI of a file"),
        ("file:///tmp/a?b", "write a \\? in a name as %3F"),
        ("S3://pics/q", "scheme 'S3' is not known"),
    ],
)
def test_no_part_of_an_address_is_dropped(uri: str, message: str) -> None:
    with pytest.raises(StorageError, match=message):
        parse(uri)


def test_a_local_name_with_a_colon_is_not_a_uri() -> None:
    assert not any(map(is_uri, ("run:1/bundle", "/tmp/x", "a b", "models:/a@champion", "./s3:/x")))
    assert all(map(is_uri, ("s3://b/k", "s3:/b", "file:/x", "https://x")))


@pytest.mark.usefixtures("moto_server")
def test_names_travel_through_the_store_unchanged(moto_server: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", moto_server)
    place = f"s3://bucket/{tmp_path.name}"
    names = ["a?b.png", "c#d.png", "per%20cent.png", "e+f g.png", "h&i=j;k@l.png", "\u7dda.png", "m~n:o.png"]
    for name in names:
        write_bytes(join(place, name), name.encode())
    assert list_files(place) == sorted(names)
    assert {name: read_bytes(join(place, name)).decode() for name in names} == {name: name for name in names}
    with pytest.raises(StorageError, match="does not exist; check the path; a % in a name is written %25"):
        read_bytes(f"{place}/per%20cent.png")


def test_a_key_with_an_empty_part_is_not_taken_for_another(moto_server: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", moto_server)
    store = boto3.client("s3")
    for key in ("a.png", "/a.png"):
        store.put_object(Bucket="bucket", Key=f"{tmp_path.name}/{key}", Body=key.encode())
    place = f"s3://bucket/{tmp_path.name}"
    assert sorted(list_files(place)) == ["/a.png", "a.png"]
    assert read_bytes(join(place, "a.png")) == b"a.png"
    with pytest.raises(FileError, match="has an empty part between two slashes"):
        read_bytes(join(place, "/a.png"))


PROFILES = """
[default]
region = eu-west-1
[profile plain]
endpoint_url = http://127.0.0.1:1111
region = eu-north-1
[profile minio]
services = local
endpoint_url = http://127.0.0.1:1111
[profile lost]
services = nowhere
[services local]
s3 =
  endpoint_url = http://127.0.0.1:2222
"""


@pytest.mark.parametrize(
    ("environment", "endpoint"),
    [
        ({}, None),
        ({"AWS_PROFILE": "plain"}, "http://127.0.0.1:1111"),
        ({"AWS_PROFILE": "minio"}, "http://127.0.0.1:2222"),
        ({"AWS_PROFILE": "minio", "AWS_ENDPOINT_URL": "http://127.0.0.1:3333"}, "http://127.0.0.1:3333"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:3", "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:4"}, "http://127.0.0.1:4"),
        ({"AWS_PROFILE": "plain", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"}, None),
    ],
)
def test_the_endpoint_is_the_one_that_boto3_uses(aws: Path, monkeypatch, environment: dict[str, str], endpoint) -> None:
    aws.write_text(PROFILES)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    assert parse("s3://b/k").endpoint == endpoint
    assert boto3.Session().client("s3").meta.endpoint_url == (endpoint or "https://s3.amazonaws.com")
    assert parse("s3://b/k?endpoint_override=host:9&scheme=http").endpoint == "http://host:9"
    check = doctor.check_storage()
    assert not check.ok if endpoint else check.ok
    assert endpoint is None or f"{s3.endpoint_source(endpoint)}={endpoint} does not answer" in check.detail


@pytest.mark.parametrize(("profile", "found"), [("absent", "absent"), ("lost", "nowhere")])
def test_a_profile_that_cannot_be_used_is_one_line(aws: Path, monkeypatch, profile: str, found: str) -> None:
    aws.write_text(PROFILES)
    monkeypatch.setenv("AWS_PROFILE", profile)
    with pytest.raises(StorageError, match=f"s3://b/k: .*{found}.*; check AWS_PROFILE") as error:
        parse("s3://b/k")
    assert "\n" not in str(error.value)
    with pytest.raises(StorageError, match=f"{found}.*; check AWS_PROFILE"):
        read_bytes("s3://b/k?endpoint_override=http://127.0.0.1:9")


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9", "http://127.0.0.1:9\n", " "])
def test_an_endpoint_that_is_no_address_is_quoted_as_it_is(aws: Path, monkeypatch, endpoint: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    with pytest.raises(StorageError) as caught:
        parse("s3://bucket/faces")
    allowed = "an address, for example http://127.0.0.1:9000"
    assert str(caught.value) == f"AWS_ENDPOINT_URL_S3: {endpoint!r}; {allowed}"


def test_a_profile_alone_reaches_its_store(aws: Path, moto_server: str, monkeypatch, tmp_path: Path) -> None:
    aws.write_text(f"[profile studio]\nendpoint_url = {moto_server}\nregion = us-east-1\n")
    (tmp_path / "credentials").write_text("[studio]\naws_access_key_id = test\naws_secret_access_key = test\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_PROFILE", "studio")
    write_bytes(f"s3://bucket/{tmp_path.name}/file", b"1")
    assert boto3.Session().client("s3").list_objects_v2(Bucket="bucket", Prefix=tmp_path.name)["KeyCount"] == 1
    checks = {check.name: check for check in doctor.checks(Settings(workspace=tmp_path))}
    assert checks["storage"].ok
    assert f"S3 at {moto_server} (AWS profile studio) answers, keys of the profile studio" in checks["storage"].detail


def test_another_store_for_mlflow_is_shown(moto_server: str, monkeypatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", moto_server)
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "MLFLOW_S3_ENDPOINT_URL=http://127.0.0.1:9 does not answer" in doctor.check_storage().detail
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", moto_server)
    assert doctor.check_storage().ok


@pytest.mark.parametrize("name", ["~nobody-has-this-name", "~nobody-has-this-name/a", "./~a", "~$draft.png"])
def test_a_tilde_that_names_no_home_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse(name).path == str(tmp_path / name)
    settings = Settings.from_environment(workspace=name, keys=name)
    assert (str(settings.workspace), settings.keys_uri) == (str(tmp_path / name), str(tmp_path / name))


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse("~/faces").path == str(tmp_path / "faces")
