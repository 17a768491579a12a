"""The plug-in for Krita: its requests to a real server, and with KRITA=1 the whole of it in a real Krita.

KRITA=1 needs the Debian packages krita, python3-pyqt5 and xvfb.
"""

import ast
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from ports import free_port

PLUGIN = Path(__file__).parents[3] / "integrations" / "krita" / "animediffusion"
HINT = (60, 60)
"""A place in the face of the fixture `sketch`."""


@pytest.fixture(scope="module")
def service():
    spec = importlib.util.spec_from_file_location("krita_service", PLUGIN / "service.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclass looks there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pictures(files):
    return files["sketch"][1], [files["reference"][1]]


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def strokes(color):
    """A transparent layer with one stroke."""
    layer = np.zeros((90, 120, 4), np.uint8)
    layer[HINT[1] : HINT[1] + 6, HINT[0] : HINT[0] + 6] = (*color, 255)
    buffer = io.BytesIO()
    Image.fromarray(layer).save(buffer, "PNG")
    return buffer.getvalue()


def test_layers_come_back_with_the_colors_of_strokes(service, url, pictures, sketch):
    layers = service.color(service.Request(url, "", *pictures, hints=strokes((0, 0, 255)), seed=1))
    assert pixels(layers.flats).shape == sketch.shape
    assert (pixels(layers.flats)[HINT[1], HINT[0]] == (0, 0, 255)).all()
    assert layers.shading is None or pixels(layers.shading).shape == sketch.shape


def test_what_fails_is_one_line(service, url, pictures):
    lines, references = pictures
    with pytest.raises(service.ServiceError, match=r"^sketch is not an image .*; send a PNG"):
        service.color(service.Request(url, "", b"no picture", references))
    with pytest.raises(service.ServiceError, match="style: oil; flat, shaded or painted"):
        service.color(service.Request(url, "", lines, references, style="oil"))
    with pytest.raises(service.ServiceError, match=r"^0 references; choose 1 to 4$"):
        service.color(service.Request(url, "", lines, []))
    with pytest.raises(service.ServiceError, match=r"^no answer from http://127.0.0.1:.*start `animediffusion serve`"):
        service.color(service.Request(f"http://127.0.0.1:{free_port()}", "", lines, references))
    with pytest.raises(service.ServiceError, match="is not an address; it begins with http"):
        service.color(service.Request("file:///etc/passwd", "", lines, references))


@pytest.mark.parametrize("path", sorted(PLUGIN.glob("*.py")), ids=lambda path: path.name)
def test_the_plugin_is_written_for_the_python_of_krita(path):
    ast.parse(path.read_text(), feature_version=(3, 8))
    assert "from __future__ import annotations" in path.read_text() or path.name == "__init__.py"


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("KRITA") != "1", reason="KRITA=1 runs it in a real Krita")
def test_in_krita_the_layers_make_the_picture_of_the_server(url, pictures, tmp_path):
    (tmp_path / "sketch.png").write_bytes(pictures[0])
    (tmp_path / "reference.png").write_bytes(pictures[1][0])
    variables = {"KRITA_FOLDER": tmp_path, "KRITA_PLUGIN": PLUGIN, "KRITA_URL": url, "KRITA_HINT": json.dumps(HINT)}
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    environment.update(HOME=str(tmp_path), XDG_RUNTIME_DIR=str(tmp_path), PYTHONPATH=str(Path(__file__).parent))
    command = ["xvfb-run", "-a", "kritarunner", "-s", "krita_script", "-f", "main"]
    subprocess.run(
        command, env=environment, timeout=300, capture_output=True, check=False
    )  # Krita may crash at its end

    found = json.loads((tmp_path / "found.json").read_text())
    assert "error" not in found, found["error"]
    assert [found["nodes"][0], *found["nodes"][2:]] == ["AnimeDiffusion", "hints", "notes"]
    assert found["group"][0] == ["flats", "normal"]
    assert {tuple(one) for one in found["group"][1:]} <= {("shading", "multiply"), ("highlights", "screen")}
    assert found["lines"] == "multiply"
    data = {"style": "shaded", "seed": "1"}
    files = {"sketch": pictures[0], "reference": pictures[1][0], "hints": strokes((0, 0, 255))}
    answer = httpx.post(f"{url}/v1/colorize", data=data, files=files, timeout=60, trust_env=False).raise_for_status()
    made = pixels((tmp_path / "colored.png").read_bytes())
    assert np.abs(made.astype(int) - pixels(answer.content)).max() == 0
