"""Reads the multipart form of a coloring request, and says in one line what is wrong with it."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request

from animediffusion.serve.pictures import Output, Size
from animediffusion.serve.problems import ProblemError, unusable

FILES = ("sketch", "reference")
MAX_SEED = 2**32 - 1
MAX_STEPS = 100
MAX_GUIDANCE = 20


class Parameters(BaseModel):
    """What may be asked besides the two pictures."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    num_inference_steps: Annotated[int | None, Field(ge=1, le=MAX_STEPS)] = None
    """Denoising steps; the model's own number if left out."""
    guidance_scale: Annotated[float | None, Field(ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)] = None
    """How strongly the reference counts; 1 is plain."""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = Field(default_factory=lambda: secrets.randbelow(MAX_SEED + 1))
    """Same seed, same picture; random if left out, and always in the answer's X-Seed."""
    sampler: Literal["euler", "heun", "dpmpp_2m"] | None = None
    """The model's own if left out."""
    output: Output = "image"
    """`color_layer` is RGBA without lines. `both`, of `/v1/colorize/stream` alone, adds `color_layer` to the result."""
    size: Size = "native"
    """`native`: the sketch's own size; `model`: the network's square."""


ALLOWED = {
    "num_inference_steps": f"a whole number from 1 to {MAX_STEPS}",
    "guidance_scale": f"a number from 0 to {MAX_GUIDANCE}",
    "seed": f"a whole number from 0 to {MAX_SEED}",
    "sampler": "euler, heun or dpmpp_2m",
    "output": "image or color_layer; both from /v1/colorize/stream",
    "size": "native or model",
}


@dataclass(frozen=True)
class ColorizeForm:
    """A request as it arrived: bytes of two files, and checked parameters."""

    sketch: bytes
    reference: bytes
    parameters: Parameters


async def read_form(request: Request) -> ColorizeForm:
    """The form of a request.

    Raises:
        ProblemError: 400 not multipart or a file missing, 422 a parameter is wrong.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise ProblemError(400, "send multipart/form-data with the files sketch and reference")
    try:
        async with request.form(max_files=4, max_fields=16, max_part_size=4096) as form:
            _check_names(form)
            return ColorizeForm(await _file(form, "sketch"), await _file(form, "reference"), _parameters(form))
    except MultiPartException as error:
        raise ProblemError(400, f"the multipart body cannot be read: {error.message}") from error
    except (ProblemError, ClientDisconnect):
        raise
    except Exception as error:
        # Starlette turns what its parser says into an HTTPException of its own.
        if getattr(error, "status_code", None) == 400:
            detail = str(getattr(error, "detail", error))
            raise ProblemError(400, f"the multipart body cannot be read: {detail}") from error
        raise


async def _file(form: FormData, name: str) -> bytes:
    value = form.get(name)
    if value is None:
        raise ProblemError(400, f"the file {name} is missing; send sketch and reference")
    if not isinstance(value, UploadFile):
        raise ProblemError(400, f"{name} is a text field; send it as a file")
    return await value.read()


def _check_names(form: FormData) -> None:
    names = [*FILES, *Parameters.model_fields]
    for name in form:
        if name not in names:
            close = get_close_matches(name, names, n=1)
            raise unusable(name[:80], "unknown field", f"did you mean {close[0]}?" if close else ", ".join(names))
        if len(form.getlist(name)) > 1:
            raise unusable(name, "given more than once", "give it once")


def _parameters(form: FormData) -> Parameters:
    values: dict[str, Any] = {name: value for name, value in form.items() if name not in FILES and value != ""}
    for name, value in values.items():
        if isinstance(value, UploadFile):
            raise unusable(name, "is a file", ALLOWED[name])
    try:
        return Parameters.model_validate(values)
    except ValidationError as error:
        wrong = [str(one["loc"][0]) for one in error.errors(include_url=False)]
        errors = [{"field": name, "found": str(values[name])[:80], "allowed": ALLOWED[name]} for name in wrong]
        detail = "; ".join(f"{one['field']}: {one['found']!r}, allowed is {one['allowed']}" for one in errors)
        raise ProblemError(422, detail, errors) from error
