"""Parsing and validation of the multipart forms of requests, with error messages of one line.

Nothing in a request is ignored silently: a truncated body, an unknown or repeated field, and a parameter in the URL or
in a header are errors.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema
from python_multipart.exceptions import MultipartParseError
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from animediffusion.models import sampler_options
from animediffusion.models.sampler_options import (
    MAX_GUIDANCE_SCALE,
    MAX_REFERENCES,
    MAX_SEED,
    SamplerName,
    SamplerOptions,
    number,
    whole_number,
)
from animediffusion.serve.api.problems import ProblemError, unusable
from animediffusion.serve.rendering import render
from animediffusion.serve.rendering.coloring import Background, Style
from animediffusion.serve.rendering.render import Output, RenderOptions, Size

FILES = ("sketch", "reference")
MAY_BE_FILES = ("palette", "hints")
"""Fields that are a text or a file."""
MAX_STEPS = 100
"""Largest number of steps of a request: smaller than in SamplerOptions, so that one request takes seconds."""
MAX_TEXT_BYTES = 2**16
"""Maximum size of a text field."""
_CODINGS = (b"content-encoding", b"content-transfer-encoding")
_AS_IT_IS = (b"", b"identity", b"binary", b"8bit", b"7bit")
"""Values of these headers of a part that change none of its bytes."""


class ColorizeForm(BaseModel):
    """The form of a request. Numbers are plain decimal digits, and the name of every field is part of the API."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    sketch: bytes
    """Line art: PNG, JPEG or WebP, up to 25 Mpixel."""
    reference: Annotated[tuple[bytes, ...], Field(min_length=1, max_length=MAX_REFERENCES)]
    """A picture with the wanted colors. Repeat the field for up to 4 pictures; the first one counts most."""
    num_inference_steps: Annotated[int | None, BeforeValidator(whole_number), Field(ge=1, le=MAX_STEPS)] = None
    """Number of denoising steps; the default of the model if omitted."""
    guidance_scale: Annotated[float | None, BeforeValidator(number), Field(ge=0, le=MAX_GUIDANCE_SCALE)] = None
    """Strength of the guidance by the reference; 1 disables guidance."""
    seed: Annotated[int, BeforeValidator(whole_number), Field(ge=0, le=MAX_SEED)] = Field(
        default_factory=lambda: secrets.randbelow(MAX_SEED + 1)
    )
    """Seed of the noise: the same seed gives the same picture. Random if omitted; the header X-Seed returns it."""
    sampler: SamplerName | None = None
    """Sampler; the default of the model if omitted."""
    output: Output = "image"
    """`color_layer` is RGBA without lines. `both`, for `/v1/colorize/stream` only, adds `color_layer` to the result.
    `flat` is one color in each region, without lines. `ora` (OpenRaster) and `psd` (Photoshop) are files with layers:
    line art, shading, flats and hidden region ids. `layers` is JSON with the same layers as PNGs in base64, and the
    regions."""
    size: Size = "native"
    """`native` is the size of the sketch; `model` is the square of the network."""
    style: Style | None = None
    """`flat` is one color in each region; `shaded` adds soft shading; `painted` is the network's own colors. The
    default is `flat`, but `painted` if the size is `model` or the lines enclose nothing."""
    background: Background | None = None
    """With `flat` and `shaded`, the color outside of the figure: that of the `paper`, which is the default, or one from
    the `reference`."""
    palette: Annotated[str | bytes, WithJsonSchema({"type": "string"})] = "reference"
    """The colors that regions may have: those of the `reference`, `none` (any color), a list `#RRGGBB,#RRGGBB,...`, or
    the file of a GIMP palette (.gpl) or an Adobe Swatch Exchange (.ase)."""
    hints: Annotated[str | bytes | None, WithJsonSchema({"type": "string"})] = None
    """Exact colors of regions: JSON `[{"x": 120, "y": 88, "color": "#e0b080"}]` with places in pixels of the sketch, or
    a transparent PNG of strokes of the size of the sketch. A later hint of a region wins. The key `scope` of a hint is
    `piece` (default), `whole` (the drawing's region with its shadows and lights) or `color` (all of the same color)."""

    @property
    def rendering(self) -> RenderOptions:
        """The settings of the finished picture."""
        return RenderOptions(
            size=self.size, style=self.style, background=self.background, palette=self.palette, hints=self.hints
        )

    @property
    def options(self) -> SamplerOptions:
        """The sampler settings."""
        return SamplerOptions(
            seed=self.seed,
            steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            sampler=self.sampler,
        )


