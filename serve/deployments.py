"""The application on Ray Serve: an ingress that speaks HTTP and an engine that colors.

    app = build_app(ServeConfig(max_batch=8))       # also `import_path` of a Serve config file
    serve.run(app)

All limits follow from one number, `max_batch`: an engine replica is asked to run that many requests, may hold twice
as many, and the rest waits in the ingress or is told to come back later. Engines come and go with the pending work,
see serve/autoscaling.py.
"""

# No `from __future__ import annotations` here: Ray Serve checks a config file's `args` against the class that stands in
# build_app's signature, and does not look up a name.

import asyncio
import os
import time
import warnings
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import ray
import torch
from fastapi import FastAPI
from pydantic import AfterValidator, Field
from ray import serve
from ray.serve.config import AutoscalingConfig
from ray.serve.handle import DeploymentHandle

from animediffusion.models.network.attention import use_attention
from animediffusion.models.numerics import choose_numerics
from animediffusion.platform.api_keys import Keyring, Keys
from animediffusion.platform.config import Config, Settings
from animediffusion.platform.errors import ConfigError
from animediffusion.serve import autoscaling as scaling
from animediffusion.serve.api import access_log as journal
from animediffusion.serve.api.app import create_app
from animediffusion.serve.api.limits import MAX_BODY_BYTES, UPLOAD_TIMEOUT_S
from animediffusion.serve.protocol import Answer, ColorizeJob, Preview
from animediffusion.serve.ray_backend import RayBackend
from animediffusion.serve.replica.device import Precision, usable_device
from animediffusion.serve.replica.follower import Follower
from animediffusion.serve.replica.model_source import ModelSource
from animediffusion.serve.replica.prometheus import Exporter
from animediffusion.serve.replica.replica import Replica

APP_NAME = "animediffusion"
STARTING_PATIENCE_S = 60.0
"""For which a new engine waits for a registry that is away; then Ray starts another one in its place."""
LOADING_PATIENCE_S = 5.0
"""For which a request waits at an engine that has no model or no device. Were it refused immediately, that engine would
always be the one with the shortest queue, and get all requests in place of those that work."""
HEALTH_PERIOD_S = 3.0
"""Ray replaces an engine after three failed checks in a row."""


def _whole_above_one(gpus: float | None) -> float | None:
    if gpus is not None and gpus > 1 and gpus % 1:
        raise ValueError("a fraction of one GPU, or a whole number of them")
    return gpus


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
    """Engines that are always up; 0 lets the last one go when nobody asks, and the next request starts one."""
    max_replicas: Annotated[int, Field(ge=1)] = 1
    """Engines at most."""
    upscale_delay_s: Annotated[float, Field(ge=0)] = 5
    """How long the work must ask for more engines before there are more."""
    downscale_delay_s: Annotated[float, Field(ge=0)] = 60
    """How long it must ask for fewer."""
    downscale_to_zero_delay_s: Annotated[float, Field(ge=0)] = 300
    """How long nobody must have asked before the last one goes."""
    num_ingress_replicas: Annotated[int, Field(ge=1)] = 1
    """HTTP processes."""
    engine_cpus: Annotated[float, Field(ge=0)] = 1
    """Logical CPUs that Ray reserves for an engine."""
    engine_gpus: Annotated[float, Field(ge=0), AfterValidator(_whole_above_one)] | None = None
    """GPUs, or a fraction of one, of an engine; 1 where the cluster has any if left out."""
    num_threads: Annotated[int, Field(ge=1)] | None = None
    """Threads of an engine's arithmetic on the CPU; its share of the machine if left out."""
    precision: Precision = "auto"
    """What the network computes in: float32 or bfloat16; auto is bfloat16 on a GPU that has it, else float32."""
    compile: bool = False
    """Whether torch.compile makes larger kernels of the network; a version then takes minutes to load."""
    keys: str | None = None
    """File of the API keys' hashes, a path or s3://; in the workspace if left out. Read again every few seconds."""
    allow_anonymous: bool = False
    """Let everybody in while no key was ever made: for a server that only this machine reaches."""
    request_log: Path | None = None
    """File for the line of JSON about each request; the process's stderr if left out, which Ray keeps in its logs."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = MAX_BODY_BYTES
    """Of one request. Serve's proxy has a limit of its own, see serve/proxy.py."""
    upload_timeout_s: Annotated[float, Field(gt=0)] = UPLOAD_TIMEOUT_S
    """For the body of a request to arrive."""
    timeout_s: Annotated[float, Field(gt=0)] = 60
    """For one picture, waiting included."""
    poll_s: Annotated[float, Field(gt=0)] = 3
    """How often an engine looks whether another version is wanted."""

    def settings(self) -> Settings:
        """The settings that workers use."""
        return Settings.from_environment(workspace=self.workspace, model_name=self.model_name, keys=self.keys)


