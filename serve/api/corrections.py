"""POST /v1/corrections: a person's correction of a picture becomes a record in the corrections store.

The server drew the picture from a request that the store keeps (request_keeper.py). This draws it again, compares the
correction with it, and saves both with the drawing and the references, all as new PNGs: nothing else of an upload, such
as the place where a photograph was taken, gets into a record.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse

from animediffusion.platform.corrections.store import FORMAT, KEEP_S, Correction, Corrections, KeptRequest, Saved, now
from animediffusion.platform.errors import ConfigError, DeadlineError, StorageError
from animediffusion.platform.images.codec import decode_rgb, encode_png
from animediffusion.serve.api.auth import key_of
from animediffusion.serve.api.form import CorrectionForm, read_correction
from animediffusion.serve.api.limits import REQUEST_ID
from animediffusion.serve.api.openapi import CORRECTION_ANSWERS, CORRECTION_FORM, KEY
from animediffusion.serve.api.problems import RETRY_AFTER_S, ProblemError, unusable
from animediffusion.serve.api.request_keeper import RequestKeeper
from animediffusion.serve.rendering.hints import PNG_SIGNATURE, Hint
from animediffusion.serve.rendering.layers import hex_of
from animediffusion.serve.rendering.render import Inputs, RenderOptions, read_picture, read_sketch, render
from animediffusion.serve.rendering.sketch import Drawing, Pixels, as_gray

MAX_PER_MINUTE = 60
"""Corrections of one key that each server process takes in a minute."""
WRITING_S = 1.0
"""A request may be corrected the moment it is answered, while another server still writes it to the store. This server
knows what it writes itself."""
SAME_LEVELS = 2
LOSSY_LEVELS, LOSSY_SHARE = 40, 5e-4
"""Levels by which a pixel has changed; a lossy format changes pixels by itself, and a few of them by much."""
OFF = "this server takes no corrections; its operator turns them on with ANIMEDIFFUSION_CORRECTIONS=FOLDER or s3://..."
_STATUS: dict[Saved, int] = {"stored": 201, "replaced": 200, "known": 200}


def add_corrections(app: FastAPI, keeper: RequestKeeper | None, timeout_s: float) -> None:
    """Add POST /v1/corrections to an application; without a keeper, it answers how to turn corrections on."""
    # Corrections have a thread of their own, so that they do not delay pictures.
    pool = ThreadPoolExecutor(1, "corrections")
    limit = RateLimit(MAX_PER_MINUTE)

    @app.post("/v1/corrections", openapi_extra=CORRECTION_FORM, responses=CORRECTION_ANSWERS, dependencies=[KEY])
    async def correct(request: Request) -> JSONResponse:
        """Send the corrected picture of an earlier request, or hints with which it is right, to learn from it.

        The operator must have turned corrections on. The server keeps an answered request for 7 days.
        """
        if keeper is None:
            raise ProblemError(404, OFF)
        limit.take(key_of(request))
        form = await read_correction(request)
        try:
            answer = await asyncio.wait_for(_answer(keeper, pool, form, key_of(request)), timeout_s)
        except TimeoutError as error:
            raise DeadlineError("the correction was not saved in time") from error
        except StorageError as error:
            detail = f"the correction cannot be saved now: {error.found}; try again later"
            raise ProblemError(503, detail, headers={"Retry-After": str(RETRY_AFTER_S)}) from error
        request.state.model_version = answer["model_version"]
        return JSONResponse(answer, _STATUS[answer["state"]])


class RateLimit:
    """Limits the requests of each key in a minute.

    Args:
        most: number of requests.
        clock: seconds; a test may give another one.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = most, clock
        self._times: dict[str, deque[float]] = {}

    def take(self, key: str) -> None:
        """Count a request; raise a ProblemError 429 if the key has had too many."""
        times, present = self._times.setdefault(key, deque()), self._clock()
        while times and present - times[0] >= 60:
            times.popleft()
        if len(times) >= self._most:
            wait = str(int(60 - (present - times[0])) + 1)
            detail = f"more than {self._most} corrections in a minute; try again in {wait} s"
            raise ProblemError(429, detail, headers={"Retry-After": wait})
        times.append(present)


async def _answer(keeper: RequestKeeper, pool: ThreadPoolExecutor, form: CorrectionForm, key: str) -> dict[str, Any]:
    """Return the body of the answer."""
    if not REQUEST_ID.fullmatch(form.request_id):
        found = repr(form.request_id[:80])
        raise unusable("request_id", found, "1 to 64 letters, digits, dots, dashes and underscores")
    store = keeper.store
    if (writing := keeper.writing(key, form.request_id)) is not None:
        await asyncio.wait([asyncio.wrap_future(writing)])
    kept = await asyncio.to_thread(store.find, key, form.request_id)
    if kept is None:
        await asyncio.sleep(WRITING_S)
        kept = await asyncio.to_thread(store.find, key, form.request_id)
    if kept is None:
        days = KEEP_S // (24 * 3600)
        why = f"it has another key, was answered more than {days} days ago, or was not kept"
        raise ProblemError(404, f"request {form.request_id} is unknown: {why}")
    return await asyncio.get_running_loop().run_in_executor(pool, _correct, store, form, kept)


