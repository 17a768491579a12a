"""Corrections of pictures over HTTP: the application in this process, with a store in a folder or on an S3 server."""

import io
import json
import time
import uuid
import zipfile

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from animediffusion.platform.api_keys import Keyring
from animediffusion.platform.corrections import store as store_module
from animediffusion.platform.corrections.counts import VersionCounts
from animediffusion.platform.corrections.store import Corrections
from animediffusion.platform.errors import StoreFailedError
from animediffusion.platform.images.codec import encode_png
from animediffusion.platform.storage import storage
from animediffusion.serve.api import request_keeper
from animediffusion.serve.api.app import create_app
from animediffusion.serve.api.corrections import MAX_PER_MINUTE, RateLimit
from animediffusion.serve.api.problems import ProblemError

EYE = (48, 40)
"""A place in the fixture `sketch`."""


def decoded(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)))


def problem(response, status: int) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    return response.json()


class Studio:
    """A server that takes corrections, and what its clients do."""

    def __init__(self, client: TestClient, store: Corrections, files) -> None:
        self.client, self.store, self.files = client, store, files

    def color(self, request_id: str, key: str = "", **data: str):
        headers = {"X-Request-Id": request_id, **self.login(key)}
        response = self.client.post("/v1/colorize", files=self.files, data={"seed": "1", **data}, headers=headers)
        assert response.status_code == 200, response.text
        return response

    def correct(self, request_id: str, corrected: bytes | None = None, key: str = "", **data: str):
        files = {} if corrected is None else {"corrected": ("c.png", corrected)}
        fields = {"request_id": (None, request_id), **{name: (None, value) for name, value in data.items()}}
        return self.client.post("/v1/corrections", files={**fields, **files}, headers=self.login(key))

    def login(self, key: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {key}"} if key else {}

    def only_record(self) -> tuple[dict, dict[str, bytes]]:
        [entry] = self.store.entries()
        with zipfile.ZipFile(io.BytesIO(storage.read_bytes(storage.join(self.store.uri, entry.path)))) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        return json.loads(files.pop("record.json")), files

    def wait_for(self, answered: int, corrected: int) -> None:
        """Wait until the store has these counts of version 3; the server adds them after a while."""
        wanted, end = {"3": VersionCounts(answered, corrected)}, time.monotonic() + 30
        while self.store.counts() != wanted and time.monotonic() < end:
            time.sleep(0.05)
        assert self.store.counts() == wanted


@pytest.fixture(autouse=True)
def _count_soon(monkeypatch):
    monkeypatch.setattr(request_keeper, "COUNT_S", 0.1)


@pytest.fixture
def studio(replica, files, tmp_path):
    store = Corrections(str(tmp_path / "store"))
    with TestClient(create_app(replica, corrections=store.uri)) as client:
        yield Studio(client, store, files)


def repainted(data: bytes) -> bytes:
    """The picture with another color in a corner."""
    pixels = decoded(data)
    pixels[:20, :30] = (12, 200, 90)
    return encode_png(pixels)


def test_a_corrected_picture_becomes_a_record_with_all_that_made_it(studio, sketch, reference):
    answer = studio.color("one", style="shaded", palette="none")
    corrected = repainted(answer.content)
    response = studio.correct("one", corrected)
    assert response.status_code == 201
    body = response.json()
    assert (body["request_id"], body["model_version"], body["state"]) == ("one", "3", "stored")
    record, files = studio.only_record()
    assert record["format"] == "animediffusion-correction-1"
    assert (record["kind"], record["key"], record["width"], record["height"]) == ("picture", "", 120, 90)
    assert {name: record["options"][name] for name in ("seed", "style", "palette")} == {
        "seed": 1,
        "style": "shaded",
        "palette": "none",
    }
    assert (decoded(files["sketch.png"]) == sketch).all()
    assert (decoded(files["reference-1.png"]) == reference).all()
    assert (decoded(files["result.png"]) == decoded(answer.content)).all()
    assert (decoded(files["corrected.png"]) == decoded(corrected)).all()
    difference = (decoded(corrected) != decoded(answer.content)).any(axis=2).mean()
    assert record["changed"] == body["changed"] == pytest.approx(difference, abs=0.01)


def test_a_correction_waits_until_its_request_is_in_a_slow_store(studio, monkeypatch):
    keep = Corrections.keep

    def slowly(store, request):
        time.sleep(2.5)
        keep(store, request)

    monkeypatch.setattr(Corrections, "keep", slowly)
    answer = studio.color("one")
    assert studio.correct("one", repainted(answer.content)).status_code == 201


def test_hints_alone_make_the_picture_with_these_hints(studio):
    hints = json.dumps([{"x": EYE[0], "y": EYE[1], "color": "#3264c8", "scope": "whole"}])
    studio.color("one")
    assert studio.correct("one", hints=hints).status_code == 201
    record, files = studio.only_record()
    asked = studio.color("two", hints=hints)
    assert (decoded(files["corrected.png"]) == decoded(asked.content)).all()
    assert record["kind"] == "hints"
    assert record["hints"] == [{"x": 48, "y": 40, "color": "#3264c8", "scope": "whole", "learned": False}]


def test_off_it_says_how_the_operator_turns_corrections_on(replica):
    with TestClient(create_app(replica)) as client:
        body = problem(client.post("/v1/corrections", files={"request_id": (None, "one")}), 404)
    assert "ANIMEDIFFUSION_CORRECTIONS" in body["detail"]


def test_the_stream_says_that_its_picture_can_be_corrected(studio, replica, files):
    def result(client: TestClient) -> dict:
        text = client.post("/v1/colorize/stream", files=files, data={"output": "layers"}).text
        return json.loads(text.strip().split("\n\n")[-1].partition("data: ")[2])

    answer = result(studio.client)
    assert answer["correctable"] is True
    hints = json.dumps([{"x": EYE[0], "y": EYE[1], "color": "#3264c8"}])
    assert studio.correct(answer["request_id"], hints=hints).status_code == 201
    with TestClient(create_app(replica)) as client:
        assert "correctable" not in result(client)


def test_a_picture_at_the_models_size_is_corrected_at_the_size_of_the_drawing(studio):
    studio.color("one", size="model")
    wrong = problem(studio.correct("one", encode_png(np.zeros((32, 32, 3), np.uint8))), 422)
    assert wrong["errors"] == [
        {"field": "corrected", "found": "is 32 x 32 pixels", "allowed": "the size of the drawing, 120 x 90"}
    ]
    assert studio.correct("one", encode_png(np.full((90, 120, 3), 77, np.uint8))).status_code == 201
    record, files = studio.only_record()
    assert decoded(files["result.png"]).shape == (90, 120, 3)
    assert record["options"]["size"] == "model"


def test_files_as_palette_and_hints_are_kept_with_the_request(studio, sketch):
    strokes = np.zeros((90, 120, 4), np.uint8)
    strokes[36:44, 44:52] = (50, 100, 200, 255)
    extra = {"hints": ("h.png", encode_png(strokes)), "palette": ("p.gpl", b"GIMP Palette\n10 20 30 a\n200 90 90 b\n")}
    studio.files = {**studio.files, **extra}
    answer = studio.color("one")
    assert studio.correct("one", repainted(answer.content)).status_code == 201
    record, files = studio.only_record()
    assert (decoded(files["result.png"]) == decoded(answer.content)).all()
    assert (record["options"]["hints"], record["options"]["palette"]) == ("file", "file")


def test_the_same_correction_is_one_record_and_another_one_replaces_it(studio):
    answer = studio.color("one")
    studio.color("two")
    first, second = repainted(answer.content), encode_png(np.full((90, 120, 3), 77, np.uint8))
    assert [studio.correct("one", first).json()["state"] for _ in range(2)] == ["stored", "known"]
    again = studio.correct("one", second)
    assert (again.status_code, again.json()["state"]) == (200, "replaced")
    assert (decoded(studio.only_record()[1]["corrected.png"]) == 77).all()
    studio.wait_for(answered=2, corrected=1)


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        (
            {"request_id": "two"},
            404,
            "two is unknown: it has another key, was answered more than 7 days ago, or was not kept",
        ),
        ({"request_id": "../../etc"}, 422, "1 to 64"),
        ({"request_id": None}, 400, "the field request_id is missing"),
        ({"corrected": None}, 400, "the correction is empty; send the file corrected"),
        ({"corrected": b"GIF89a..."}, 415, "corrected"),
        ({"corrected": encode_png(np.zeros((90, 121, 3), np.uint8))}, 422, "the size of the drawing, 120 x 90"),
        ({"corrected": None, "hints": "[]"}, 422, "contains no hint"),
        ({"corrected": None, "hints": '[{"x": 500, "y": 1, "color": "#000000"}]'}, 422, "outside of the drawing"),
        ({"colour": "red"}, 422, "unknown field"),
    ],
)
def test_a_wrong_correction_gets_one_line_and_changes_nothing(studio, fields, status, words):
    answer = studio.color("one")
    values = {"request_id": "one", "corrected": repainted(answer.content), **fields}
    files = {
        name: ("c.png", value) if isinstance(value, bytes) else (None, value)
        for name, value in values.items()
        if value is not None
    }
    body = problem(studio.client.post("/v1/corrections", files=files), status)
    assert words in json.dumps(body)
    assert "\n" not in body["detail"]
    assert ("errors" in body) == (status == 422)
    assert studio.store.entries() == []


