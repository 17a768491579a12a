"""Raw multipart bodies: each is read whole and exactly, or refused with the reason."""

import gzip
from tempfile import SpooledTemporaryFile
from typing import get_args

import pytest
import starlette.formparsers
from fastapi.testclient import TestClient

from animediffusion.models.diffusion.sampler import SAMPLERS
from animediffusion.models.sampler_options import ALLOWED, SamplerName
from animediffusion.serve.api.app import create_app

BOUNDARY = "b1"
HEADERS = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
END = f"--{BOUNDARY}--\r\n".encode()


@pytest.fixture(scope="module")
def client(replica):
    with TestClient(create_app(replica)) as client:
        yield client


def part(name: str, data: bytes, filename: str | None = None) -> bytes:
    disposition = f'form-data; name="{name}"' + (f'; filename="{filename}"' if filename else "")
    return f"--{BOUNDARY}\r\nContent-Disposition: {disposition}\r\n\r\n".encode() + data + b"\r\n"


@pytest.fixture(scope="module")
def parts(files) -> bytes:
    """The two pictures of a good form, then a text field."""
    return part("sketch", files["sketch"][1], "s") + part("reference", files["reference"][1], "r") + part("seed", b"1")


def post(client: TestClient, body: bytes, path: str = "/v1/colorize", **headers: str):
    return client.post(path, content=body, headers={**HEADERS, **headers})


def refused(response, status: int) -> dict:
    assert response.status_code == status, response.content[:300]
    assert response.headers["content-type"] == "application/problem+json"
    return response.json()


