"""The HTTP API and the web page. The application needs only a protocol.Backend, not Ray, so uvicorn can serve it.

uvicorn.run(create_app(replica), port=8000)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from animediffusion.platform.api_keys import Keyring
from animediffusion.platform.corrections.store import Corrections
from animediffusion.platform.errors import ConfigError, DeadlineError, NoModelError
from animediffusion.serve.api.access_log import CLIENT_LEFT, AccessLog
from animediffusion.serve.api.auth import KeyAuthentication, key_of
from animediffusion.serve.api.corrections import add_corrections
from animediffusion.serve.api.form import ALLOWED, ColorizeForm, read_form
from animediffusion.serve.api.limits import MAX_BODY_BYTES, UPLOAD_TIMEOUT_S, HeadRequests, RequestLimits
from animediffusion.serve.api.openapi import EVENTS, FORM, KEY, PICTURE, problems
from animediffusion.serve.api.problems import ProblemError, add_handlers, unusable
from animediffusion.serve.api.request_keeper import RequestKeeper
from animediffusion.serve.api.sse import doubt_of, events
from animediffusion.serve.protocol import Answer, Backend, ColorizeJob, ModelsStatus
from animediffusion.serve.rendering.coloring import Style
from animediffusion.serve.rendering.formats import openraster, psd
from animediffusion.serve.rendering.hints import points_for_network
from animediffusion.serve.rendering.render import Inputs, Rendered, read_picture, read_sketch, render, style_of
from animediffusion.serve.rendering.sketch import as_gray

T = TypeVar("T")

FOLDER = Path(__file__).parents[1] / "web"
MEDIA_TYPES = {"ora": openraster.MEDIA_TYPE, "psd": psd.MEDIA_TYPE, "layers": "application/json"}
"""Media types of the outputs that are not PNGs."""
EXAMPLES = tuple(f"{kind}_{number}.png" for number in range(1, 5) for kind in ("sketch", "reference"))


def create_app(
    backend: Backend,
    *,
    keyring: Keyring | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    upload_timeout_s: float = UPLOAD_TIMEOUT_S,
    timeout_s: float = 60,
    num_threads: int = 2,
    names_requests: bool = True,
    corrections: str | None = None,
) -> FastAPI:
    """Return the application for one backend. CORS is off, so browsers allow only requests from the server's own pages.

    Args:
        backend: makes the pictures.
        keyring: the accepted API keys; None accepts every request.
        max_body_bytes: largest body of a request.
        upload_timeout_s: time for the body of a request to arrive.
        timeout_s: time for one picture, including the time in the queue.
        num_threads: number of threads that decode uploads and render pictures.
        names_requests: whether to add the header X-Request-Id; False if a proxy in front adds it.
        corrections: corrections store, a folder or s3:// URI; None keeps no request and takes no corrections.
    """
    store = None if corrections is None else Corrections(corrections)
    keeper = None if store is None else RequestKeeper(store)
    keyring = keyring or Keyring(None)
    # python_multipart warns about every malformed body. The response reports this error already.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with keyring.watching(), contextlib.nullcontext() if keeper is None else keeper.running():
            yield

    app = FastAPI(
        lifespan=lifespan,
        title="AnimeDiffusion",
        version=version("animediffusion"),
        description="Colors anime line art from a reference image. A server with API keys requires one in every "
        "request: Authorization: Bearer KEY.",
        docs_url=None,
        redoc_url=None,
        # The URL of a redirect would lack a path prefix that a proxy in front has removed.
        redirect_slashes=False,
    )
    # The middleware that is added last is the outermost.
    app.add_middleware(KeyAuthentication, keyring=keyring)
    app.add_middleware(
        RequestLimits,
        max_body_bytes=max_body_bytes,
        upload_timeout_s=upload_timeout_s,
        names_requests=names_requests,
    )
    app.add_middleware(HeadRequests)
    app.add_middleware(AccessLog)
    add_handlers(app)
    _add_pages(app)
    _add_colorize(app, backend, ThreadPoolExecutor(num_threads, "pictures"), timeout_s, keeper)
    add_corrections(app, keeper, timeout_s)
    _add_status(app, backend)
    return app


def _add_colorize(
    app: FastAPI, backend: Backend, pool: ThreadPoolExecutor, timeout_s: float, keeper: RequestKeeper | None
) -> None:
    def keep(form: ColorizeForm, answer: Answer, request: Request) -> bool:
        """Keep an answered request if corrections are on; return whether its picture can be corrected."""
        is_picture = form.output != "doubt"
        return (
            keeper is not None and is_picture and keeper.keep(form, answer, key_of(request), request.state.request_id)
        )

    @app.post("/v1/colorize", response_class=Response, openapi_extra=FORM, responses=PICTURE, dependencies=[KEY])
    async def colorize(request: Request) -> Response:
        """Color a sketch with the colors of a reference; return a PNG, a file with layers, or JSON."""
        form = await read_form(request)
        loop = asyncio.get_running_loop()
        if form.output == "both":
            raise unusable("output", "both", ALLOWED["output"])
        inputs, job = await loop.run_in_executor(pool, _to_job, form, timeout_s, key_of(request))
        answer = await _unless_disconnected(request, backend.colorize(job), timeout_s)
        request.state.model_version = answer.model_version
        made, body = await loop.run_in_executor(pool, _rendered, answer, inputs, form)
        keep(form, answer, request)
        style = form.rendering.usual_style if form.output == "doubt" else made.style
        headers = {"X-Model-Version": answer.model_version, **_headers(form, style)}
        if form.hints is not None:
            headers["X-Hints"] = "learned" if answer.saw_hints else "spread" if job.hints else "exact"
        if made.regions is not None:
            headers["X-Regions"] = str(len(made.regions))
        return Response(body, media_type=MEDIA_TYPES.get(form.output, "image/png"), headers=headers)

    @app.post(
        "/v1/colorize/stream",
        response_class=StreamingResponse,
        openapi_extra=FORM,
        responses=EVENTS,
        dependencies=[KEY],
    )
    async def colorize_stream(request: Request) -> StreamingResponse:
        """Color a sketch, with server-sent events: `progress` with a preview per step, then `result` or `error`."""
        form = await read_form(request)
        loop = asyncio.get_running_loop()
        inputs, job = await loop.run_in_executor(pool, _to_job, form, timeout_s, key_of(request))
        items = backend.stream(job)
        # Wait for the first item, so that an early error (busy, late, unusable) is a response with its own HTTP status.
        first = await _unless_disconnected(request, _first(items), timeout_s)
        style = await loop.run_in_executor(pool, style_of, inputs.drawing, form.rendering)
        body = events(first, items, inputs, form, request.state, pool, lambda answer: keep(form, answer, request))
        return StreamingResponse(body, media_type="text/event-stream", headers=_headers(form, style))


def _headers(form: ColorizeForm, style: Style) -> dict[str, str]:
    return {"X-Seed": str(form.seed), "X-Style": style, "Cache-Control": "no-store"}


def _rendered(answer: Answer, inputs: Inputs, form: ColorizeForm) -> tuple[Rendered, bytes]:
    """Return what render() returns, and the body of the response."""
    if form.output == "doubt":
        found = doubt_of(answer, inputs.drawing, form)
        return Rendered({"doubt": found}), found
    made = render(answer.picture, *inputs, output=form.output, options=form.rendering)
    if form.output == "layers":
        return made, json.dumps(made.as_json()).encode()
    return made, made.files[form.output]


async def _first(items: AsyncIterator[T]) -> T:
    return await anext(items)


def _to_job(form: ColorizeForm, timeout_s: float, key: str) -> tuple[Inputs, ColorizeJob]:
    """Decode and check the files of a form, once for the network and for the finished picture."""
    try:
        form.rendering.check(form.output)
        drawing = read_sketch(form.sketch)
        hints = form.rendering.read_hints(drawing)
    except ConfigError as error:
        raise unusable(error.thing, error.found, error.allowed) from error
    many = len(form.reference) > 1
    references = tuple(
        read_picture(reference, thing=f"reference {number}" if many else "reference")
        for number, reference in enumerate(form.reference, start=1)
    )
    job = ColorizeJob(
        lines=as_gray(drawing),
        references=references,
        options=form.options,
        timeout_s=timeout_s,
        key=key,
        wants_doubt=form.output == "doubt",
        hints=tuple(points_for_network(hints)),
    )
    return Inputs(drawing, references, hints), job


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
    """Return the result of `work`; cancel it if the client disconnects or the timeout passes."""
    working = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(request.receive())  # After the body, the next message is the disconnect.
    try:
        done, _ = await asyncio.wait({working, disconnect}, timeout=timeout_s + 1, return_when=asyncio.FIRST_COMPLETED)
        if working in done:
            return working.result()
        if disconnect in done:
            raise ProblemError(CLIENT_LEFT, "the client closed the connection")
        raise DeadlineError("no answer in time")
    finally:
        for task in (working, disconnect):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await disconnect


def _add_status(app: FastAPI, backend: Backend) -> None:
    @app.get("/v1/models", responses=problems(401), dependencies=[KEY])
    async def models() -> ModelsStatus:
        """Return the desired versions, the traffic of each version, and the state of every replica."""
        return await backend.models()

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Return 200 as long as the process responds."""
        return {"status": "ok"}

    @app.get("/readyz", responses=problems(503))
    async def readyz() -> dict[str, str]:
        """Return 200 if pictures can be made, else 503."""
        if not await backend.is_ready():
            raise NoModelError("the server is still loading one")
        return {"status": "ready"}


def _add_pages(app: FastAPI) -> None:
    def page(path: str, file: str, media_type: str = "text/html") -> None:
        @app.get(path, include_in_schema=False)
        async def show() -> Response:
            return Response((FOLDER / file).read_text(), media_type=media_type, headers={"Cache-Control": "no-cache"})

    page("/", "page.html")
    page("/page.css", "page.css", "text/css")
    page("/docs", "docs.html")
    for script in sorted((FOLDER / "scripts").glob("*.js")):
        page(f"/scripts/{script.name}", f"scripts/{script.name}", "text/javascript")

    @app.get("/examples/{name}", include_in_schema=False)
    async def example(name: str) -> Response:
        if name not in EXAMPLES:
            raise ProblemError(404, f"no example {name[:80]!r}; choose one of {', '.join(EXAMPLES)}")
        return Response(
            (FOLDER / "examples" / name).read_bytes(), media_type="image/png", headers={"Cache-Control": "max-age=3600"}
        )

    @app.get("/examples", include_in_schema=False)
    async def examples() -> JSONResponse:
        return JSONResponse({"examples": [name for name in EXAMPLES if (FOLDER / "examples" / name).exists()]})