def test_what_changes_nothing_is_not_a_correction(studio):
    answer = studio.color("one", style="painted")
    body = problem(studio.correct("one", answer.content), 422)
    assert body["errors"][0]["field"] == "corrected"
    buffer = io.BytesIO()
    Image.fromarray(decoded(answer.content)).save(buffer, "JPEG", quality=90)
    problem(studio.correct("one", buffer.getvalue()), 422)
    assert studio.store.entries() == []


def test_uploads_leave_no_metadata_in_the_record(studio):
    answer = studio.color("one")
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    buffer = io.BytesIO()
    Image.fromarray(decoded(repainted(answer.content))).save(buffer, "PNG", exif=exif)
    assert b"taken at home" in buffer.getvalue()
    assert studio.correct("one", buffer.getvalue()).status_code == 201
    assert not any(b"taken at home" in data for data in studio.only_record()[1].values())


def test_a_key_reaches_only_its_own_requests(replica, files, tmp_path, key_file, key):
    other = key_file.create("other")
    store = Corrections(str(tmp_path / "store"))
    with TestClient(create_app(replica, keyring=Keyring(key_file.uri), corrections=store.uri)) as client:
        studio = Studio(client, store, files)
        corrected = repainted(studio.color("one", key).content)
        problem(studio.correct("one", corrected), 401)
        problem(studio.correct("one", corrected, key=other), 404)
        assert studio.correct("one", corrected, key=key).status_code == 201
        assert studio.only_record()[0]["key"] == "studio"
        assert key not in json.dumps(studio.only_record()[0])
        # The same id, chosen by another client, is another request.
        studio.color("one", other)
        assert studio.correct("one", corrected, key=other).status_code == 201
    assert [entry.path for entry in store.entries()] == [
        "corrections/other/3/one.zip",
        "corrections/studio/3/one.zip",
    ]
    key_file.revoke("other")


