"""Everything that this package uses of Ray's private modules, with the reason for each; no other file imports them.

A new version of Ray may move or remove these names without notice: tests/platform/cluster/test_ray_compat.py checks
that the pinned version has them.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ray._private import parameter, ray_constants
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.node import Node
from ray._private.state import state
from ray._private.worker import get_dashboard_url

if TYPE_CHECKING:
    from ray.data import DataContext

_LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"

SETUP_WORKER = Path(__file__).with_name("setup_worker.py")
"""The script with which the workers of an embedded cluster start; see there."""


def bind_to_loopback(on: bool) -> None:
    """Bind all servers of a Ray that this process starts to loopback, or undo this.

    Ray has no public setting for it. Its servers do so if Ray takes the machine for one that cannot be part of a
    cluster. Ray reads the variable only when it is imported, so this process needs the constant, and the processes that
    it starts need the variable.
    """
    ray_constants.ENABLE_RAY_CLUSTER = not on
    if on:
        os.environ[_LOOPBACK_VARIABLE] = "0"
    else:
        os.environ.pop(_LOOPBACK_VARIABLE, None)


@contextmanager
def only_needed_processes(*, log_monitor: bool = False, dashboard: bool = False) -> Iterator[None]:
    """Keep a ray.init() inside the block from starting processes that would have nothing to do.

    Ray has no setting for it. Without them, Ray starts with 2.5 CPU seconds less. The monitor is the autoscaler,
    which a Ray that ends with this process does not have. The workers start with SETUP_WORKER.

    Args:
        log_monitor: start the process that copies the output of workers to the driver; it looks at each log file ten
            times a second, also if nobody asked for it.
        dashboard: start the dashboard; if it is not asked for, ray.init() starts a server for it nevertheless, which
            counts usage and takes port 8265, where clients expect the jobs API of a cluster.
    """
    params, start = parameter.RayParams, Node.start_api_server
    # Ray sets only those parameters itself that nobody has set.
    chosen = functools.partial(
        params, no_monitor=True, include_log_monitor=log_monitor, setup_worker_path=str(SETUP_WORKER)
    )
    parameter.RayParams = chosen  # type: ignore[misc]
    if not dashboard:
        Node.start_api_server = lambda *_, **__: None
    try:
        yield
    finally:
        parameter.RayParams, Node.start_api_server = params, start  # type: ignore[misc]


def use_token_if_available() -> None:
    """Use the cluster's token if there is one; ray.init(address) by itself does so only if RAY_AUTH_MODE is set."""
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def resource_limits() -> dict[str, float]:
    """Return the most of each resource that an autoscaler can reach; Ray's public calls count present nodes only."""
    return state.get_max_resources_from_cluster_config() or {}


def is_alive(actor_id: str) -> bool:
    """Return whether an actor runs, by its id in hex; True if Ray cannot tell. The public calls need a dashboard."""
    try:
        return str(state.actor_table(actor_id).get("State")) == "ALIVE"
    except Exception:  # Whatever waits for the actor meets the same error and reports it.
        return True


def dashboard_address() -> str | None:
    """Return `host:port` of the dashboard of the cluster that this process joined; only ray.init() returns it."""
    return get_dashboard_url() or None


def serve_host() -> str:
    """Return the host that Ray Serve's proxies listen on; serve.status() does not contain it."""
    from ray.serve.context import _get_global_client  # not at the top: slow to import

    return str(_get_global_client().http_config.host)


def last_line(error: BaseException, advice: tuple[str, ...] = ()) -> str:
    """Return the last line of a worker's error, which says what happened, or its type if it has no text.

    Args:
        error: an error that Ray raised. The last line of its error about the memory of a node is advice on settings of
            Ray.
        advice: beginnings of other lines that are advice.
    """
    if "out of memory issue" in str(error):
        return "a node had almost no memory left, so Ray ended a process there"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(advice)]
    return lines[-1] if lines else type(error).__name__


def pause_scheduling(context: DataContext, pause_s: float = 0.02) -> None:
    """Add a pause to every step of the scheduling loop of a Ray Data execution.

    While the consumer's buffers are full, the loop finds its read tasks ready but cannot take their blocks, and polls
    without a pause, which wastes half a core. Each step handles all ready blocks, so a pause does not reduce
    throughput. Ray has no setting for it; its callbacks are public, but not their base class.
    """
    from ray.data._internal.execution.execution_callback import ExecutionCallback  # not at the top: slow to import

    class Pause(ExecutionCallback):
        def on_execution_step(self, executor: object) -> None:  # noqa: ARG002
            time.sleep(pause_s)

    context.custom_execution_callback_classes = [Pause]
