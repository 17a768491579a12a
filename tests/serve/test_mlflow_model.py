"""What any MLflow client can do with a registered version."""

import base64
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
from bundles import evaluation, new_model, write_bundle
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server
from PIL import Image

from animediffusion.models.bundle import load_bundle
from animediffusion.pipelines.release import release
from animediffusion.pipelines.synthetic.dataset import make_row
from animediffusion.platform.images.codec import encode_png
from animediffusion.serve.standalone import paint

REGISTRY_TEXT = Path(__file__).parents[2] / "docs" / "registry.md"
CLIENT = """
import sys, mlflow
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
read = lambda path: open(path, "rb").read()
out = model.predict({"sketch": read(sys.argv[3]), "reference": read(sys.argv[4])}, params={"seed": 5})
open(sys.argv[5], "wb").write(out["image"][0])
import animediffusion.models.bundle as module
print(module.__file__)
"""


@pytest.fixture(scope="module")
def drawing():
    row = make_row(3, 0, 48)
    return {"sketch": encode_png(row.sketch), "reference": encode_png(row.cross_reference)}


@pytest.fixture(scope="module")
def champion(tmp_path_factory):
    """Settings of a registry with a champion, and its bundle."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        workspace = tmp_path_factory.mktemp("workspace")
        settings = new_model(workspace)
        folder = write_bundle(workspace / "bundle", 1, evaluation(), sampler_steps=2)
        release.promote(settings, release.register(settings, folder).version)
        yield settings, folder


@pytest.fixture
def model(champion):
    settings, _ = champion
    mlflow.set_tracking_uri(settings.tracking_uri)
    yield mlflow.pyfunc.load_model(f"models:/{settings.model_name}@champion")
    mlflow.set_tracking_uri(None)


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def test_predict_makes_the_picture_of_colorize(champion, model, drawing):
    bundle = load_bundle(champion[1])
    out = model.predict(drawing, params={"seed": 5})
    picture, layer = paint(bundle, drawing["sketch"], drawing["reference"], seed=5)
    assert (out["image"][0], out["color_layer"][0]) == (picture, layer)
    assert pixels(picture).shape == (48, 48, 3)


def test_a_batch_is_a_row_each_with_the_next_seed(model, drawing):
    out = model.predict({name: [data, data] for name, data in drawing.items()}, params={"seed": 5, "size": "model"})
    alone = model.predict(drawing, params={"seed": 6, "size": "model"})
    assert out["image"][1] == alone["image"][0]
    assert out["image"][0] != out["image"][1]
    assert pixels(out["image"][0]).shape == (16, 16, 3)


def test_a_style_and_a_palette_are_those_of_colorize(champion, model, drawing):
    look = {"style": "flat", "palette": "#0a141e,#f0e6dc", "background": "reference"}
    out = model.predict(drawing, params={"seed": 5, **look})
    expected = paint(load_bundle(champion[1]), drawing["sketch"], drawing["reference"], seed=5, **look)
    assert (out["image"][0], out["color_layer"][0]) == expected
    for wrong in ({"style": "oil"}, {"background": "sea"}, {"palette": "#12", "style": "flat"}):
        with pytest.raises(Exception, match=rf"^{next(iter(wrong))}: "):
            model.predict(drawing, params=wrong)


def test_the_models_own_steps_are_the_default(model, drawing):
    own, same, other = (model.predict(drawing, params=params) for params in (
        None, {"num_inference_steps": 2}, {"num_inference_steps": 1, "guidance_scale": 2.0}
    ))  # fmt: skip
    assert own["image"][0] == same["image"][0] != other["image"][0]


def test_wrong_input_says_what_is_wrong(model, drawing):
    with pytest.raises(MlflowException, match="reference"):
        model.predict({"sketch": drawing["sketch"]})
    with pytest.raises(Exception, match="is not an image"):
        model.predict({**drawing, "sketch": b"hello"})
    with pytest.raises(Exception, match="size must be native or model"):
        model.predict(drawing, params={"size": "large"})


def test_mlflows_scoring_server_takes_base64(model, drawing):
    encoded = {name: base64.b64encode(data).decode() for name, data in drawing.items()}
    body = json.dumps({"dataframe_records": [encoded], "params": {"seed": 5}})
    answer = scoring_server.invocations(body, "application/json", model, model.metadata.get_input_schema())
    assert answer.status == 200, answer.response
    [row] = json.loads(answer.response)["predictions"]
    assert base64.b64decode(row["image"]) == model.predict(drawing, params={"seed": 5})["image"][0]


def test_the_example_of_the_text_runs(champion, drawing, tmp_path, monkeypatch):
    settings, _ = champion
    [example] = re.findall(r"```python\n(.*?)```", REGISTRY_TEXT.read_text(), flags=re.DOTALL)
    for name, file in (("sketch", "drawing.png"), ("reference", "character.png")):
        (tmp_path / file).write_bytes(drawing[name])
    monkeypatch.chdir(tmp_path)
    here = example.replace("http://mlflow:5000", settings.tracking_uri).replace(
        "animediffusion@", f"{settings.model_name}@"
    )
    exec(here, {})
    mlflow.set_tracking_uri(None)
    assert pixels((tmp_path / "colored.png").read_bytes()).shape == (48, 48, 3)


def test_a_client_without_this_package_and_without_pickle(champion, model, drawing, tmp_path):
    settings, _ = champion
    for name, data in drawing.items():
        (tmp_path / f"{name}.png").write_bytes(data)
    # -S and a path of its own: the packages are there, this one is not.
    site = next(path for path in sys.path if path.endswith("site-packages"))
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": site}
    environment |= {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    arguments = [settings.tracking_uri, f"models:/{settings.model_name}@champion"]
    files = [str(tmp_path / name) for name in ("sketch.png", "reference.png", "out.png")]
    done = subprocess.run(
        [sys.executable, "-S", "-c", CLIENT, *arguments, *files],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "code.zip" in done.stdout
    assert (tmp_path / "out.png").read_bytes() == model.predict(drawing, params={"seed": 5})["image"][0]
