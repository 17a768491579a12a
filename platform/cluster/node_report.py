"""Checks of every node of a Ray cluster: versions, devices, object store, MLflow and open ports.

    found = checks(settings, device=probe, store="s3://runs")    # for platform/doctor.py; this process is connected

Each node is checked in its own environment, which the workers on that node will use. Not here: checks of this machine,
see platform/doctor.py.
"""

from __future__ import annotations

import os
import platform
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import httpx
import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import animediffusion
from animediffusion.platform.cluster.ray_compat import dashboard_address, last_line
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import AnimeDiffusionError
from animediffusion.platform.network import why_unreachable, without_password
from animediffusion.platform.storage import storage

PACKAGES = ("torch", "ray", "mlflow", "pyarrow", "kornia", "safetensors", "optuna", "fastapi")
ANSWER_S = 60.0
"""Seconds that a node may take to answer; it may have to start a worker and import torch."""

Finding = tuple[str, bool, str]
"""Name, whether the check passed, and detail, as in a Check of platform/doctor.py."""


@dataclass(frozen=True)
class Listener:
    """A TCP port of Ray that other machines can reach."""

    process: str
    host: str
    port: int


@dataclass(frozen=True)
class NodeReport:
    """The report of one node."""

    node: str
    versions: dict[str, str]
    device: str
    store: str | None
    """Problem of the object store, None if it could be written and read, "" if no store was given."""
    mlflow: str | None
    """Problem of the MLflow server, None if it answers or if there is no server."""
    mlflow_uri: str
    listeners: list[Listener] = field(default_factory=list)


def checks(settings: Settings, device: Callable[[], str], store: str | None = None) -> list[Finding]:
    """Get a report from every node and compare the reports.

    Args:
        settings: its tracking URI shows whether MLflow runs without a server.
        device: runs on each node and describes its device and the attention that torch will use.
        store: URI of a folder that every node writes to and reads from, or None.
    """
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    tasks = {_report_task(node_id).remote(address, device, store): address for node_id, address in nodes.items()}
    ready, late = ray.wait(list(tasks), num_returns=len(tasks), timeout=ANSWER_S)
    reports, silent = [], [f"{tasks[ref]} does not answer" for ref in late]
    for ref in ready:
        try:
            reports.append(ray.get(ref))
        except Exception as error:  # the node left, or its image lacks the package
            silent.append(f"{tasks[ref]}: {last_line(error)}")
    local = not settings.tracking_uri.startswith(("http://", "https://"))
    return [
        check_versions(reports, silent),
        ("devices", True, _grouped({one.node: one.device for one in reports})),
        check_store(reports, store),
        check_mlflow(reports, local),
        *check_ports(reports),
    ]


def _report_task(node_id: str) -> Any:
    """Return report() as a Ray task that runs on one node."""
    here = NodeAffinitySchedulingStrategy(node_id, soft=False)
    # By default, Ray hides the GPUs from a task that requests none.
    environment = {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}}
    task = ray.remote(num_cpus=0, max_retries=0, runtime_env=environment)(report)
    return task.options(scheduling_strategy=here)


def report(address: str, device: Callable[[], str], store: str | None) -> NodeReport:
    """Return the report of the node that this function runs on."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    return NodeReport(
        node=address,
        versions=_versions(),
        device=device(),
        store="" if store is None else write_and_read(store),
        mlflow=why_unreachable(uri) if uri.startswith(("http://", "https://")) else None,
        mlflow_uri=without_password(uri),
        listeners=_listeners(ray.get_runtime_context().get_session_name()),
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "animediffusion": animediffusion.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def write_and_read(folder: str) -> str | None:
    """Write a file to a folder, read it and delete it; return the problem, or None if this works."""
    uri, data = storage.join(folder, f".doctor-{uuid.uuid4().hex}"), os.urandom(4096)
    try:
        storage.write_bytes(uri, data)
        same = storage.read_bytes(uri) == data
        storage.delete(uri)
    except AnimeDiffusionError as error:
        return f"{error.found}; {error.allowed}"
    return None if same else "returns other bytes than were written"


def _listeners(session: str) -> list[Listener]:
    """Return the ports of a Ray session's processes on this node that other machines can reach."""
    found = set()
    for process in _processes(session):
        with suppress(psutil.Error, OSError):
            words = " ".join(process.cmdline())
            for connection in process.net_connections("tcp"):
                host = connection.laddr.ip.removeprefix("::ffff:") if connection.laddr else ""
                if connection.status == psutil.CONN_LISTEN and host not in ("127.0.0.1", "::1"):
                    found.add(Listener(_short(words), host, connection.laddr.port))
    return sorted(found, key=lambda one: (one.process, one.port))


