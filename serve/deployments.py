"""The application on Ray Serve: an ingress deployment for HTTP and an engine deployment that colors drawings.

    app = build_app(ServeConfig(max_batch=8))       # also `import_path` of a Serve config file
    serve.run(app)

All limits follow from one number, `max_batch`: an engine replica runs about that many requests and may hold twice as
many. Further requests wait in the ingress or are rejected with Retry-After. The number of engines follows the pending
work, see serve/autoscaling.py.
"""

# This file does not import annotations from __future__: Ray Serve checks the `args` of a config file against the class
# in build_app's signature, and it does not resolve a name.

import asyncio
import os
import time
import warnings
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated

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
from animediffusion.platform.corrections.store import Corrections
from animediffusion.platform.errors import ConfigError
from animediffusion.serve import autoscaling
from animediffusion.serve.api import access_log
from animediffusion.serve.api.app import create_app
from animediffusion.serve.api.limits import MAX_BODY_BYTES, UPLOAD_TIMEOUT_S
from animediffusion.serve.protocol import Answer, ColorizeJob, EngineStatus, Preview
from animediffusion.serve.ray_backend import RayBackend
from animediffusion.serve.replica.device import Precision, usable_device
from animediffusion.serve.replica.follower import Follower
from animediffusion.serve.replica.model_source import ModelSource
from animediffusion.serve.replica.prometheus import Exporter
from animediffusion.serve.replica.replica import Replica

APP_NAME = "animediffusion"
STARTING_PATIENCE_S = 60.0
"""How long a new engine waits for an unreachable registry. After that, Ray starts another engine in its place."""
LOADING_PATIENCE_S = 5.0
"""How long a request waits in an engine that has no model or no working device. If such an engine rejected requests
immediately, its queue would always be the shortest, and it would receive the requests that working engines could
answer."""
HEALTH_PERIOD_S = 3.0
"""Seconds between health checks. Ray replaces an engine after three failed checks in a row."""


def _whole_above_one(gpus: float | None) -> float | None:
    if gpus is not None and gpus > 1 and gpus % 1:
        raise ValueError("a fraction of one GPU, or a whole number of them")
    return gpus


class ServeConfig(Config):
    """Settings of the application. The `args` of a Serve config file have the same keys."""

    model: str | None = None
    """Bundle folder or URI, `starter`, or a registered version or alias; if omitted, the champion, or the starter
    model until a version is promoted."""
    workspace: Path | None = None
    """Workspace folder, like the option --workspace of the command."""
    model_name: str | None = None
    """Registered model name."""
    max_batch: Annotated[int, Field(ge=1, le=256)] = 8
    """Slots in the batch of an engine; a guided request takes two."""
    min_replicas: Annotated[int, Field(ge=0)] = 1
    """Minimum number of engines. With 0, the last engine stops when idle, and the next request starts an engine."""
    max_replicas: Annotated[int, Field(ge=1)] = 1
    """Maximum number of engines."""
    upscale_delay_s: Annotated[float, Field(ge=0)] = 5
    """How long the pending work must require more engines before Ray starts them."""
    downscale_delay_s: Annotated[float, Field(ge=0)] = 60
    """How long the pending work must require fewer engines before Ray stops some."""
    downscale_to_zero_delay_s: Annotated[float, Field(ge=0)] = 300
    """Idle time after which Ray stops the last engine."""
    num_ingress_replicas: Annotated[int, Field(ge=1)] = 1
    """Number of HTTP processes."""
    engine_cpus: Annotated[float, Field(ge=0)] = 1
    """Logical CPUs that Ray reserves for an engine."""
    engine_gpus: Annotated[float, Field(ge=0), AfterValidator(_whole_above_one)] | None = None
    """GPUs that Ray reserves for an engine, or a fraction of one. If omitted: 1 if the cluster has a GPU, else 0."""
    num_threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads of an engine; if omitted, the number of cores divided by `max_replicas`."""
    precision: Precision = "auto"
    """Data type of the network: float32 or bfloat16. auto is bfloat16 on a GPU that supports it, else float32."""
    compile: bool = False
    """Whether to compile the network with torch.compile into larger kernels; a version then takes minutes to load."""
    keys: str | None = None
    """File with the hashes of the API keys, a path or s3:// URI; if omitted, the one in the workspace. Servers read
    the file again every few seconds."""
    corrections: str | None = None
    """Store of corrections, a folder or s3:// URI that all nodes share; if omitted, ANIMEDIFFUSION_CORRECTIONS of the
    node, and without that no request is kept."""
    allow_anonymous: bool = False
    """Accept requests without a key while no key was ever made; only for a server that no other machine reaches."""
    request_log: Path | None = None
    """File of the access log, one line of JSON for each request; if omitted, stderr of the process, which Ray logs."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = MAX_BODY_BYTES
    """Largest body of a request, in bytes. Serve's proxy has its own limit, see serve/proxy.py."""
    upload_timeout_s: Annotated[float, Field(gt=0)] = UPLOAD_TIMEOUT_S
    """Time for the body of a request to arrive."""
    timeout_s: Annotated[float, Field(gt=0)] = 60
    """Time for one picture, including the time in the queue."""
    poll_s: Annotated[float, Field(gt=0)] = 3
    """Average seconds between two polls of the registry by an engine."""

    def settings(self) -> Settings:
        """Return the settings of the workspace and the registry."""
        return Settings.from_environment(
            workspace=self.workspace, model_name=self.model_name, keys=self.keys, corrections=self.corrections
        )


