"""The store that fails on command: each fault as a plain socket sees it."""

import http.client
import socket
from contextlib import suppress
from urllib.parse import urlsplit

import boto3
import pytest
from faults import FaultyStore


def get(url: str, path: str, timeout: float = 5) -> tuple[int, bytes]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def until_answered(url: str) -> int:
    while True:
        with suppress(ConnectionRefusedError):
            return get(url, "/bucket/two")[0]


def test_a_healthy_way_changes_nothing(faulty_s3: tuple[str, FaultyStore]) -> None:
    url, store = faulty_s3
    client = boto3.client("s3", endpoint_url=url)

    client.put_object(Bucket="bucket", Key="faults/a b+%.bin", Body=bytes(range(256)) * 4000)

    assert client.get_object(Bucket="bucket", Key="faults/a b+%.bin")["Body"].read() == bytes(range(256)) * 4000
    assert client.head_object(Bucket="bucket", Key="faults/a b+%.bin")["ContentLength"] == 1_024_000
    assert not store.hits


def test_each_fault_is_what_its_name_says(faulty_s3: tuple[str, FaultyStore]) -> None:
    url, store = faulty_s3
    client = boto3.client("s3", endpoint_url=url)
    client.put_object(Bucket="bucket", Key="faults/file", Body=b"x" * 100_000)
    signed = client.generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": "faults/file"})
    path = signed.removeprefix(url)

    store.fail("slow_down", requests=1)
    assert get(url, path)[0] == 503
    store.fail("reset", requests=1)
    with pytest.raises((ConnectionResetError, http.client.IncompleteRead)):
        get(url, path)
    store.fail("stall", requests=1)
    with pytest.raises(socket.timeout):
        get(url, path, timeout=0.3)
    store.fail("refuse")
    with pytest.raises(ConnectionRefusedError):
        get(url, path)
    store.heal()
    assert get(url, path) == (200, b"x" * 100_000)
    assert dict(store.hits) == {"slow_down": 1, "reset": 1, "stall": 1}


def test_a_fault_keeps_to_its_requests_and_its_time(faulty_s3: tuple[str, FaultyStore]) -> None:
    url, store = faulty_s3

    store.fail("slow_down", requests=2, where="GET /bucket/one")
    found = [get(url, path)[0] for path in ("/bucket/one", "/bucket/two", "/bucket/one", "/bucket/one")]
    assert [status == 503 for status in found] == [True, False, True, False]
    store.fail("refuse", seconds=0.2)
    with pytest.raises(ConnectionRefusedError):
        get(url, "/bucket/two")
    assert until_answered(url) != 503
