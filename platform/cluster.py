"""Connect to Ray: the cluster that RAY_ADDRESS names, else a private one on this machine.

The private one listens on loopback, has no dashboard, writes nothing to the user's home and ends with this process.
Not here: jobs that outlive the caller, see `animediffusion.platform.jobs`.
"""

from __future__ import annotations

import logging
import os
import secrets
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

from animediffusion.platform.config import Settings
from animediffusion.platform.errors import ClusterError
from animediffusion.platform.network import why_unreachable
from animediffusion.platform.storage import PATIENCE_VARIABLE

OBJECT_STORE_BYTES = 512 * 1024 * 1024
"""Object store of the embedded cluster: images stay encoded in it, so half a gigabyte holds several thousand rows."""

_WRONG_TOKEN = ("InvalidAuthToken", "Unauthenticated", "AuthenticationError", "no authentication token was found")

# Ray's switch for "this node will never be part of a cluster": the one way to make all its servers bind to loopback.
_LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"

# What a private cluster does not need: usage reports, metric exporters, advice on its own logs.
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
}

# Where a proxy of Ray Serve finds what makes problems of its errors; every actor of our jobs gets it, the proxy too.
_PROXY = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "animediffusion.serve.proxy:middlewares"}

_PASSED_ON = ("OMP_NUM_THREADS", "AWS_RETRY_MODE", "AWS_MAX_ATTEMPTS", PATIENCE_VARIABLE)
"""Variables of the driver that its workers get."""


def connect(
    settings: Settings,
    num_cpus: int | None = None,
    *,
    include_dashboard: bool = False,
    object_store_memory: int = OBJECT_STORE_BYTES,
    worker_logs: bool = False,
) -> None:
    """Connect this process to Ray; does nothing when it already is.

    Args:
        settings: the workspace is told to the workers, so that both sides mean the same folder; but see
            `own_workspaces`.
        num_cpus: logical CPUs of an embedded cluster, the machine's own number if None.
        include_dashboard: start the dashboard of an embedded cluster, which takes a second and 200 MB.
        object_store_memory: bytes, of an embedded cluster.
        worker_logs: show what workers print.

    Raises:
        ClusterError: if nothing answers at RAY_ADDRESS, the token is wrong, or Ray cannot start here.
    """
    if ray.is_initialized():
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    common = {"log_to_driver": worker_logs, "logging_level": logging.ERROR, "runtime_env": _runtime_env(settings)}
    address = cluster_address()
    if address is not None:
        reason = why_unreachable(address)
        if reason is not None:
            raise ClusterError(f"Ray at {address}", reason, "check RAY_ADDRESS, or unset it")
        # Inside a job that was submitted with variables of its own, Ray would refuse ours.
        os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
        # Ray itself uses a token at an address that it was given only where RAY_AUTH_MODE says so, too.
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        _init(f"Ray at {address}", address=address, **common)
        return
    _private_token()
    _loopback_only(True)
    _init(
        "Ray on this machine",
        address="local",
        num_cpus=num_cpus,
        include_dashboard=include_dashboard,
        object_store_memory=object_store_memory,
        **common,
    )


def shutdown() -> None:
    """Leave Ray; an embedded cluster ends with it."""
    if ray.is_initialized():
        ray.shutdown()
        _loopback_only(False)


def cluster_address() -> str | None:
    """RAY_ADDRESS where it names a cluster to join; None for an embedded one.

    An http address is that of the jobs API, which `jobs` uses; it cannot be joined.
    """
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return None if address in ("", "local") or address.startswith(("http://", "https://")) else address


def own_workspaces() -> bool:
    """Whether each node has a workspace of its own: on a cluster with an MLflow server, where nodes may share no disk.

    The driver's may be a path that no other node has, nor can make.
    """
    server = os.environ.get("MLFLOW_TRACKING_URI", "").startswith(("http://", "https://"))
    return server and cluster_address() is not None


def _runtime_env(settings: Settings) -> dict[str, Any]:
    """Environment of the workers: plain settings only, never a secret (the dashboard shows it)."""
    passed_on = {name: os.environ[name] for name in _PASSED_ON if os.environ.get(name)}
    workspace = {} if own_workspaces() else {"ANIMEDIFFUSION_WORKSPACE": str(settings.workspace)}
    return {"env_vars": {**workspace, **_PROXY, **passed_on}}


def _loopback_only(on: bool) -> None:
    """Tell this process and the Ray processes that it starts; ray reads the variable only when it is imported."""
    ray_constants.ENABLE_RAY_CLUSTER = not on
    if on:
        os.environ[_LOOPBACK_ONLY] = "0"
    else:
        os.environ.pop(_LOOPBACK_ONLY, None)


def _private_token() -> None:
    """Protect the embedded cluster with a token that lives in this process's environment only.

    Left alone, Ray would write ~/.ray/auth_token; without any token, every user of this machine could run code as us.
    """
    if "RAY_AUTH_MODE" in os.environ or "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    if (Path.home() / ".ray" / "auth_token").exists():
        return
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _init(thing: str, **arguments: Any) -> None:
    try:
        ray.init(**arguments)
    except Exception as error:
        # Which of its errors Ray raises depends on how far it came; the cause stands in one of their texts.
        if any(sign in f"{error} {error.__cause__} {error.__context__}" for sign in _WRONG_TOKEN):
            raise ClusterError(thing, "refuses the token", "set RAY_AUTH_TOKEN to the cluster's token") from error
        found = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ClusterError(thing, f"cannot be used ({found.strip()})", "see `animediffusion doctor`") from error