def build_app(args: ServeConfig) -> serve.Application:
    """Return the application, ready for serve.run.

    Raises:
        ConfigError: no API key is active, unless `allow_anonymous` is set and no key was ever made.
        StorageError: the corrections store cannot be written.
    """
    check_keys(args)
    check_corrections(args)
    engine = serve.deployment(EngineDeployment).options(
        name="engine",
        ray_actor_options={"num_cpus": args.engine_cpus, "num_gpus": _gpus(args)},
        max_ongoing_requests=2 * args.max_batch,
        max_queued_requests=max(1, 2 * args.max_batch),
        autoscaling_config=autoscaling_config(args),
        # A replica that is stopped first finishes its running pictures.
        graceful_shutdown_timeout_s=args.timeout_s,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=30,
    )
    ingress = serve.deployment(IngressDeployment).options(
        name="ingress",
        num_replicas=args.num_ingress_replicas,
        ray_actor_options={"num_cpus": 0.25},
        # This limit is far above what the engines hold: a full queue of the engines must reject requests, not this one.
        max_ongoing_requests=max(100, 16 * args.max_batch * args.max_replicas),
        graceful_shutdown_timeout_s=args.timeout_s + 5,
    )
    application: serve.Application = ingress.bind(args, engine.bind(args))
    return application


def check_keys(args: ServeConfig) -> None:
    """Raise ConfigError if no API key is active, unless `allow_anonymous` is set and no key was ever made."""
    uri = args.settings().keys_uri
    keys = Keys(uri)
    if not keys.active() and (keys.entries() or not args.allow_anonymous):
        what_to_do = "make one with `animediffusion keys create NAME`"
        if not args.allow_anonymous:
            what_to_do += ", or set allow_anonymous where only this machine reaches the server"
        raise ConfigError("API keys", f"none in {uri}", what_to_do)


def check_corrections(args: ServeConfig) -> str | None:
    """Return the corrections store, None if corrections are off; raise StorageError if it cannot be written."""
    uri = args.settings().corrections_uri
    if uri is not None:
        Corrections(uri).prepare()
    return uri


def _gpus(args: ServeConfig) -> float:
    if args.engine_gpus is not None:
        return args.engine_gpus
    # This code runs on the head node, which may have no GPU although worker nodes have GPUs.
    return float(torch.cuda.is_available() or (ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1))


def autoscaling_config(args: ServeConfig) -> AutoscalingConfig:
    """Return the autoscaling settings: one engine for each `max_batch` pending pictures."""
    with warnings.catch_warnings():
        # metrics_interval_s is deprecated in favor of environment variables, which Ray 2.60 does not read yet.
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
            policy={"policy_function": f"{autoscaling.__name__}:{autoscaling.engines_for_work.__name__}"},
        )


class EngineDeployment:
    """A Replica that follows the registry."""

    def __init__(self, args: ServeConfig) -> None:
        cores = os.cpu_count() or 1
        torch.set_num_threads(args.num_threads or max(1, cores // max(1, args.max_replicas)))
        name = serve.get_replica_context().replica_id.unique_id
        # Serve admits at most 2 * max_batch requests, so the engine's own queue never rejects one.
        use_attention(args.settings().attention)
        reserved = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        # Ray does not hide the GPUs from a replica that requested no GPU.
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

    async def describe(self) -> EngineStatus:
        """See Follower.describe."""
        return self.follower.describe()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the pending work of this replica for the autoscaler, see serve/autoscaling.py."""
        return {autoscaling.PENDING: self.replica.pending_pictures()}

    async def check_health(self) -> None:
        """Raise an error if the replica does not work; Ray then replaces the replica."""
        self.replica.check()

    def __del__(self) -> None:
        """Stop the threads. Ray calls this once all requests are answered, or the graceful shutdown has timed out."""
        if hasattr(self, "exporter"):
            self.exporter.stop()
        if hasattr(self, "follower"):
            self.follower.stop()
            self.replica.close()


@serve.ingress()
class IngressDeployment:
    """The deployment that answers HTTP requests."""

    def __init__(self, args: ServeConfig, engine: DeploymentHandle) -> None:
        self.args = args
        self.engine = engine

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the ASGI application. Ray Serve calls this after the constructor."""
        source = ModelSource(self.args.settings(), self.args.model)
        backend = RayBackend(self.engine, source, may_sleep=self.args.min_replicas == 0)
        access_log.write_to(self.args.request_log)
        return create_app(
            backend,
            keyring=Keyring(self.args.settings().keys_uri, is_closed=not self.args.allow_anonymous),
            max_body_bytes=self.args.max_body_bytes,
            upload_timeout_s=self.args.upload_timeout_s,
            timeout_s=self.args.timeout_s,
            names_requests=False,  # Serve's proxy adds the request id.
            corrections=self.args.settings().corrections_uri,
        )
