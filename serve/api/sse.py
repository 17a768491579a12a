"""Progress and result of a picture as server-sent events: progress, progress, ..., result (or error)."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from typing import Any

from fastapi.sse import format_sse_event
from starlette.datastructures import State

from animediffusion.platform.images.codec import encode_png, place_in_square
from animediffusion.serve.api.form import ColorizeForm
from animediffusion.serve.api.problems import from_error, unusable
from animediffusion.serve.protocol import Answer, Preview
from animediffusion.serve.rendering.doubt import render_doubt
from animediffusion.serve.rendering.render import Inputs, render
from animediffusion.serve.rendering.sketch import Drawing, Pixels


async def events(
    first: Preview | Answer,
    rest: AsyncIterator[Preview | Answer],
    inputs: Inputs,
    form: ColorizeForm,
    state: State,
    pool: Executor,
    keep: Callable[[Answer], bool] = lambda _: False,
) -> AsyncIterator[bytes]:
    """Yield the events of the response; close `rest` at the end, or when the client disconnects.

    Args:
        first: first item from the backend. The caller awaits it, so that an early error is an ordinary error response.
        rest: further items from the backend.
        inputs: the decoded inputs of the request.
        form: the request.
        state: state of the request: the last event contains its `request_id`, and this function sets `model_version`.
        pool: executor that renders pictures.
        keep: called with the answer; returns whether its picture can be corrected, which the last event says.
    """
    loop = asyncio.get_running_loop()
    try:
        async for item in _chain(first, rest):
            if isinstance(item, Preview):
                yield _event("progress", await loop.run_in_executor(pool, _progress, item, inputs.drawing))
            else:
                state.model_version = item.model_version
                result = await loop.run_in_executor(pool, _result, item, inputs, form)
                correctable = {"correctable": True} if keep(item) else {}
                yield _event("result", {**result, "request_id": state.request_id, **correctable})
    except Exception as error:
        yield _event("error", from_error(error, state.request_id).body(state.request_id))
    finally:
        close = getattr(rest, "aclose", None)
        if close is not None:
            await close()


async def _chain(first: Preview | Answer, rest: AsyncIterator[Preview | Answer]) -> AsyncIterator[Preview | Answer]:
    yield first
    async for item in rest:
        yield item


def _progress(item: Preview, drawing: Drawing) -> dict[str, Any]:
    picture = base64.b64encode(encode_png(_inside(item.picture, drawing))).decode()
    return {"step": item.step, "total": item.total, "preview": f"data:image/png;base64,{picture}"}


def _result(item: Answer, inputs: Inputs, form: ColorizeForm) -> dict[str, Any]:
    if form.output == "doubt":
        doubt = base64.b64encode(doubt_of(item, inputs.drawing, form)).decode()
        return {"image": doubt, "model_version": item.model_version, "seed": form.seed}
    made = render(item.picture, *inputs, output=form.output, options=form.rendering)
    if form.output == "layers":
        found = made.as_json()
    else:
        files = made.files if form.output == "both" else {"image": made.files[form.output]}
        found = {name: base64.b64encode(data).decode() for name, data in files.items()}
    return {**found, "model_version": item.model_version, "seed": form.seed}


def doubt_of(answer: Answer, drawing: Drawing, form: ColorizeForm) -> bytes:
    """Return the doubt about a picture as a PNG; raise ProblemError if the model has none."""
    if answer.doubt is None:
        raise unusable("output", "doubt, which this model cannot tell", "a model with a matcher, or another output")
    return render_doubt(answer.doubt, drawing, form.size)


def _inside(picture: Pixels, drawing: Drawing) -> Pixels:
    """Return the network's square without the margins of the letterbox."""
    height, width = drawing.darkness.shape
    box = place_in_square(height, width, len(picture))
    return picture[box.top : box.top + box.height, box.left : box.left + box.width]


def _event(name: str, data: dict[str, Any]) -> bytes:
    return format_sse_event(event=name, data_str=json.dumps(data))