def build_app(args: ServeConfig) -> serve.Application:
    """The application, ready for serve.run.

    Raises:
        ConfigError: if there is no API key and nobody said that this is meant.
    """
    check_keys(args)
    engine = serve.deployment(EngineDeployment).options(
        name="engine",
        ray_actor_options={"num_cpus": args.engine_cpus, "num_gpus": _gpus(args)},
        max_ongoing_requests=2 * args.max_batch,
        max_queued_requests=max(1, 2 * args.max_batch),
        autoscaling_config=_autoscaling(args),
        # Pictures that are being made when a replica has to go are finished.
        graceful_shutdown_timeout_s=args.timeout_s,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=30,
    )
    ingress = serve.deployment(IngressDeployment).options(
        name="ingress",
        num_replicas=args.num_ingress_replicas,
        ray_actor_options={"num_cpus": 0.25},
        # Far above what the engines hold: it is the engine's queue that says no, with a problem of our own.
        max_ongoing_requests=max(100, 16 * args.max_batch * args.max_replicas),
        graceful_shutdown_timeout_s=args.timeout_s + 5,
    )
    application: serve.Application = ingress.bind(args, engine.bind(args))
    return application


def check_keys(args: ServeConfig) -> None:
    """Raise ConfigError if nobody, or without meaning it everybody, could use the server."""
    uri = args.settings().keys_uri
    keys = Keys(uri)
    if not keys.active() and (keys.entries() or not args.allow_anonymous):
        what_to_do = "make one with `animediffusion keys create NAME`"
        if not args.allow_anonymous:
            what_to_do += ", or set allow_anonymous where only this machine reaches the server"
        raise ConfigError("API keys", f"none in {uri}", what_to_do)


def _gpus(args: ServeConfig) -> float:
    if args.engine_gpus is not None:
        return args.engine_gpus
    # Where this runs, on the head, there may be none although the workers have some.
    return float(torch.cuda.is_available() or (ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1))


def _autoscaling(args: ServeConfig) -> AutoscalingConfig:
    """Engines by pending work: one for each `max_batch` pictures of it."""
    with warnings.catch_warnings():
        # metrics_interval_s is to be replaced by environment variables, which Ray 2.60 does not read yet.
        warnings.simplefilter("ignore", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=args.min_replicas,
            max_replicas=max(args.max_replicas, args.min_replicas),
            target_ongoing_requests=args.max_batch,
            metrics_interval_s=2,
            look_back_period_s=10,
            upscale_delay_s=args.upscale_delay_s,
            downscale_delay_s=args.downscale_delay_s,
            downscale_to_zero_delay_s=args.downscale_to_zero_delay_s,
            policy={"policy_function": f"{scaling.__name__}:{scaling.engines_for_work.__name__}"},
        )


class EngineDeployment:
    """A Replica that follows the registry."""

    def __init__(self, args: ServeConfig) -> None:
        cores = os.cpu_count() or 1
        torch.set_num_threads(args.num_threads or max(1, cores // max(1, args.max_replicas)))
        name = serve.get_replica_context().replica_id.unique_id
        # Serve admits 2 max_batch at most, so the engine's own queue never refuses anybody.
        use_attention(args.settings().attention)
        reserved = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        # Ray hides no GPU from a replica that asked for none.
        device = "cpu" if args.engine_gpus == 0 else usable_device(must_be_gpu=bool(reserved))
        choose_numerics(torch.device(device))
        self.replica = Replica(
            max_batch=args.max_batch,
            max_queue=2 * args.max_batch,
            device=device,
            name=name,
            precision=args.precision,
            compile=args.compile,
        )
        self.follower = Follower(self.replica, ModelSource(args.settings(), args.model), args.poll_s)
        self.follower.start(STARTING_PATIENCE_S)
        self.exporter = Exporter(self.follower)
        self.exporter.start()

    async def colorize(self, job: ColorizeJob) -> Answer:
        """See Replica.colorize."""
        await self._wait_for_a_model()
        return await self.replica.colorize(job)

    async def stream(self, job: ColorizeJob) -> AsyncIterator[Preview | Answer]:
        """See Replica.stream."""
        await self._wait_for_a_model()
        async for item in self.replica.stream(job):
            yield item

    async def _wait_for_a_model(self) -> None:
        end = time.monotonic() + LOADING_PATIENCE_S
        while not self.replica.can_answer and time.monotonic() < end:
            await asyncio.sleep(0.1)

    async def describe(self) -> dict[str, Any]:
        """See Follower.describe."""
        return self.follower.describe()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The work that is here, for the autoscaler; see scaling.py."""
        return {scaling.PENDING: self.replica.pending_pictures()}

    async def check_health(self) -> None:
        """Ray replaces the replica if this raises."""
        self.replica.check()

    def __del__(self) -> None:
        """Ray calls this when the requests here are answered, or their time is over."""
        if hasattr(self, "exporter"):
            self.exporter.stop()
        if hasattr(self, "follower"):
            self.follower.stop()
            self.replica.close()


@serve.ingress()
class IngressDeployment:
    """The HTTP side."""

    def __init__(self, args: ServeConfig, engine: DeploymentHandle) -> None:
        self.args = args
        self.engine = engine

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray Serve once this object is made."""
        source = ModelSource(self.args.settings(), self.args.model)
        backend = RayBackend(self.engine, source, may_sleep=self.args.min_replicas == 0)
        journal.write_to(self.args.request_log)
        return create_app(
            backend,
            keyring=Keyring(self.args.settings().keys_uri, is_closed=not self.args.allow_anonymous),
            max_body_bytes=self.args.max_body_bytes,
            upload_timeout_s=self.args.upload_timeout_s,
            timeout_s=self.args.timeout_s,
            names_requests=False,  # Serve's proxy does
        )