def test_a_body_that_is_cut_off_anywhere_is_answered_with_400(client, parts):
    whole = parts + END
    near_the_end = range(len(parts) - 60, len(whole) - len("\r\n"))
    for end in (0, 1, 5, 40, len(parts) // 2, *near_the_end):
        assert "ends early" in refused(post(client, whole[:end]), 400)["detail"], end


@pytest.mark.parametrize(
    "end", [b"", part("reference", b"r", "r")[:-9], part("seed", b"1") + b"--b1XX", part("sead", b"1") + END]
)
def test_a_rejected_body_leaves_no_temporary_file_open(client, monkeypatch, end):
    files: list[SpooledTemporaryFile[bytes]] = []

    def new_file(**options: int) -> SpooledTemporaryFile[bytes]:
        files.append(SpooledTemporaryFile(**options))  # noqa: SIM115 - the server has to close it
        return files[-1]

    monkeypatch.setattr(starlette.formparsers, "SpooledTemporaryFile", new_file)
    assert post(client, part("sketch", bytes(2**20 + 1), "s") + end).is_client_error
    assert files
    assert all(file.closed for file in files)


def test_a_body_whose_last_boundary_is_another_is_answered_with_400(client, parts):
    for end in (b"", b"--b1\r\n", b"--b1-\r\n", b"--b2--\r\n", b"--b1 --\r\n"):
        refused(post(client, parts + end), 400)


@pytest.mark.parametrize("end", [END, END[:-2], END[:-1], END + b"an epilogue\r\n"])
def test_a_complete_body_is_taken_however_it_ends(client, parts, end):
    response = post(client, parts + end)
    assert response.headers["x-seed"] == "1", response.content[:300]


@pytest.mark.parametrize(
    "media_type",
    [
        f'multipart/form-data; boundary="{BOUNDARY}"',
        f"Multipart/Form-Data; Boundary={BOUNDARY}",
        f"multipart/form-data; charset=utf-8; boundary={BOUNDARY}",
    ],
)
def test_a_boundary_may_be_written_in_every_valid_way(client, parts, media_type):
    assert post(client, parts + END, **{"Content-Type": media_type}).headers["x-seed"] == "1"


def test_what_is_not_multipart_is_answered_with_400_and_a_byte(client, parts):
    assert "byte 0 " in refused(post(client, b"a preamble\r\n" + parts + END), 400)["detail"]
    line_feeds = (parts + END).replace(b"\r\n", b"\n")
    assert f"byte {len(BOUNDARY) + 2} " in refused(post(client, line_feeds), 400)["detail"]
    broken = parts + b"--b1\r\nno colon\r\n\r\n\r\n" + END
    first = len(parts) + len("--b1\r\n")
    place = int(refused(post(client, broken), 400)["detail"].partition("byte ")[2].partition(" ")[0])
    assert first <= place <= first + len("no colon\r\n")
    refused(post(client, parts + END, **{"Content-Type": f"multipart/form-datax; boundary={BOUNDARY}"}), 400)


@pytest.mark.parametrize("path", ["/v1/colorize", "/v1/colorize/stream"])
@pytest.mark.parametrize("query", ["seed=5", "num_inference_steps=3&seed=1", "seed=", "seed", "speed=9"])
def test_a_parameter_in_the_address_is_answered_with_422(client, parts, path, query):
    (error,) = refused(post(client, parts + END, f"{path}?{query}"), 422)["errors"]
    assert error["field"] == query.partition("=")[0]
    assert error["found"] == "in the address"
    assert "field of the form" in error["allowed"]


@pytest.mark.parametrize("header", ["X-Seed", "seed", "Num-Inference-Steps", "X-Output"])
def test_a_parameter_in_a_header_is_answered_with_422(client, parts, header):
    (error,) = refused(post(client, parts + END, **{header: "5"}), 422)["errors"]
    assert error["found"] == f"in the header {header.lower()}"


def test_a_compressed_body_is_answered_with_415_by_its_header(client, parts):
    response = post(client, gzip.compress(parts + END), **{"Content-Encoding": "gzip"})
    assert "Content-Encoding 'gzip'" in refused(response, 415)["detail"]
    assert response.headers["accept-encoding"] == "identity"
    assert post(client, parts + END, **{"Content-Encoding": "identity"}).status_code == 200


def test_a_field_is_given_once_and_is_known(client, parts, files):
    sketch = part("sketch", files["sketch"][1], "s")
    for more in (sketch, part("sketch", b"text"), part("seed", b"2"), part("seed", b"1", "file")):
        (error,) = refused(post(client, parts + more + END), 422)["errors"]
        assert error["found"] == "given more than once"
    for name in ("_charset_", "sketch[]", "Seed", "seed "):
        (error,) = refused(post(client, parts + part(name, b"1") + END), 422)["errors"]
        assert error["found"] == "unknown field"


def test_a_reference_is_given_up_to_four_times(client, parts, files):
    again = part("reference", files["reference"][1], "r")
    one, four = (post(client, parts + count * again + END) for count in (0, 3))
    assert (one.status_code, four.status_code) == (200, 200)
    (error,) = refused(post(client, parts + 4 * again + END), 422)["errors"]
    assert error == {"field": "reference", "found": "5 pictures", "allowed": "1 to 4 pictures"}


def test_a_picture_without_a_filename_gets_an_error_that_says_how_to_send_it(client, files):
    detail = refused(post(client, part("sketch", files["sketch"][1] * 200) + END), 400)["detail"]
    assert "send pictures as files, each with a filename" in detail


@pytest.mark.parametrize(
    "value", ["\u0663", "1e3", "1e1", "0x10", "7.5", "5.0", "null", "\uff11", "1_0", " 5 ", "5\n", "+5", "9" * 4000]
)
@pytest.mark.parametrize("field", ["seed", "num_inference_steps"])
def test_a_whole_number_is_written_in_plain_digits(client, files, field, value):
    (error,) = refused(client.post("/v1/colorize", files=files, data={field: value}), 422)["errors"]
    assert (error["field"], error["found"]) == (field, value[:80])
    assert error["allowed"].startswith("a whole number from ")


@pytest.mark.parametrize("value", ["1_0", " 5 ", "+5", "1,5", "inf", "nan", "1e999", "0x1p3", "\uff11", "."])
def test_a_number_is_written_in_plain_decimals(client, files, value):
    (error,) = refused(client.post("/v1/colorize", files=files, data={"guidance_scale": value}), 422)["errors"]
    assert error == {"field": "guidance_scale", "found": value, "allowed": "a number from 0 to 20"}


@pytest.mark.parametrize("value", ["1", "1.5", "2.", ".5", "1e1", "2.5E-1"])
def test_every_usual_way_to_write_a_decimal_is_accepted(client, files, value):
    assert client.post("/v1/colorize", files=files, data={"guidance_scale": value}).status_code == 200


def test_all_wrong_fields_are_named_together(client, files):
    data = {"seed": "x", "num_inference_steps": "0", "size": "huge"}
    errors = refused(client.post("/v1/colorize", files=files, data=data), 422)["errors"]
    assert {error["field"] for error in errors} == set(data)


def test_the_form_and_the_messages_name_the_samplers_that_exist():
    assert get_args(SamplerName) == SAMPLERS
    assert all(name in ALLOWED["sampler"] for name in SAMPLERS)


def test_an_empty_field_is_one_that_was_left_out(client, files):
    response = client.post("/v1/colorize", files=files, data={"seed": "", "num_inference_steps": "", "size": ""})
    assert response.status_code == 200
    assert response.headers["x-seed"].isdigit()


@pytest.mark.parametrize("coding", ["Content-Transfer-Encoding: base64", "content-encoding: gzip"])
def test_a_part_that_is_encoded_is_answered_with_415(client, files, coding):
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="seed"\r\n{coding}\r\n\r\n'.encode()
    pictures = part("sketch", files["sketch"][1], "s") + part("reference", files["reference"][1], "r")
    detail = refused(post(client, pictures + head + b"12\r\n" + END), 415)["detail"]
    assert detail.endswith("of seed is not supported; send its bytes as they are")
    plain = head.replace(coding.encode(), b"Content-Transfer-Encoding: Binary")
    assert post(client, pictures + plain + b"12\r\n" + END).headers["x-seed"] == "12"


@pytest.mark.parametrize("charset", ["undefined", "punycode"])
def test_a_charset_that_cannot_be_read_is_the_clients_mistake(client, parts, charset):
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}; charset={charset}"}
    response = client.post("/v1/colorize", content=parts + END, headers=headers)
    assert "charset" in refused(response, 400)["detail"]


def test_a_second_content_encoding_counts_as_well(client, parts):
    headers = [
        ("Content-Type", HEADERS["Content-Type"]),
        ("Content-Encoding", "identity"),
        ("Content-Encoding", "gzip"),
    ]
    assert "gzip" in refused(client.post("/v1/colorize", content=parts + END, headers=headers), 415)["detail"]