def _processes(session: str) -> set[psutil.Process]:
    """Return the processes of one Ray session, because a machine may run several clusters.

    The commands of Ray's own processes contain the session's name; workers have other names and are their children.
    """
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if any(session in word for word in process.cmdline()):
                found |= {process, *process.children(recursive=True)}
    return found


def _short(command: str) -> str:
    for sign, name in (
        ("ProxyActor", "http"),
        ("gcs_server", "gcs"),
        ("dashboard/agent", "agent"),
        ("ray::", "worker"),
    ):
        if sign in command:
            return name
    return "dashboard" if "dashboard" in command else "raylet"


def check_versions(reports: list[NodeReport], silent: list[str]) -> Finding:
    """Check whether every node answers, and whether all have the same versions; `silent` says who does not answer."""
    differing = {
        name: _grouped({one.node: one.versions[name] for one in reports})
        for name in (reports[0].versions if reports else {})
        if len({one.versions[name] for one in reports}) > 1
    }
    problems = [*silent, *(f"{name} differs: {which}" for name, which in differing.items())]
    if reports and not differing:
        named = ", ".join(f"{name} {version}" for name, version in reports[0].versions.items())
        problems.append(f"all with {named}")
    return "nodes", not silent and not differing and bool(reports), f"{len(reports)} answer; {'; '.join(problems)}"


def check_store(reports: list[NodeReport], store: str | None) -> Finding:
    """Check whether every node can write to the store and read from it, and whether it is one store for all."""
    if store is None:
        return (
            "node store",
            True,
            "not tested; doctor --storage s3://BUCKET/FOLDER writes and reads there from every node",
        )
    wrong = {one.node: one.store for one in reports if one.store}
    if wrong:
        return "node store", False, f"{store}: {_grouped(wrong)}"
    where = "" if storage.is_remote(store) or len(reports) < 2 else "; every node has its own copy of a local folder"
    return "node store", not where, f"{store} can be written and read by {len(reports)} nodes{where}"


def check_mlflow(reports: list[NodeReport], local: bool) -> Finding:
    """Check whether every node reaches the same MLflow; `local` if it runs without a server."""
    if len({one.mlflow_uri for one in reports}) > 1:
        named = {one.node: one.mlflow_uri or "none" for one in reports}
        return "node mlflow", False, f"MLFLOW_TRACKING_URI differs: {_grouped(named)}"
    wrong = {one.node: one.mlflow for one in reports if one.mlflow}
    if wrong:
        return "node mlflow", False, f"{reports[0].mlflow_uri} {_grouped(wrong)}"
    if local and len(reports) > 1:
        return "node mlflow", False, "embedded, which only one node can see; set MLFLOW_TRACKING_URI to a server"
    return "node mlflow", True, f"{(reports and reports[0].mlflow_uri) or 'embedded'} answers {len(reports)} nodes"


def check_ports(reports: list[NodeReport]) -> list[Finding]:
    """Check whether Ray requires a token, and list the open ports."""
    is_safe, detail = requires_token(dashboard_address())
    opened = {one.node: ", ".join(f"{at.process} {at.host}:{at.port}" for at in one.listeners) for one in reports}
    total = sum(len(one.listeners) for one in reports)
    known = {node: listed for node, listed in opened.items() if listed}
    ports = f"{total} ports can be reached from outside: {_grouped(known)}" if total else "all on loopback"
    return [("ray auth", is_safe, detail), ("ray ports", is_safe or not total, ports)]


def requires_token(address: str | None) -> tuple[bool, str]:
    """Return whether the jobs API rejects a request without a token, and the details; True if there is no jobs API."""
    if not address:
        return True, "no dashboard, so no jobs API"
    url = address if "://" in address else f"http://{address}"
    try:
        status = httpx.get(f"{url}/api/jobs/", timeout=5).status_code
    except httpx.HTTPError as error:
        return False, f"{url} does not answer ({type(error).__name__})"
    if status in (401, 403):
        return True, f"{url} rejects requests without a token"
    return False, f"{url} accepts jobs without authentication; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN on all nodes"


def _grouped(values: Mapping[str, str | None]) -> str:
    """Return `VALUE (3 nodes)` if all nodes agree, else each value with up to three nodes, most common value first."""
    by_value: dict[str, list[str]] = {}
    for node, value in values.items():
        by_value.setdefault(value or "", []).append(node)
    ordered: Iterable[tuple[str, list[str]]] = sorted(by_value.items(), key=lambda item: -len(item[1]))
    if len(by_value) == 1 and len(values) > 1:
        return f"{next(iter(by_value))} ({len(values)} nodes)"
    return ", ".join(f"{value} ({' '.join(sorted(nodes)[:3])})" for value, nodes in ordered)
