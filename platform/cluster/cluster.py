"""Connect to Ray: to the cluster that RAY_ADDRESS names, else to a private (embedded) cluster on this machine.

The private cluster listens on loopback, writes nothing to the user's home and ends with this process; it has a
dashboard only on request.
Not here: jobs that outlive the caller, see `animediffusion.platform.cluster.jobs`.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.autoscaler.v2.schema import ResourceDemandSummary
from ray.autoscaler.v2.sdk import get_cluster_status

from animediffusion.platform.cluster import ray_compat
from animediffusion.platform.cluster.signals import StopSignals
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import ClusterError
from animediffusion.platform.network import temporary_folder_problem, why_unreachable
from animediffusion.platform.storage.storage import PATIENCE_VARIABLE

OBJECT_STORE_BYTES = 512 * 1024 * 1024
"""Size of the embedded cluster's object store; it holds several thousand rows because images stay encoded."""

POLL_S = 0.5
"""Seconds between two calls of `poll` in run_watched()."""
WAITS_S = 15.0
"""Seconds without progress after which unmet resource demands are reported."""
WATCH_S, WATCH_TIMEOUT_S, AGAIN_S = 3.0, 5, 60.0
"""Seconds between two polls of the cluster's unmet demands, timeout of a poll, seconds between two messages."""
_COUNTED = ("CPU", "GPU")
"""Resources whose unmet demands are reported."""

_WRONG_TOKEN = ("InvalidAuthToken", "Unauthenticated", "AuthenticationError", "no authentication token was found")

# These turn off what a private cluster does not need: usage reports, metric exporters, advice on Ray's own logs.
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
}

_PROMPT = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
"""Ray Train asks every 2 s whether the workers have ended or failed; for so long, a run would do nothing."""

# An embedded cluster has one node, which ends with this process and therefore is never preempted while a run continues:
# each group of workers needs one process less.
_ONE_NODE = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}

# Ray Serve's proxy imports this function, whose middleware turns the proxy's errors into problem documents. The proxy
# is an actor, and all actors of our jobs get this variable. The name is text because this folder does not import serve.
_PROXY = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "animediffusion.serve.proxy:middlewares"}

_PASSED_ON = ("OMP_NUM_THREADS", "AWS_RETRY_MODE", "AWS_MAX_ATTEMPTS", PATIENCE_VARIABLE)
"""Environment variables that the driver passes on to its workers."""


def connect(
    settings: Settings,
    num_cpus: int | None = None,
    *,
    include_dashboard: bool = False,
    object_store_memory: int = OBJECT_STORE_BYTES,
    worker_logs: bool = False,
) -> None:
    """Connect this process to Ray; does nothing if it is already connected.

    Args:
        settings: the workers get its workspace, so that they use the same folder as the driver; see own_workspaces()
            for the exception.
        num_cpus: logical CPUs of an embedded cluster, the number of this machine if None.
        include_dashboard: start the dashboard of an embedded cluster, which takes a second and 200 MB.
        object_store_memory: size of an embedded cluster's object store in bytes.
        worker_logs: show the output of workers.

    Raises:
        ClusterError: if nothing answers at RAY_ADDRESS, the token is wrong, or Ray cannot start on this machine.
    """
    if ray.is_initialized():
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    for name, value in (_QUIET | _PROMPT).items():
        os.environ.setdefault(name, value)
    common = {"log_to_driver": worker_logs, "logging_level": logging.ERROR, "runtime_env": _runtime_env(settings)}
    address = cluster_address()
    if address is not None:
        reason = why_unreachable(address)
        if reason is not None:
            raise ClusterError(f"Ray at {address}", reason, "check RAY_ADDRESS, or unset it")
        # Inside a job that was submitted with its own variables, Ray would reject ours.
        os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
        ray_compat.use_token_if_available()
        _init(f"Ray at {address}", address=address, **common)
        return
    problem = temporary_folder_problem()
    if problem is not None:
        raise ClusterError("Ray on this machine", problem, "set RAY_TMPDIR=/tmp")
    for name, value in _ONE_NODE.items():
        os.environ.setdefault(name, value)
    _private_token()
    ray_compat.bind_to_loopback(True)
    with ray_compat.only_needed_processes(log_monitor=worker_logs, dashboard=include_dashboard):
        _init(
            "Ray on this machine",
            address="local",
            num_cpus=num_cpus,
            include_dashboard=include_dashboard,
            object_store_memory=object_store_memory,
            **common,
        )


def shutdown() -> None:
    """Disconnect from Ray, which also ends an embedded cluster."""
    if ray.is_initialized():
        ray.shutdown()
        ray_compat.bind_to_loopback(False)
        for name in _ONE_NODE:
            os.environ.pop(name, None)


def cluster_address() -> str | None:
    """Return RAY_ADDRESS if it names a cluster to join; None for an embedded cluster.

    An http address is the address of the jobs API, which jobs.py uses, and cannot be joined.
    """
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return None if address in ("", "local") or address.startswith(("http://", "https://")) else address


def resources() -> tuple[dict[str, float], dict[str, float]]:
    """Return the cluster's current resources and the maximum that an autoscaler can reach by adding nodes."""
    has: dict[str, float] = ray.cluster_resources()
    limits = ray_compat.resource_limits()
    return has, {name: max(has.get(name, 0.0), limits.get(name, 0.0)) for name in has | limits}


