"""The HTTP API and the page. Knows a Backend and nothing of Ray: uvicorn serves it as it is.

uvicorn.run(create_app(replica), port=8000)
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from animediffusion.serve.form import ALLOWED, ColorizeForm, Parameters, read_form
from animediffusion.serve.limits import RequestLimits
from animediffusion.serve.lines import Drawing, as_gray
from animediffusion.serve.messages import Backend, Job, LateError, NoModelError
from animediffusion.serve.pictures import read_picture, read_sketch, render
from animediffusion.serve.problems import MEDIA_TYPE, ProblemError, add_handlers, unusable
from animediffusion.serve.stream import events

T = TypeVar("T")

MAX_BODY_BYTES = 32 * 2**20
CLIENT_LEFT = 499
"""nginx's code for a client that closed the connection; nobody receives it."""

FOLDER = Path(__file__).parent
EXAMPLES = tuple(f"{kind}_{number}.png" for number in range(1, 5) for kind in ("sketch", "reference"))


def create_app(
    backend: Backend,
    *,
    max_body_bytes: int = MAX_BODY_BYTES,
    timeout_s: float = 60,
    num_threads: int = 2,
    names_requests: bool = True,
) -> FastAPI:
    """The application for one backend.

    Args:
        backend: where pictures are made.
        max_body_bytes: of a request.
        timeout_s: for one picture, waiting included.
        num_threads: that decode uploads and finish pictures.
        names_requests: add the header X-Request-Id; False where the server in front does.
    """
    app = FastAPI(
        title="AnimeDiffusion",
        version=version("animediffusion"),
        description="Colors anime line art from a reference image.",
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(RequestLimits, max_body_bytes=max_body_bytes, names_requests=names_requests)
    add_handlers(app)
    _add_pages(app)
    _add_colorize(app, backend, ThreadPoolExecutor(num_threads, "pictures"), timeout_s)
    _add_status(app, backend)
    return app


def _add_colorize(app: FastAPI, backend: Backend, pool: ThreadPoolExecutor, timeout_s: float) -> None:
    @app.post("/v1/colorize", response_class=Response, openapi_extra=_FORM, responses=_ANSWERS)
    async def colorize(request: Request) -> Response:
        """Color a sketch with the colors of a reference; answers with a PNG."""
        form = await read_form(request)
        asked, loop = form.parameters, asyncio.get_running_loop()
        if asked.output == "both":
            raise unusable("output", "both", ALLOWED["output"])
        drawing, job = await loop.run_in_executor(pool, _to_job, form, timeout_s)
        answer = await _unless_client_leaves(request, backend.colorize(job), timeout_s)
        png = await loop.run_in_executor(
            pool, lambda: render(answer.picture, drawing, output=asked.output, size=asked.size)[asked.output]
        )
        headers = {"X-Model-Version": answer.model_version, "X-Seed": str(asked.seed), "Cache-Control": "no-store"}
        return Response(png, media_type="image/png", headers=headers)

    @app.post("/v1/colorize/stream", response_class=StreamingResponse, openapi_extra=_FORM, responses=_EVENTS)
    async def colorize_stream(request: Request) -> StreamingResponse:
        """The same as server-sent events: `progress` with a preview after each step, then `result` or `error`."""
        form = await read_form(request)
        drawing, job = await asyncio.get_running_loop().run_in_executor(pool, _to_job, form, timeout_s)
        items = backend.stream(job)
        # Waiting for the first one keeps busy, late and unusable an ordinary answer with its status.
        first = await _unless_client_leaves(request, _first(items), timeout_s)
        body = events(first, items, drawing, form.parameters, request.state.request_id, pool)
        headers = {"Cache-Control": "no-store", "X-Seed": str(form.parameters.seed)}
        return StreamingResponse(body, media_type="text/event-stream", headers=headers)


async def _first(items: AsyncIterator[T]) -> T:
    return await anext(items)


def _to_job(form: ColorizeForm, timeout_s: float) -> tuple[Drawing, Job]:
    asked = form.parameters
    drawing = read_sketch(form.sketch)
    job = Job(
        lines=as_gray(drawing),
        reference=read_picture(form.reference),
        seed=asked.seed,
        steps=asked.num_inference_steps,
        guidance_scale=asked.guidance_scale,
        sampler=asked.sampler,
        timeout_s=timeout_s,
    )
    return drawing, job


async def _unless_client_leaves(request: Request, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
    """The result of `work`, which is cancelled when nobody waits for it any more, or not any longer."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(request.receive())  # the body is read: what comes next is the disconnect
    try:
        done, _ = await asyncio.wait({working, leaving}, timeout=timeout_s + 1, return_when=asyncio.FIRST_COMPLETED)
        if working in done:
            return working.result()
        if leaving in done:
            raise ProblemError(CLIENT_LEFT, "the client closed the connection")
        raise LateError("no answer in time")
    finally:
        for task in (working, leaving):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await leaving


def _add_status(app: FastAPI, backend: Backend) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """Which versions are wanted, which get traffic, and what every replica does."""
        return await backend.models()

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Answers as long as the process does."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: {"description": "No model yet", "content": {MEDIA_TYPE: {}}}})
    async def readyz() -> dict[str, str]:
        """200 once pictures can be made."""
        if not await backend.is_ready():
            raise NoModelError("none is loaded yet")
        return {"status": "ready"}


def _add_pages(app: FastAPI) -> None:
    def page(path: str, file: str, media_type: str = "text/html") -> None:
        @app.get(path, include_in_schema=False)
        async def show() -> Response:
            return Response((FOLDER / file).read_text(), media_type=media_type, headers={"Cache-Control": "no-cache"})

    page("/", "page.html")
    page("/page.css", "page.css", "text/css")
    page("/page.js", "page.js", "text/javascript")
    page("/colorize.js", "colorize.js", "text/javascript")
    page("/docs", "docs.html")

    @app.get("/examples/{name}", include_in_schema=False)
    async def example(name: str) -> Response:
        if name not in EXAMPLES:
            raise ProblemError(404, f"no example {name[:80]!r}; there are {', '.join(EXAMPLES)}")
        return Response((FOLDER / name).read_bytes(), media_type="image/png", headers={"Cache-Control": "max-age=3600"})

    @app.get("/examples", include_in_schema=False)
    async def examples() -> JSONResponse:
        return JSONResponse({"examples": [name for name in EXAMPLES if (FOLDER / name).exists()]})


def _form_schema() -> dict[str, Any]:
    schema = Parameters.model_json_schema()
    files = {
        "sketch": {
            "type": "string",
            "format": "binary",
            "description": "Line art: PNG, JPEG or WebP, up to 25 Mpixel.",
        },
        "reference": {"type": "string", "format": "binary", "description": "A picture with the wanted colors."},
    }
    return {"type": "object", "required": ["sketch", "reference"], "properties": {**files, **schema["properties"]}}


_FORM = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _form_schema()}}}}

_REASONS = {
    400: "Not multipart, or a file is missing",
    413: "The body is over the limit",
    415: "The bytes are no PNG, JPEG or WebP",
    422: "An image or a parameter is not usable; `errors` says which",
    429: "Busy; `Retry-After` says when to come back",
    503: "No model is loaded",
    504: "Not finished in time",
}
_PROBLEM_SCHEMA = {
    "type": "object",
    "required": ["type", "title", "status", "detail", "request_id"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "request_id": {"type": "string"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {name: {"type": "string"} for name in ("field", "found", "allowed")},
            },
        },
    },
}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The picture",
        "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
        "headers": {
            name: {"schema": {"type": "string"}, "description": what}
            for name, what in {
                "X-Model-Version": "Registry number, or sha256 and 12 hex digits",
                "X-Seed": "The seed that was used",
                "X-Request-Id": "Names this request in logs",
            }.items()
        },
    },
    **{
        code: {"description": why, "content": {MEDIA_TYPE: {"schema": _PROBLEM_SCHEMA}}}
        for code, why in _REASONS.items()
    },
}
_EVENTS = {
    **_ANSWERS,
    200: {"description": "Events", "content": {"text/event-stream": {"schema": {"type": "string"}}}},
}