def _correct(store: Corrections, form: CorrectionForm, kept: KeptRequest) -> dict[str, Any]:
    """Save a correction and return the body of the answer."""
    inputs, options = _inputs(kept)
    painted = decode_rgb(kept.picture)
    result = decode_rgb(render(painted, *inputs, options=options).files["image"])
    hints = _read_hints(form, inputs.drawing)
    if form.corrected is not None:
        field, corrected = "corrected", _read_corrected(form.corrected, inputs.drawing)
        is_exact = form.corrected.startswith(PNG_SIGNATURE)
        threshold, least = (SAME_LEVELS, 0.0) if is_exact else (LOSSY_LEVELS, LOSSY_SHARE)
    else:
        exact = (*inputs.hints, *(replace(hint, learned=False) for hint in hints))
        field, threshold, least = "hints", 0, 0.0
        corrected = decode_rgb(
            render(painted, inputs.drawing, inputs.references, exact, options=options).files["image"]
        )
    changed = float((np.abs(corrected.astype(np.int16) - result).max(axis=2) > threshold).mean())
    if changed <= least:
        raise unusable(field, "the picture of the request, unchanged", "send it only if something is different")
    correction = _correction(kept, inputs, result, corrected, hints, field, changed)
    return {
        "request_id": kept.request_id,
        "model_version": kept.model_version,
        "state": store.save(correction),
        "changed": correction.record["changed"],
    }


def _inputs(kept: KeptRequest) -> tuple[Inputs, RenderOptions]:
    """Return the decoded inputs of a request, and the settings that draw its picture at the size of the drawing."""
    fields = {**kept.options, **kept.files}
    asked = RenderOptions(**{name: fields[name] for name in ("size", "style", "background", "palette", "hints")})
    style = asked.usual_style if asked.size == "model" else asked.style
    options = replace(asked, size="native", style=style)
    drawing = read_sketch(kept.sketch)
    return Inputs(drawing, tuple(map(read_picture, kept.references)), options.read_hints(drawing)), options


def _read_hints(form: CorrectionForm, drawing: Drawing) -> tuple[Hint, ...]:
    try:
        options = RenderOptions(hints=form.hints)
        options.check()
        return options.read_hints(drawing)
    except ConfigError as error:
        raise unusable(error.thing, error.found, error.allowed) from error


def _read_corrected(data: bytes, drawing: Drawing) -> Pixels:
    pixels = read_picture(data, thing="corrected")
    height, width = drawing.darkness.shape
    if pixels.shape[:2] != (height, width):
        found = f"is {pixels.shape[1]} x {pixels.shape[0]} pixels"
        raise unusable("corrected", found, f"the size of the drawing, {width} x {height}")
    return pixels


def _correction(
    kept: KeptRequest,
    inputs: Inputs,
    result: Pixels,
    corrected: Pixels,
    hints: tuple[Hint, ...],
    field: str,
    changed: float,
) -> Correction:
    pictures = {
        "sketch.png": inputs.drawing.pixels,
        "lines.png": as_gray(inputs.drawing),
        **{f"reference-{number}.png": one for number, one in enumerate(inputs.references, start=1)},
        "result.png": result,
        "corrected.png": corrected,
    }
    files = {name: encode_png(pixels) for name, pixels in pictures.items()}
    record = {
        "format": FORMAT,
        "request_id": kept.request_id,
        "key": kept.key,
        "model_version": kept.model_version,
        "answered": kept.time,
        "time": now(),
        "kind": "picture" if field == "corrected" else "hints",
        "changed": round(changed, 6) or 1e-6,
        "width": result.shape[1],
        "height": result.shape[0],
        "options": _described(kept),
        "hints": [
            {"x": hint.x, "y": hint.y, "color": hex_of(hint.color), "scope": hint.scope, "learned": hint.learned}
            for hint in hints
        ],
        "sha256": {name: hashlib.sha256(pixels.tobytes()).hexdigest() for name, pixels in pictures.items()},
    }
    return Correction(record=record, files=files)


def _described(kept: KeptRequest) -> dict[str, Any]:
    """Return the options of a request for people and programs; a palette or hints from a file are named as a file."""
    options = {**kept.options, **dict.fromkeys(kept.files, "file")}
    if isinstance(options["hints"], str) and options["hints"] != "file":
        options["hints"] = json.loads(options["hints"])
    return options
