"""Code that `mlflow.pyfunc.load_model` runs for a registered version, which contains a copy of this file as model.py.

    model = mlflow.pyfunc.load_model("models:/animediffusion@champion")
    out = model.predict({"sketch": sketch_bytes, "reference": reference_bytes}, params={"seed": 7})
    out["image"][0]                                # PNG

The package need not be installed: code.zip, next to this file, contains the modules. An installed package has priority,
and it may be of another version, so this file uses only load_bundle() and paint(), which every version has.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class ColorizerModel(PythonModel):
    """A bundle as MLflow's PythonModel."""

    def load_context(self, context: Any) -> None:
        """Check and load the bundle, on CUDA if it is available."""
        if context.artifacts["code"] not in sys.path:
            sys.path.append(context.artifacts["code"])
        from animediffusion.models.bundle import load_bundle

        self._bundle = load_bundle(context.artifacts["bundle"], "cuda" if torch.cuda.is_available() else "cpu")

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:  # noqa: ARG002
        """Return the colored drawings, one row for each input row.

        Args:
            context: MLflow's context; not used.
            model_input: columns `sketch` and `reference`: bytes of PNG, JPEG or WebP files.
            params: `seed` (default 0; row i uses seed + i), `size` (native or model; default native),
                `num_inference_steps` and `guidance_scale` (defaults of the model), and `style`, `background`,
                `palette` and `hints` as in the HTTP API.

        Returns:
            Columns `image` and `color_layer`: bytes of PNG files.
        """
        from animediffusion.serve.standalone import paint

        given = {name: value for name, value in (params or {}).items() if value is not None}
        fields = {"num_inference_steps": "steps", "guidance_scale": "guidance_scale"}
        changes = {field: given[name] for name, field in fields.items() if name in given}
        sampler = replace(self._bundle.config.sampler, **changes)
        seed, size = int(given.get("seed", 0)), given.get("size", "native")
        if size not in ("native", "model"):
            raise ValueError(f"size must be native or model, got {size!r}")
        # A package of version 0.1 has no styles: it is called with them only if they are given.
        look = {name: given[name] for name in ("style", "background", "palette", "hints") if name in given}
        pairs = zip(model_input["sketch"], model_input["reference"], strict=True)
        painted = [
            paint(self._bundle, sketch, reference, seed=seed + row, sampler=sampler, size=size, **look)
            for row, (sketch, reference) in enumerate(pairs)
        ]
        return pd.DataFrame(painted, columns=["image", "color_layer"])


set_model(ColorizerModel())
