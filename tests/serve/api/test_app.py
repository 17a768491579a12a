import asyncio
import base64
import io
import json
import zipfile
import zlib

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from animediffusion.platform.errors import BusyError, DeadlineError, NoModelError, UnavailableError
from animediffusion.platform.images.codec import encode_png
from animediffusion.serve.api.app import create_app
from animediffusion.serve.replica.replica import Replica

PROBLEM = "application/problem+json"


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def decoded(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)))


@pytest.fixture(scope="module")
def client(replica):
    with TestClient(create_app(replica, max_body_bytes=2_000_000)) as client:
        yield client


class Broken(Replica):
    """A replica whose every picture fails in one way."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.failure = error

    async def colorize(self, job):  # noqa: ARG002
        raise self.failure


def check_problem(response, status: int) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == PROBLEM
    body = response.json()
    assert {"type", "title", "status", "detail", "request_id"} <= set(body)
    assert body["status"] == status
    assert body["request_id"] == response.headers["x-request-id"]
    return body


def test_a_picture_has_the_size_of_its_sketch_and_says_how_it_was_made(client, files, sketch):
    response = client.post("/v1/colorize", files=files, data={"seed": "7"}, headers={"X-Request-Id": "my-1"})
    assert response.status_code == 200
    assert response.headers["content-type"] == "image/png"
    assert response.headers["x-model-version"] == "3"
    assert response.headers["x-seed"] == "7"
    assert response.headers["x-request-id"] == "my-1"
    assert decoded(response.content).shape == sketch.shape


def test_the_same_seed_gives_the_same_picture_and_another_seed_another(client, files):
    first, second, other = (
        client.post("/v1/colorize", files=files, data={"seed": seed}).content for seed in ("7", "7", "8")
    )
    assert first == second != other


def test_without_a_seed_the_answer_tells_the_one_it_drew(client, files):
    response = client.post("/v1/colorize", files=files)
    again = client.post("/v1/colorize", files=files, data={"seed": response.headers["x-seed"]})
    assert again.content == response.content


def test_the_color_layer_times_the_sketch_is_the_picture(client, files, sketch):
    picture = decoded(client.post("/v1/colorize", files=files, data={"seed": "1"}).content)
    data = {"seed": "1", "output": "color_layer"}
    layer = Image.fromarray(decoded(client.post("/v1/colorize", files=files, data=data).content))
    assert layer.mode == "RGBA"
    white = Image.new("RGBA", layer.size, "white")
    product = np.asarray(Image.alpha_composite(white, layer).convert("RGB")) / 255 * sketch
    assert np.abs(product - picture).max() <= 2


def test_the_stream_returns_picture_and_layer_together(client, files):
    def result(**data: str) -> dict:
        text = client.post("/v1/colorize/stream", files=files, data={"seed": "1", **data}).text
        name, found = text.strip().split("\n\n")[-1].split("\n")
        assert name == "event: result"
        return json.loads(found.partition(": ")[2])

    layers = result(output="layers", style="flat")
    alone = client.post("/v1/colorize", files=files, data={"seed": "1", "style": "flat", "output": "layers"}).json()
    assert {name: layers[name] for name in alone} == alone
    assert {*layers} - {*alone} == {"model_version", "seed", "request_id"}
    psd = client.post("/v1/colorize", files=files, data={"seed": "1", "output": "psd"}).content
    assert base64.b64decode(result(output="psd")["image"]) == psd
    both, image, layer = result(output="both"), result(), result(output="color_layer")
    assert (both["image"], both["color_layer"]) == (image["image"], layer["image"])
    assert {*both} - {*image} == {"color_layer"}
    body = check_problem(client.post("/v1/colorize", files=files, data={"output": "both"}), 422)
    assert "stream" in body["errors"][0]["allowed"]


def test_the_models_own_size_can_be_asked_for(client, files):
    response = client.post("/v1/colorize", files=files, data={"size": "model"})
    assert decoded(response.content).shape == (32, 32, 3)


def png(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def colored(client, files, **data: str):
    response = client.post("/v1/colorize", files=files, data={"seed": "1", **data})
    assert response.status_code == 200, response.text
    assert response.headers["x-style"] == data.get("style", "flat")
    return response


@pytest.mark.parametrize("style", ["flat", "shaded", "painted"])
def test_the_layers_give_the_image_and_name_the_regions(client, files, sketch, style):
    response = colored(client, files, output="layers", style=style)
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert response.headers["x-regions"] == str(len(body["regions"]))
    layers = {name: png(base64.b64decode(data)) for name, data in body.items() if name != "regions" and data}
    image = png(colored(client, files, style=style).content).astype(int)
    assert (layers["image"] == image).all()
    labels = layers["labels"]
    assert (labels.dtype, labels.shape) == (np.uint16, sketch.shape[:2])
    assert [region["id"] for region in body["regions"]] == list(range(1, labels.max() + 1))
    for region in body["regions"]:
        assert set(region) == {"id", "name", "color", "area", "box", "whole"}
        inside = labels == region["id"]
        left, top, right, bottom = region["box"]
        assert inside.sum() == inside[top:bottom, left:right].sum() == region["area"]
        assert {"#{:02x}{:02x}{:02x}".format(*color) for color in layers["flats"][inside]} == {region["color"]}
    merged = layers["flats"] / 255
    if style == "flat":
        assert (body["shading"], body["highlights"]) == (None, None)
    else:
        merged = merged * layers["shading"] / 255
    if "highlights" in layers:
        merged = 1 - (1 - merged) * (1 - layers["highlights"] / 255)
    assert np.abs(merged * layers["lines"] - image).max() <= 2
    assert (layers["lines"] == sketch).all()


@pytest.mark.parametrize("style", ["flat", "shaded", "painted"])
def test_files_with_layers_show_the_image(client, files, style):
    image = png(colored(client, files, style=style).content)
    for output, kind in (("ora", "image/openraster"), ("psd", "image/vnd.adobe.photoshop")):
        response = colored(client, files, output=output, style=style)
        assert response.headers["content-type"] == kind
        assert int(response.headers["x-regions"]) > 0
        data = response.content
        if output == "ora":
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                data = archive.read("mergedimage.png")
        assert (png(data) == image).all()


@pytest.mark.parametrize("style", ["flat", "shaded"])
def test_the_color_layer_of_a_style_times_the_sketch_is_its_image(client, files, sketch, style):
    layer = Image.open(io.BytesIO(colored(client, files, output="color_layer", style=style).content))
    assert layer.mode == "RGBA"
    white = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    image = png(colored(client, files, style=style).content)
    assert np.abs(np.asarray(white) / 255 * sketch - image).max() <= 2


def test_flat_colors_are_those_of_the_palette(client, files):
    gimp = b"GIMP Palette\nName: two\n#\n 10  20  30\tink\n200 100  50\tclay\n"
    with_file = {**files, "palette": ("two.gpl", gimp)}
    by_text = colored(client, files, output="flat", style="flat", palette="#0a141e,#C86432", background="reference")
    by_file = colored(client, with_file, output="flat", style="flat", background="reference")
    assert by_text.content == by_file.content
    assert {tuple(color) for color in png(by_text.content).reshape(-1, 3)} <= {(10, 20, 30), (200, 100, 50)}


def test_the_default_style_is_flat(client, files):
    default, flat, painted = (colored(client, files, **data) for data in ({}, {"style": "flat"}, {"style": "painted"}))
    assert default.content == flat.content != painted.content
    assert default.headers["x-regions"] == flat.headers["x-regions"]
    assert "x-regions" not in painted.headers


def test_pictures_of_the_models_size_and_of_lines_that_enclose_nothing_are_painted(client, files):
    alone = np.full((40, 40, 3), 255, np.uint8)
    alone[20, 15:25] = 0
    for given, data in ((files, {"size": "model"}), ({**files, "sketch": ("a.png", encode_png(alone))}, {})):
        default, painted = (
            client.post("/v1/colorize", files=given, data={"seed": "1", **data, **style})
            for style in ({}, {"style": "painted"})
        )
        assert default.content == painted.content
        stream = client.post("/v1/colorize/stream", files=given, data={"seed": "1", **data})
        assert stream.headers["x-style"] == "painted"
        assert default.headers["x-style"] == painted.headers["x-style"] == "painted"


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ({"palette": "#12", "style": "flat"}, "palette"),
        ({"palette": ",", "style": "flat"}, "palette"),
        ({"palette": "#aabbcc", "style": "painted"}, "palette"),
        ({"background": "paper", "style": "painted"}, "background"),
        ({"background": "paper", "size": "model"}, "background"),
    ],
)
def test_a_palette_of_nothing_and_an_option_without_effect_are_answered_with_422(client, files, data, field):
    for path in ("/v1/colorize", "/v1/colorize/stream"):
        body = check_problem(client.post(path, files=files, data=data), 422)
        assert [set(error) for error in body["errors"]] == [{"field", "found", "allowed"}]
        assert body["errors"][0]["field"] == field
        assert "\n" not in body["detail"]


@pytest.mark.parametrize("data", [b"\0\1\2", b"GIMP Palette\n", b"ASEF", b"#aabbcc," * 200_000])
def test_a_file_that_is_no_palette_is_answered_with_422(client, files, data):
    response = client.post("/v1/colorize", files={**files, "palette": ("p", data)}, data={"style": "flat"})
    assert check_problem(response, 422)["errors"][0]["field"] == "palette"


def test_a_style_in_the_address_is_answered_with_422(client, files):
    response = client.post("/v1/colorize?style=flat", files=files)
    assert check_problem(response, 422)["errors"][0]["field"] == "style"


def test_all_settings_are_used(client, files):
    base = {"seed": "1"}
    changes = [{"num_inference_steps": "9"}, {"guidance_scale": "6.5"}, {"sampler": "heun"}, {}]
    pictures = {client.post("/v1/colorize", files=files, data={**base, **change}).content for change in changes}
    assert len(pictures) == len(changes)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_inference_steps", "0"),
        ("num_inference_steps", "101"),
        ("num_inference_steps", "four"),
        ("guidance_scale", "-1"),
        ("guidance_scale", "nan"),
        ("seed", "-1"),
        ("seed", str(2**32)),
        ("sampler", "magic"),
        ("output", "pdf"),
        ("size", "huge"),
        ("style", "oil"),
        ("background", "blue"),
    ],
)
def test_a_wrong_parameter_is_named_with_what_is_allowed(client, files, field, value):
    body = check_problem(client.post("/v1/colorize", files=files, data={field: value}), 422)
    (error,) = body["errors"]
    assert error["field"] == field
    assert error["found"] == value
    assert error["allowed"]


def test_an_unknown_field_is_answered_with_a_suggestion(client, files):
    body = check_problem(client.post("/v1/colorize", files=files, data={"outputs": "image"}), 422)
    assert body["errors"] == [{"field": "outputs", "found": "unknown field", "allowed": "did you mean output?"}]


def test_a_field_given_twice_is_answered_with_422(client, files):
    check_problem(client.post("/v1/colorize", files=files, data={"seed": ["1", "2"]}), 422)


@pytest.mark.parametrize("missing", ["sketch", "reference"])
def test_a_missing_file_is_a_bad_request(client, files, missing):
    rest = {name: file for name, file in files.items() if name != missing}
    assert missing in check_problem(client.post("/v1/colorize", files=rest), 400)["detail"]


def test_a_file_sent_as_text_is_a_bad_request(client, files):
    response = client.post("/v1/colorize", files={"sketch": files["sketch"]}, data={"reference": "blue"})
    check_problem(response, 400)


def test_a_body_that_is_not_a_form_is_a_bad_request(client):
    check_problem(client.post("/v1/colorize", json={"sketch": "?"}), 400)
    check_problem(client.post("/v1/colorize"), 400)
    check_problem(client.post("/v1/colorize", content=b"x", headers={"Content-Type": "multipart/form-data"}), 400)
    broken = {"Content-Type": "multipart/form-data; boundary=abc"}
    check_problem(client.post("/v1/colorize", content=b"no boundary here", headers=broken), 400)


def png_header(width: int, height: int) -> bytes:
    image = bytearray(encoded(np.zeros((1, 1), np.uint8)))
    image[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    image[29:33] = zlib.crc32(bytes(image[12:29])).to_bytes(4, "big")
    return bytes(image)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"hello, I am a text", 415),
        (b"", 415),
        (encoded(np.full((16, 16), 255, np.uint8), "BMP"), 415),
        (encoded(np.full((16, 16), 255, np.uint8), "GIF"), 415),
        (encoded(np.full((64, 64), 255, np.uint8), "JPEG")[:200], 422),
        (png_header(40_000, 40_000), 422),
        (encoded(np.full((4, 4), 255, np.uint8)), 422),
        (encoded(np.full((8, 400), 255, np.uint8)), 422),
        (encoded(np.zeros((64, 64), np.uint8)), 422),
    ],
    ids=["text", "empty", "bmp", "gif", "truncated", "bomb", "tiny", "strip", "inverted"],
)
def test_an_unusable_sketch_is_named(client, files, data, status):
    response = client.post("/v1/colorize", files={**files, "sketch": ("s.png", data)})
    assert "sketch" in check_problem(response, status)["detail"]


def test_a_webp_is_taken(client, files, reference):
    webp = ("r.webp", encoded(reference, "WEBP"))
    assert client.post("/v1/colorize", files={**files, "reference": webp}).status_code == 200


@pytest.mark.parametrize("mode", ["CMYK", "P", "RGBA", "LA", "I;16", "1", "L"])
def test_every_kind_of_image_is_taken(client, files, mode):
    gray = np.full((40, 30), 250, np.uint8)
    gray[10:30, 15] = 0
    image = Image.fromarray(gray * np.uint16(257)) if mode == "I;16" else Image.fromarray(gray).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG" if mode == "CMYK" else "PNG")
    response = client.post("/v1/colorize", files={**files, "sketch": ("s", buffer.getvalue())})
    assert response.status_code == 200, response.text
    assert decoded(response.content).shape == (40, 30, 3)


def test_a_body_over_the_limit_is_answered_with_413_whether_or_not_it_says_so(client, files):
    big = ("s.png", b"\x89PNG" + bytes(3_000_000))
    check_problem(client.post("/v1/colorize", files={**files, "sketch": big}), 413)

    def chunks():
        yield b'--b\r\nContent-Disposition: form-data; name="sketch"; filename="s"\r\n\r\n'
        for _ in range(40):
            yield bytes(100_000)

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    check_problem(client.post("/v1/colorize", content=chunks(), headers=headers), 413)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (BusyError("full"), 429),
        (NoModelError("none"), 503),
        (UnavailableError("the device of this engine is out of memory"), 503),
        (DeadlineError("late"), 504),
    ],
)
def test_what_the_engine_says_becomes_a_problem(files, error, status):
    with TestClient(create_app(Broken(error))) as client:
        response = client.post("/v1/colorize", files=files)
    check_problem(response, status)
    assert status == 504 or int(response.headers["retry-after"]) > 0


def test_a_failure_of_ours_tells_nothing_of_the_inside(files):
    with TestClient(create_app(Broken(RuntimeError("secret path")))) as client:
        response = client.post("/v1/colorize", files=files)
    check_problem(response, 500)
    assert "secret" not in response.text


def test_a_picture_that_takes_too_long_is_given_up(replica, files):
    with TestClient(create_app(replica, timeout_s=0.0)) as client:
        check_problem(client.post("/v1/colorize", files=files), 504)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", "/v1/colorize", 405), ("POST", "/healthz", 405), ("GET", "/examples/x", 404)],
)
def test_other_errors_are_problems_too(client, method, path, status):
    check_problem(client.request(method, path), status)


def test_a_server_without_a_model_says_so():
    with TestClient(create_app(Replica())) as client:
        assert client.get("/healthz").status_code == 200
        check_problem(client.get("/readyz"), 503)
        assert client.head("/readyz").status_code == 503


def test_head_answers_as_get_without_a_body(client):
    pages = ("/", "/docs", "/page.css", "/scripts/page.js", "/examples", "/examples/sketch_1.png", "/openapi.json")
    for path in (*pages, "/healthz", "/readyz", "/v1/models", "/nothing", "/examples/x", "/v1/colorize"):
        headers = {"X-Request-Id": "one"}
        get, head = client.get(path, headers=headers), client.head(path, headers=headers)
        assert (head.status_code, head.headers, head.content) == (get.status_code, get.headers, b""), path


def test_every_path_names_the_methods_it_has(client):
    for method in ("POST", "OPTIONS", "PUT", "DELETE"):
        for path in ("/", "/healthz", "/v1/models", "/openapi.json", "/examples/sketch_1.png"):
            assert client.request(method, path).headers["allow"] == "GET, HEAD"
    for method in ("GET", "HEAD", "OPTIONS", "PATCH"):
        for path in ("/v1/colorize", "/v1/colorize/stream"):
            answered = client.request(method, path)
            assert (answered.status_code, answered.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize(
    "path", ["/v1/colorize/", "//v1/colorize", "/v1//colorize", "/docs/", "/healthz/", "/v1/models/"]
)
def test_an_address_that_is_almost_right_is_not_found_and_not_redirected(client, path):
    forwarded = {"Host": "evil.example", "X-Forwarded-Proto": "https", "X-Forwarded-Prefix": "/anime"}
    for method in ("GET", "POST", "HEAD"):
        answered = client.request(method, f"http://testserver{path}", headers=forwarded, follow_redirects=False)
        assert answered.status_code == 404
        assert "location" not in answered.headers


def test_models_tells_versions_and_replicas(client):
    body = client.get("/v1/models").json()
    assert client.get("/readyz").status_code == 200
    assert body["traffic"] == {"3": 1.0}
    assert set(body["desired"]) == {"champion", "challenger"}
    (replica,) = body["replicas"]
    assert set(replica) == {"id", "versions", "state", "device", "attention", "running", "queued", "error"}
    assert replica["versions"] == ["3"]


def test_the_stream_shows_every_step_and_ends_with_the_picture(client, files):
    data = {"seed": "5", "num_inference_steps": "4"}
    response = client.post("/v1/colorize/stream", files=files, data=data)
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = [block.split("\n") for block in response.text.strip().split("\n\n")]
    events = [(block[0].removeprefix("event: "), json.loads(block[1].removeprefix("data: "))) for block in blocks]
    assert [name for name, _ in events] == ["progress", "progress", "progress", "result"]
    assert [(e["step"], e["total"]) for _, e in events[:3]] == [(1, 4), (2, 4), (3, 4)]
    assert events[0][1]["preview"].startswith("data:image/png;base64,")
    result = events[-1][1]
    assert set(result) == {"image", "model_version", "seed", "request_id"}
    assert base64.b64decode(result["image"]) == client.post("/v1/colorize", files=files, data=data).content


def test_the_stream_answers_a_wrong_request_with_a_problem(client, files):
    check_problem(client.post("/v1/colorize/stream", files=files, data={"seed": "x"}), 422)


def test_pages_need_nothing_from_elsewhere(client):
    for path in ("/", "/docs"):
        response = client.get(path)
        assert response.status_code == 200
        text = response.text.replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text
        assert "https://" not in text
        assert "default-src 'self'" in response.headers["content-security-policy"]
    for name in client.get("/examples").json()["examples"]:
        assert Image.open(io.BytesIO(client.get(f"/examples/{name}").content)).width >= 256


def test_the_description_names_every_field_and_answer(client):
    operation = client.get("/openapi.json").json()["paths"]["/v1/colorize"]["post"]
    fields = operation["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    known = (
        "sketch reference num_inference_steps guidance_scale seed sampler output size style background palette hints"
    )
    assert set(fields) == set(known.split())
    kinds = {"image/png", "image/openraster", "image/vnd.adobe.photoshop", "application/json"}
    assert set(operation["responses"]["200"]["content"]) == kinds
    assert {"200", "400", "413", "415", "422", "429", "503", "504"} <= set(operation["responses"])


class Patient(Replica):
    """A replica that works until the test stops it."""

    was_cancelled = False

    async def colorize(self, job):  # noqa: ARG002
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise


def test_a_client_that_disconnects_frees_its_slot(files):
    replica = Patient()
    app = create_app(replica)
    request = TestClient(app).build_request("POST", "/v1/colorize", files=files)
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/colorize",
        "query_string": b"",
        "headers": [(b"content-type", request.headers["content-type"].encode())],
    }
    messages = iter([{"type": "http.request", "body": request.read()}])

    async def receive():
        return next(messages, {"type": "http.disconnect"})

    async def send(_):
        pass

    asyncio.run(asyncio.wait_for(app(scope, receive, send), 10))
    assert replica.was_cancelled


@pytest.mark.parametrize(("damaged", "status"), [(b"hello", 415), (encoded(np.zeros((4, 4, 3), np.uint8)), 422)])
def test_of_several_references_the_unusable_one_is_named(client, files, damaged, status):
    several = [*files.items(), ("reference", ("b.png", damaged))]
    problem = check_problem(client.post("/v1/colorize", files=several), status)
    assert problem["detail"].startswith("reference 2")
    assert [error["field"] for error in problem.get("errors", [])] == ["reference"] * (status == 422)