class CorrectionForm(BaseModel):
    """The form of a correction: the corrected picture, or hints with which the picture is right, or both."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    request_id: str
    """The header `X-Request-Id` of the answer with the picture, or `request_id` of the event `result`."""
    corrected: bytes | None = None
    """The picture as it should have been: PNG, JPEG or WebP, of the size of the sketch."""
    hints: Annotated[str | bytes | None, WithJsonSchema({"type": "string"})] = None
    """Exact colors of regions, as in a coloring request. Without `corrected`, they make the corrected picture: they
    come after the hints of the request, so that they win."""


ALLOWED = {
    **sampler_options.ALLOWED,
    "num_inference_steps": f"a whole number from 1 to {MAX_STEPS}",
    **render.ALLOWED,
    "output": "image, color_layer, flat, ora, psd, layers or doubt; both from /v1/colorize/stream",
}


async def read_form(request: Request) -> ColorizeForm:
    """Return the form of a request.

    Raises:
        ProblemError: 400 if the body is not multipart, is truncated or lacks a file; 415 if it is compressed; 422 if a
            parameter is wrong.
    """
    _check_head(request, ColorizeForm, "the files sketch and reference")
    form = await _parse(request)
    try:
        _check_names(form, ColorizeForm)
        given = [name for name in MAY_BE_FILES if isinstance(form.get(name), UploadFile)]
        files: dict[str, Any] = {name: (await _files(form, name))[0] for name in ("sketch", *given)}
        return _checked(form, {**files, "reference": await _files(form, "reference")})
    finally:
        await form.close()


async def read_correction(request: Request) -> CorrectionForm:
    """Return the form of a correction; the errors are those of read_form()."""
    _check_head(request, CorrectionForm, "request_id, and the file corrected or the field hints")
    form = await _parse(request)
    try:
        _check_names(form, CorrectionForm)
        found: dict[str, Any] = {name: value for name, value in form.items() if value != ""}
        if "request_id" not in found:
            detail = "the field request_id is missing; it is the header X-Request-Id of the answer with the picture"
            raise ProblemError(400, detail)
        if isinstance(found["request_id"], UploadFile):
            raise unusable("request_id", "is a file", "send it as text")
        if len(found) == 1:
            raise ProblemError(400, "the correction is empty; send the file corrected, the field hints, or both")
        given = [name for name in found if name == "corrected" or isinstance(found[name], UploadFile)]
        return CorrectionForm.model_validate({**found, **{name: (await _files(form, name))[0] for name in given}})
    finally:
        await form.close()


def _check_head(request: Request, kind: type[BaseModel], content: str) -> None:
    """Reject a body that is not a plain form, and parameters outside the form: ignoring them would hide a mistake."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "multipart/form-data":
        raise ProblemError(400, f"send multipart/form-data with {content}")
    coding = ", ".join(request.headers.getlist("content-encoding")) or "identity"
    if coding.strip().lower() not in ("identity", ""):
        detail = f"Content-Encoding {coding[:80]!r} is not supported; send the body as it is"
        raise ProblemError(415, detail, headers={"Accept-Encoding": "identity"})
    for name in request.query_params:
        raise unusable(name[:80], "in the address", "send it as a field of the form")
    for header in request.headers:
        name = header.removeprefix("x-").replace("-", "_")
        if name in kind.model_fields and name not in (*FILES, "request_id"):
            raise unusable(name, f"in the header {header}", "send it as a field of the form")