def test_an_expired_request_cannot_be_corrected_but_stays_counted(studio, monkeypatch):
    corrected = repainted(studio.color("one").content)
    end = time.monotonic() + 30
    while studio.store.find("", "one") is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    monkeypatch.setattr(store_module, "KEEP_S", -1)
    problem(studio.correct("one", corrected), 404)
    assert studio.store.clean() == 1
    assert studio.store.find("", "one") is None
    studio.wait_for(answered=1, corrected=0)


def test_a_map_of_doubt_is_no_picture_to_correct(studio):
    studio.client.post("/v1/colorize", files=studio.files, data={"output": "doubt"}, headers={"X-Request-Id": "map"})
    studio.color("one")
    studio.wait_for(answered=1, corrected=0)


def test_several_servers_share_a_store_on_s3(replica, files, moto_server):
    store = Corrections(f"s3://bucket/{uuid.uuid4().hex}")
    apps = [create_app(replica, corrections=store.uri) for _ in range(2)]
    with TestClient(apps[0]) as one, TestClient(apps[1]) as other:
        answered, corrects = Studio(one, store, files), Studio(other, store, files)
        answers = [answered.color(f"request-{number}") for number in range(3)]
        corrects.color("elsewhere")
        body = corrects.correct("request-1", repainted(answers[1].content)).json()
        assert body["state"] == "stored"
        assert answered.correct("request-1", repainted(answers[1].content)).json()["state"] == "known"
        assert answered.only_record()[0]["request_id"] == "request-1"
    assert store.counts() == {"3": VersionCounts(answered=4, corrected=1)}
    assert store.delete("") == (1, 4)
    assert store.entries() == []


def test_a_store_that_fails_delays_and_breaks_no_answer(replica, files, tmp_path, monkeypatch):
    store = Corrections(str(tmp_path / "store"))
    with TestClient(create_app(replica, corrections=store.uri)) as client:
        studio = Studio(client, store, files)
        corrected = repainted(studio.color("one").content)

        def fail(*_):
            time.sleep(2)
            raise StoreFailedError("s3://bucket", "does not answer", "try again")

        with monkeypatch.context() as patch:
            patch.setattr(Corrections, "keep", fail)
            patch.setattr(Corrections, "find", fail)
            started = time.monotonic()
            for number in range(8):  # More than there are threads.
                studio.color(f"lost-{number}")
            assert time.monotonic() - started < 8 * 2
            body = problem(studio.correct("one", corrected), 503)
            assert "try again" in body["detail"]
        assert studio.correct("one", corrected).status_code == 201
        studio.wait_for(answered=9, corrected=1)  # All were answered, although eight are not kept.


def test_a_key_has_a_number_of_corrections_in_a_minute():
    now = 0.0
    limit = RateLimit(MAX_PER_MINUTE, lambda: now)
    for _ in range(MAX_PER_MINUTE):
        limit.take("studio")
    with pytest.raises(ProblemError) as error:
        limit.take("studio")
    assert (error.value.status, error.value.headers) == (429, {"Retry-After": "61"})
    limit.take("other")
    now = 60.0
    limit.take("studio")
