"""The doubt about a picture, and what an answer says of hints."""

import io
import json

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from animediffusion.serve.api.app import create_app

HINTS = json.dumps([{"x": 60, "y": 60, "color": "#20c040"}])


@pytest.fixture(scope="module")
def client(replica):
    with TestClient(create_app(replica)) as client:
        yield client


def gray(response) -> np.ndarray:
    assert (response.status_code, response.headers["content-type"]) == (200, "image/png")
    image = Image.open(io.BytesIO(response.content))
    assert image.mode == "L"
    return np.asarray(image)


def test_the_doubt_is_a_gray_picture_of_the_drawings_size(client, files, sketch):
    def doubt(**data):
        return gray(client.post("/v1/colorize", files=files, data={"seed": "1", "output": "doubt", **data}))

    assert doubt().shape == sketch.shape[:2]
    assert np.ptp(doubt()) > 0
    assert doubt(size="model").shape == (32, 32)


def test_a_stream_ends_with_the_doubt(client, files):
    body = client.post("/v1/colorize/stream", files=files, data={"seed": "1", "output": "doubt"}).text
    result = json.loads(body.split("event: result")[1].split("data: ")[1].splitlines()[0])
    assert sorted(result) == ["image", "model_version", "request_id", "seed"]


def test_an_answer_says_how_far_the_colors_of_hints_went(client, files):
    learned = HINTS.replace("}", ', "learned": true}')
    given = ({}, {"hints": HINTS}, {"hints": learned})
    found = [client.post("/v1/colorize", files=files, data={"seed": "1", **data}).headers for data in given]
    assert [headers.get("x-hints") for headers in found] == [None, "exact", "spread"]
