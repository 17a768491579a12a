"""Hints in requests: exact colors of regions in every style and output, and errors of one line."""

import base64
import io
import json
import zipfile

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from animediffusion.serve.api.app import create_app

FACE, EYE = (60, 60), (48, 40)
"""Places in the fixture `sketch`, a face of 120 x 90 pixels."""
HINTS = json.dumps([{"x": FACE[0], "y": FACE[1], "color": "#20c040"}])
GREEN = (0x20, 0xC0, 0x40)


@pytest.fixture(scope="module")
def client(replica):
    with TestClient(create_app(replica)) as client:
        yield client


def post(client, files, *, path="/v1/colorize", **data):
    """The answer to a request with one seed; hints in bytes are sent as a file."""
    hints = data.get("hints")
    if isinstance(hints, bytes):
        files = {**files, "hints": ("hints", data.pop("hints"))}
    return client.post(path, files=files, data={"seed": "1", **data})


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def layers(client, files, **data) -> dict[str, np.ndarray]:
    body = post(client, files, output="layers", **data).json()
    return {name: pixels(base64.b64decode(body[name])) for name in ("image", "flats", "labels", "lines")}


@pytest.mark.parametrize("style", ["flat", "shaded", "painted"])
def test_the_region_of_a_hint_gets_its_exact_color_and_no_other_region_changes(client, files, sketch, style):
    before, after = layers(client, files, style=style), layers(client, files, style=style, hints=HINTS)
    inside = before["labels"] == before["labels"][FACE[1], FACE[0]]
    assert (before["labels"] == after["labels"]).all()
    assert (after["flats"][inside] == GREEN).all()
    assert (after["flats"] == before["flats"])[~inside].all()
    assert np.abs(after["image"].astype(int) - before["image"])[~inside].max() <= 1
    assert not inside[EYE[1], EYE[0]]
    assert (after["lines"] == sketch).all()


def test_the_shading_stays_under_another_color(client, files):
    def shading(**data):
        return post(client, files, output="layers", style="shaded", **data).json()["shading"]

    assert shading() == shading(hints=HINTS)


@pytest.mark.parametrize("style", ["flat", "shaded", "painted"])
def test_every_output_has_the_color_of_a_hint(client, files, sketch, style):
    def made(output):
        return post(client, files, output=output, style=style, hints=HINTS).content

    image = pixels(made("image")).astype(int)
    assert (image == layers(client, files, style=style, hints=HINTS)["image"]).all()
    assert tuple(pixels(made("flat"))[FACE[1], FACE[0]]) == GREEN
    layer = Image.open(io.BytesIO(made("color_layer")))
    white = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    assert np.abs(np.asarray(white) / 255 * sketch - image).max() <= 2
    with zipfile.ZipFile(io.BytesIO(made("ora"))) as archive:
        assert (pixels(archive.read("mergedimage.png"))[..., :3] == image).all()
    assert (pixels(made("psd"))[..., :3] == image).all()


def test_hints_come_as_text_as_a_file_and_as_strokes(client, files):
    strokes = np.zeros((90, 120, 4), np.uint8)
    strokes[FACE[1] - 1 : FACE[1] + 2, FACE[0] - 1 : FACE[0] + 2] = (*GREEN, 255)
    buffer = io.BytesIO()
    Image.fromarray(strokes).save(buffer, "PNG")
    ways = [post(client, files, style="flat", hints=hints) for hints in (HINTS, HINTS.encode(), buffer.getvalue())]
    assert len({way.content for way in ways}) == 1
    plain = post(client, files, style="flat", hints="")
    assert plain.status_code == 200
    assert plain.content != ways[0].content


@pytest.mark.parametrize(
    ("hints", "found"),
    [
        ("red", "is not JSON"),
        ("[]", "contains no hint"),
        ('[{"x": 120, "y": 1, "color": "#ff0000"}]', "hint 1 at 120, 1 is outside of the drawing"),
        ('[{"x": 1, "y": 1, "color": "reddish"}]', 'hint 1 has the color "reddish"'),
        (b"", "is empty"),
        (b"\x89PNG\r\n\x1a\n", "is cut off"),
    ],
)
def test_bad_hints_are_named_before_the_network_runs(client, files, hints, found, monkeypatch):
    monkeypatch.setattr("animediffusion.serve.replica.replica.Replica.colorize", None)
    monkeypatch.setattr("animediffusion.serve.replica.replica.Replica.stream", None)
    for path in ("/v1/colorize", "/v1/colorize/stream"):
        response = post(client, files, path=path, hints=hints)
        assert response.status_code == 422, response.text
        [error] = response.json()["errors"]
        assert (error["field"], error["found"][: len(found)]) == ("hints", found)


def test_hints_need_the_size_of_the_drawing(client, files):
    response = post(client, files, hints=HINTS, size="model")
    assert response.status_code == 422
    assert response.json()["detail"] == "hints: given with size model; choose size native"
