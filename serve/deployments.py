"""The application on Ray Serve: an ingress that speaks HTTP and an engine that colors.

    app = build_app(ServeConfig(max_batch=8))       # also `import_path` of a Serve config file
    serve.run(app)

All limits follow from one number, `max_batch`: an engine replica is asked to run that many requests, may hold twice
as many, and the rest waits in the ingress or is told to come back later.
"""

# No `from __future__ import annotations` here: Ray Serve checks a config file's `args` against the class that stands in
# build_app's signature, and does not look up a name.

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import torch
from fastapi import FastAPI
from pydantic import Field
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from animediffusion.models.attention import use_attention
from animediffusion.platform.config import Config, Settings
from animediffusion.serve.api import MAX_BODY_BYTES, create_app
from animediffusion.serve.messages import Answer, BusyError, Job, LateError, NoModelError, Preview, ServeError
from animediffusion.serve.replica import Precision, Replica
from animediffusion.serve.versions import Follower, ModelSource

APP_NAME = "animediffusion"
STATUS_TIMEOUT_S = 5.0


class ServeConfig(Config):
    """What an installation may set; the same keys in a Serve config file's `args`."""

    model: str | None = None
    """Bundle folder or URI, or a registered version or alias; the champion if left out."""
    workspace: Path | None = None
    """As the command's --workspace."""
    model_name: str | None = None
    """Registered model name."""
    max_batch: Annotated[int, Field(ge=1, le=256)] = 8
    """Places in an engine's batch; a guided request takes two."""
    min_replicas: Annotated[int, Field(ge=0)] = 1
    """Engines that are always up; 0 lets the last one go when nobody asks."""
    max_replicas: Annotated[int, Field(ge=1)] = 1
    """Engines at most."""
    num_ingress_replicas: Annotated[int, Field(ge=1)] = 1
    """HTTP processes."""
    engine_cpus: Annotated[float, Field(ge=0)] = 1
    """Logical CPUs that Ray reserves for an engine."""
    engine_gpus: Annotated[float, Field(ge=0)] | None = None
    """GPUs, or a fraction of one, of an engine; 1 where this machine has CUDA if left out."""
    num_threads: Annotated[int, Field(ge=1)] | None = None
    """Threads of an engine's arithmetic on the CPU; its share of the machine if left out."""
    precision: Precision = "float32"
    """What the network computes in; bfloat16 is about twice as fast where the hardware has it."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = MAX_BODY_BYTES
    """Of one request."""
    timeout_s: Annotated[float, Field(gt=0)] = 60
    """For one picture, waiting included."""
    poll_s: Annotated[float, Field(gt=0)] = 3
    """How often an engine looks whether another version is wanted."""

    def settings(self) -> Settings:
        """The settings that workers use."""
        return Settings.from_environment(workspace=self.workspace, model_name=self.model_name)


def build_app(args: ServeConfig) -> serve.Application:
    """The application, ready for serve.run."""
    gpus = args.engine_gpus if args.engine_gpus is not None else float(torch.cuda.is_available())
    engine = serve.deployment(EngineDeployment).options(
        name="engine",
        ray_actor_options={"num_cpus": args.engine_cpus, "num_gpus": gpus},
        max_ongoing_requests=2 * args.max_batch,
        max_queued_requests=max(1, 2 * args.max_batch),
        autoscaling_config={
            "min_replicas": args.min_replicas,
            "max_replicas": max(args.max_replicas, args.min_replicas),
            "target_ongoing_requests": args.max_batch,
            "upscale_delay_s": 5,
            "downscale_delay_s": 60,
        },
        graceful_shutdown_timeout_s=args.timeout_s,
    )
    ingress = serve.deployment(IngressDeployment).options(
        name="ingress",
        num_replicas=args.num_ingress_replicas,
        ray_actor_options={"num_cpus": 0.25},
        # Far above what the engines hold: it is the engine's queue that says no, with a problem of our own.
        max_ongoing_requests=max(100, 16 * args.max_batch * args.max_replicas),
    )
    application: serve.Application = ingress.bind(args, engine.bind(args))
    return application


class EngineDeployment:
    """A Replica that follows the registry."""

    def __init__(self, args: ServeConfig) -> None:
        cores = os.cpu_count() or 1
        torch.set_num_threads(args.num_threads or max(1, cores // max(1, args.max_replicas)))
        name = serve.get_replica_context().replica_id.unique_id
        # Serve admits 2 max_batch at most, so the engine's own queue never refuses anybody.
        use_attention(args.settings().attention)
        self.replica = Replica(
            max_batch=args.max_batch, max_queue=2 * args.max_batch, name=name, precision=args.precision
        )
        self.follower = Follower(self.replica, ModelSource(args.settings(), args.model), args.poll_s)
        self.follower.start()

    async def colorize(self, job: Job) -> Answer:
        """See Replica.colorize."""
        return await self.replica.colorize(job)

    async def stream(self, job: Job) -> AsyncIterator[Preview | Answer]:
        """See Replica.stream."""
        async for item in self.replica.stream(job):
            yield item

    async def describe(self) -> dict[str, Any]:
        """See Follower.describe."""
        return self.follower.describe()

    def check_health(self) -> None:
        """Ray replaces the replica if this raises."""
        self.replica.check()

    def __del__(self) -> None:
        if hasattr(self, "follower"):
            self.follower.stop()
            self.replica.close()


class _RayBackend:
    """api.Backend over the engines' handle."""

    def __init__(self, engine: DeploymentHandle) -> None:
        self.engine = engine

    async def colorize(self, job: Job) -> Answer:
        response = self.engine.colorize.remote(job)
        try:
            answer: Answer = await response
            return answer
        except asyncio.CancelledError:
            response.cancel()
            raise
        except Exception as error:
            raise _translated(error) from error

    async def stream(self, job: Job) -> AsyncIterator[Preview | Answer]:
        response = self.engine.options(stream=True).stream.remote(job)
        try:
            async for item in response:
                yield item
        except (asyncio.CancelledError, GeneratorExit):
            response.cancel()
            raise
        except Exception as error:
            raise _translated(error) from error

    async def models(self) -> dict[str, Any]:
        found = await self._describe()
        replicas = [one["replica"] for one in found]
        answering = [replica["versions"][0] for replica in replicas if replica["versions"]]
        traffic = {version: answering.count(version) / len(answering) for version in sorted(set(answering))}
        desired = found[0]["desired"] if found else {"champion": None, "challenger": None}
        return {"desired": desired, "traffic": traffic, "replicas": replicas}

    async def is_ready(self) -> bool:
        return any(one["replica"]["state"] == "ready" for one in await self._describe())

    async def _describe(self) -> list[dict[str, Any]]:
        """What every running engine says of itself; none where none answers in time."""
        try:
            return list(await self.engine.broadcast("describe").results_async(timeout_s=STATUS_TIMEOUT_S))
        except Exception:  # none is running, or one died just now: neither is an error of who asks
            return []


@serve.ingress()
class IngressDeployment:
    """The HTTP side."""

    def __init__(self, args: ServeConfig, engine: DeploymentHandle) -> None:
        self.args = args
        self.engine = engine

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray Serve once this object is made."""
        backend = _RayBackend(self.engine)
        return create_app(
            backend,
            max_body_bytes=self.args.max_body_bytes,
            timeout_s=self.args.timeout_s,
            names_requests=False,  # Serve's proxy does
        )


def _translated(error: Exception) -> Exception:
    """What Ray wraps or says itself, in the words of messages.py."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        return cause if isinstance(cause, ServeError) else error
    if isinstance(error, BackPressureError):
        return BusyError("every engine's queue is full")
    if isinstance(error, DeploymentUnavailableError | RayActorError):
        return NoModelError("no engine is running")
    if isinstance(error, TimeoutError):
        return LateError("no answer in time")
    return error