class _Parser(MultiPartParser):
    """Starlette's parser, which also rejects a truncated body and records how many bytes were read."""

    def __init__(self, headers: Headers, stream: AsyncIterator[bytes]) -> None:
        super().__init__(headers, self._counted(stream), max_files=10, max_fields=16, max_part_size=MAX_TEXT_BYTES)
        self.is_complete = False
        self.num_read = 0

    def on_end(self) -> None:
        """Record the closing boundary. The parser does not call this if the body ends without that boundary."""
        self.is_complete = True

    def on_headers_finished(self) -> None:
        """Reject a part that is encoded: its bytes would be taken for another value."""
        super().on_headers_finished()
        for name, value in self._current_part.item_headers:
            if name in _CODINGS and value.strip().lower() not in _AS_IT_IS:
                header, coding = name.decode().title(), value[:80].decode("latin-1")
                part = self._current_part.field_name[:80]
                raise ProblemError(415, f"{header} {coding!r} of {part} is not supported; send its bytes as they are")

    async def _counted(self, stream: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        """Count the bytes and reject a truncated body here, because the parser closes its files if its stream fails."""
        async for chunk in stream:
            yield chunk
            self.num_read += len(chunk)
        if not self.is_complete:
            raise ProblemError(400, "the multipart body ends early, without its closing boundary; send it again")


async def _parse(request: Request) -> FormData:
    parser = _Parser(request.headers, request.stream())
    try:
        return await parser.parse()
    except MultiPartException as error:
        raise ProblemError(400, f"the multipart body cannot be read: {_reason(parser, error)}") from error
    except UnicodeError as error:
        raise ProblemError(400, "the charset in Content-Type cannot be read; omit it, names are UTF-8") from error


def _reason(parser: _Parser, error: MultiPartException) -> str:
    if isinstance(error.__cause__, MultipartParseError):
        place = parser.num_read + error.__cause__.offset
        return (
            f"byte {place} is not as expected; begin each part with CRLF--BOUNDARY CRLF, the first without a preamble"
        )
    if "maximum size" in error.message:
        limit = f"a text field is longer than {MAX_TEXT_BYTES} bytes"
        return f"{limit}; send pictures as files, each with a filename"
    return error.message


async def _files(form: FormData, name: str) -> tuple[bytes, ...]:
    values, found = form.getlist(name), []
    if not values:
        raise ProblemError(400, f"the file {name} is missing; send sketch and reference")
    for value in values:
        if not isinstance(value, UploadFile):
            raise ProblemError(400, f"{name} is a text field; send it as a file, with a filename")
        found.append(await value.read())
    return tuple(found)


def _check_names(form: FormData, kind: type[BaseModel]) -> None:
    names = list(kind.model_fields)
    for name in form:
        if name not in names:
            close = get_close_matches(name, names, n=1)
            raise unusable(name[:80], "unknown field", f"did you mean {close[0]}?" if close else ", ".join(names))
        count = len(form.getlist(name))
        if name == "reference" and count > MAX_REFERENCES:
            raise unusable(name, f"{count} pictures", f"1 to {MAX_REFERENCES} pictures")
        if name != "reference" and count > 1:
            raise unusable(name, "given more than once", "give it once")


def _checked(form: FormData, files: dict[str, Any]) -> ColorizeForm:
    texts = {name: value for name, value in form.items() if name not in files and value != ""}
    for name, value in texts.items():
        if isinstance(value, UploadFile):
            raise unusable(name, "is a file", ALLOWED[name])
    try:
        return ColorizeForm.model_validate({**files, **texts})
    except ValidationError as error:
        wrong = [str(one["loc"][0]) for one in error.errors(include_url=False, include_input=False)]
        errors = [{"field": name, "found": str(texts[name])[:80], "allowed": ALLOWED[name]} for name in wrong]
        detail = "; ".join(f"{one['field']}: {one['found']!r}, allowed is {one['allowed']}" for one in errors)
        raise ProblemError(422, detail, errors) from error
