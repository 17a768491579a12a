"""Write the files that make a registered bundle an MLflow model, which any client can load and call without a pickle.

In addition to the bundle's files, a version contains MLmodel (the file that MLflow reads first), model.py ("models from
code": a copy of serve/mlflow_model.py), code.zip (the modules that model.py needs), requirements.txt and
python_env.yaml. docs/registry.md shows how to call such a model. Not here: the upload, see client.py.
"""

from __future__ import annotations

import platform
from pathlib import Path

import yaml
from mlflow import pyfunc
from mlflow.models import Model, ModelSignature
from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema

from animediffusion.platform.registry import code_archive

CODE = "code.zip"
"""The modules that model.py needs."""
SCRIPT = "model.py"
_SOURCE = "serve/mlflow_model.py"
_LOADER = "mlflow.pyfunc.loaders.code_model"
"""MLflow's loader of models from code."""


def write_flavor(folder: Path, *, model_id: str, run_id: str) -> None:
    """Write the files that are stored in addition to the bundle's files.

    Args:
        folder: an empty folder to write to.
        model_id: id of MLflow's logged model.
        run_id: the run that made the model.
    """
    code_archive.zip_modules(folder / CODE)
    (folder / SCRIPT).write_bytes(code_archive.source(_SOURCE))
    (folder / "requirements.txt").write_text(code_archive.requirements("mlflow"))
    environment = {"python": platform.python_version(), "dependencies": ["-r requirements.txt"]}
    (folder / "python_env.yaml").write_text(yaml.safe_dump(environment))
    model = Model(run_id=run_id, model_id=model_id, signature=signature())
    pyfunc.add_to_model(
        model,
        loader_module=_LOADER,
        python_env="python_env.yaml",
        model_code_path=SCRIPT,
        artifacts={"bundle": {"path": ".", "uri": "."}, "code": {"path": CODE, "uri": CODE}},
    )
    model.save(str(folder / "MLmodel"))


def signature() -> ModelSignature:
    """Return the inputs `sketch` and `reference`, the outputs `image` and `color_layer`, and the parameters of a call.

    All columns contain the bytes of image files.
    """
    return ModelSignature(
        inputs=Schema([ColSpec("binary", "sketch"), ColSpec("binary", "reference")]),
        outputs=Schema([ColSpec("binary", "image"), ColSpec("binary", "color_layer")]),
        params=ParamSchema(
            [
                ParamSpec("seed", "long", 0),
                ParamSpec("num_inference_steps", "long", None),
                ParamSpec("guidance_scale", "double", None),
                ParamSpec("size", "string", "native"),
                ParamSpec("style", "string", None),
                ParamSpec("background", "string", None),
                ParamSpec("palette", "string", None),
                ParamSpec("hints", "string", None),
            ]
        ),
    )
