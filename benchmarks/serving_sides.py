"""The servers that benchmarks/serving.py compares: three ways to run requests, with the same HTTP code and model.

one      runs one request at a time behind FastAPI and uvicorn
batch    uses @serve.batch on Ray Serve: requests that arrive within 10 ms run together, each row at its own times,
         until the longest one is done
ours     uses serve/engine/engine.py in a Replica, behind FastAPI and uvicorn
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI

from animediffusion.models.bundle import Bundle, load_bundle
from animediffusion.models.colorize import noise_for
from animediffusion.models.diffusion.sampler import build_sampler, cat_states, sample_times
from animediffusion.models.tensors import to_tensor, to_uint8
from animediffusion.platform.images.codec import letterbox
from animediffusion.serve.api.app import create_app
from animediffusion.serve.protocol import Answer, ColorizeJob, ModelsStatus, Preview
from animediffusion.serve.rendering.sketch import Pixels, for_network
from animediffusion.serve.replica.replica import Replica

BATCH_WAIT_S = 0.01


@dataclass(frozen=True)
class Side:
    """Settings of one server."""

    name: str
    model: str
    port: int
    threads: int
    max_batch: int
    precision: str
    timeout_s: float


class Rival:
    """A backend for the HTTP API without an engine."""

    def __init__(self, side: Side) -> None:
        torch.set_num_threads(side.threads)
        self.bundle: Bundle = load_bundle(side.model, dtype=getattr(torch, side.precision))
        self.turn = asyncio.Lock()

    async def colorize(self, job: ColorizeJob) -> Answer:
        """Color one job at a time."""
        async with self.turn:
            [picture] = await asyncio.to_thread(color_together, self.bundle, [job])
        return Answer(picture=picture, model_version="1")

    async def stream(self, job: ColorizeJob) -> AsyncIterator[Preview | Answer]:
        """Yield the answer without previews."""
        yield await self.colorize(job)

    async def models(self) -> ModelsStatus:
        """Return no information on models."""
        return ModelsStatus(desired={}, traffic={}, replicas=[])

    async def is_ready(self) -> bool:
        """Return true, because the model is loaded on construction."""
        return True


@torch.inference_mode()
def color_together(bundle: Bundle, jobs: list[ColorizeJob]) -> list[Pixels]:
    """Color a fixed batch: encode once, then evaluate all rows as often as the longest job needs."""
    denoiser, size = bundle.denoiser, bundle.config.image_size
    sketch = torch.cat([_tensor(for_network(job.lines, size)) for job in jobs])
    reference = torch.cat([_tensor(letterbox(job.references[0], size)[0]) for job in jobs])
    condition = denoiser.encode(sketch, reference)
    settings = [replace(job.options, guidance_scale=1.0, sampler=None).apply_to(bundle.config.sampler) for job in jobs]
    sampler = build_sampler(settings[0].name, denoiser.path)
    state = cat_states(
        [
            sampler.start(
                noise_for(job.options.seed, size)[None], sample_times(denoiser.path, one.steps, shift=one.shift)
            )
            for job, one in zip(jobs, settings, strict=True)
        ]
    )
    for _ in range(max(sampler.num_evaluations(one.steps) for one in settings)):
        x, t = sampler.query(state)
        state = sampler.advance(state, denoiser(x, t, condition))
    return list(to_uint8(state.x).numpy())


def _tensor(pixels: Pixels) -> torch.Tensor:
    return to_tensor(torch.from_numpy(np.ascontiguousarray(pixels))[None])


def run_side(side: Side) -> None:
    """Serve until the process is terminated."""
    if side.name == "batch":
        asyncio.run(_serve_batch(side))
    elif side.name == "one":
        _serve(create_app(Rival(side), timeout_s=side.timeout_s), side.port)
    else:
        torch.set_num_threads(side.threads)
        replica = Replica(max_batch=side.max_batch, max_queue=2 * side.max_batch, precision=side.precision)  # type: ignore[arg-type]
        if not replica.load("1", Path(side.model)):
            raise SystemExit(f"error: {side.model}: {replica.error}; give a bundle folder")
        _serve(create_app(replica, timeout_s=side.timeout_s), side.port)


def _serve(app: FastAPI, port: int) -> None:
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


async def _serve_batch(side: Side) -> None:
    import ray
    from ray import serve

    class Batched(Rival):
        def __serve_build_asgi_app__(self) -> FastAPI:
            return create_app(self, timeout_s=side.timeout_s, names_requests=False)

        async def colorize(self, job: ColorizeJob) -> Answer:
            return Answer(picture=await self.together(job), model_version="1")

        @serve.batch(max_batch_size=side.max_batch, batch_wait_timeout_s=BATCH_WAIT_S)
        async def together(self, jobs: list[ColorizeJob]) -> list[Pixels]:
            return await asyncio.to_thread(color_together, self.bundle, jobs)

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    deployment = serve.deployment(serve.ingress()(Batched)).options(
        max_ongoing_requests=1000, ray_actor_options={"num_cpus": 1}
    )
    serve.start(http_options={"host": "127.0.0.1", "port": side.port})
    serve.run(deployment.bind(side))
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.Event().wait()