@contextmanager
def waits(report: Callable[[str], object]) -> Iterator[Callable[[], None]]:
    """Call `report` with a line on unmet resource demands, if any, when the block makes no progress for WAITS_S.

    Yields:
        A function that the block calls whenever it makes progress.
    """
    progress, done = [time.monotonic()], threading.Event()

    def moved() -> None:
        progress[0] = time.monotonic()

    def watch() -> None:
        reported, again = "", 0.0
        while not done.wait(WATCH_S):
            now = time.monotonic()
            if now - progress[0] >= WAITS_S and now >= again and (line := no_room()) not in ("", reported):
                reported, again = line, now + AGAIN_S
                report(line)

    thread = threading.Thread(target=watch, name="waits", daemon=True)
    thread.start()
    try:
        yield moved
    finally:
        done.set()
        thread.join()


def run_watched(
    work: Callable[[], object],
    poll: Callable[[int | None, Callable[[], None]], bool],
    *,
    on_signal: Callable[[], object],
    report: Callable[[str], object],
) -> tuple[int | None, BaseException | None]:
    """Run blocking work of Ray in a thread while this thread handles signals and watches for unmet demands.

    Args:
        work: the function to run, for example fit() of a Ray Train or Ray Tune run.
        poll: called every POLL_S, and once after the work has ended, with the number of the first signal (None until it
            arrives) and a function to call whenever the work makes progress; it returns whether to keep waiting.
        on_signal: called when the first signal arrives.
        report: called with a line on unmet resource demands, see waits().

    Returns:
        The number of the first signal and the error of the work, each None if there was none.
    """
    failed: list[BaseException] = []

    def body() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=body, name="work", daemon=True)
    with StopSignals(on_signal) as stop, waits(report) as moved:
        thread.start()
        runs = True
        while runs:
            thread.join(POLL_S)
            runs = thread.is_alive()  # read before poll(), so that a poll follows the end of the work
            if not poll(stop.number, moved):
                break
    return stop.number, failed[0] if failed else None


def no_room() -> str:
    """Describe in one line the unmet demands of tasks, actors and placement groups and the free resources.

    The line is empty if there are no unmet demands, or no Ray. They are read from the cluster's control store because
    Ray's state API needs a dashboard.
    """
    if not ray.is_initialized():  # else the next line would start a private Ray
        return ""
    try:
        status = get_cluster_status(ray.get_runtime_context().gcs_address, timeout=WATCH_TIMEOUT_S)
        (has, most), free = resources(), ray.available_resources()
    except Exception:  # the waiting work meets the same error and reports it
        return ""
    demands = _unmet(status.resource_demands)
    if not demands:
        return ""
    wanted = " and ".join(f"{count} x ({_listed(needs)})" for needs, count in sorted(demands.items()))
    names = sorted({name for needs in demands for name, _ in needs})
    found = ", ".join(_free(name, free, has, most) for name in names)
    return f"waiting: the cluster has no room for {wanted}; {found}"


def _unmet(demand: ResourceDemandSummary) -> Counter[tuple[tuple[str, float], ...]]:
    """Count the unmet demands for each combination of CPUs and GPUs."""
    unmet = Counter[tuple[tuple[str, float], ...]]()
    for group in (*demand.ray_task_actor_demand, *demand.placement_group_demand):
        for bundle in group.bundles_by_count:
            if needs := tuple((name, bundle.bundle[name]) for name in _COUNTED if name in bundle.bundle):
                unmet[needs] += bundle.count
    return unmet


def _listed(needs: tuple[tuple[str, float], ...]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in needs)


def _free(name: str, free: Mapping[str, float], has: Mapping[str, float], most: Mapping[str, float]) -> str:
    more = f" (an autoscaler can make it {most[name]:g})" if most.get(name, 0.0) > has.get(name, 0.0) else ""
    return f"{free.get(name, 0.0):g} of {has.get(name, 0.0):g} {name} free{more}"


def own_workspaces() -> bool:
    """Whether each node has its own workspace, as on a cluster with an MLflow server, where nodes may share no disk.

    The path of the driver's workspace may not exist on another node, and that node may be unable to create it.
    """
    server = os.environ.get("MLFLOW_TRACKING_URI", "").startswith(("http://", "https://"))
    return server and cluster_address() is not None


def _runtime_env(settings: Settings) -> dict[str, dict[str, str]]:
    """Return the workers' environment: settings only, never a secret, because the dashboard shows it."""
    passed_on = {name: os.environ[name] for name in _PASSED_ON if os.environ.get(name)}
    workspace = {} if own_workspaces() else {"ANIMEDIFFUSION_WORKSPACE": str(settings.workspace)}
    return {"env_vars": {**workspace, **_PROXY, **passed_on}}


def _private_token() -> None:
    """Protect the embedded cluster with a token that exists only in this process's environment.

    By default, Ray would write ~/.ray/auth_token; without a token, every user of this machine could run code as this
    user.
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
        # The type of Ray's error depends on how far ray.init() came; one of the chained messages contains the cause.
        if any(sign in f"{error} {error.__cause__} {error.__context__}" for sign in _WRONG_TOKEN):
            raise ClusterError(thing, "rejects the token", "set RAY_AUTH_TOKEN to the cluster's token") from error
        found = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ClusterError(thing, f"cannot be used ({found.strip()})", "see `animediffusion doctor`") from error


def silence_ray_data() -> None:
    """Hide the progress bars and log messages of Ray Data, because our commands report their own progress."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
