"""Corrections of pictures over HTTP: the application in this process, with a store in a folder or on an S3 server."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from animediffusion.platform.corrections.store import Corrections
from animediffusion.platform.images.codec import encode_png
from animediffusion.serve.api.app import create_app

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
        with zipfile.ZipFile(Path(self.store.uri) / entry.path) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        return json.loads(files.pop("record.json")), files


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
