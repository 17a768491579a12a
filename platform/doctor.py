"""Check what is installed, reachable and allowed on this machine; each check gives one line.

    for check in checks(settings, [attention_probe]):
        print("ok " if check.ok else "NO ", check.name, check.detail)

On a cluster, every node is checked, too (platform/cluster/node_report.py). Not here: anything that needs torch; the
caller passes such checks as functions.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

import animediffusion
from animediffusion.platform.cluster import cluster, jobs, node_report
from animediffusion.platform.cluster.node_report import PACKAGES
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import AnimeDiffusionError
from animediffusion.platform.network import temporary_folder_problem, why_unreachable, without_password
from animediffusion.platform.storage import s3
from animediffusion.platform.tracking import tracking

OPTIONAL_PACKAGES = ("xformers", "torchvision")
PYTHONS = ((3, 11), (3, 13))
"""The oldest and the newest supported version of Python."""
MIN_FREE_BYTES = 5 * 1024**3
"""Free disk space of the workspace below which the check fails."""


@dataclass(frozen=True)
class Check:
    """The result of one check, with details or the problem in one line."""

    name: str
    ok: bool
    detail: str


Probe = Callable[[], Check]


def checks(
    settings: Settings,
    probes: Iterable[Probe] = (),
    device: Callable[[], str] = lambda: "not checked",
    store: str | None = None,
) -> list[Check]:
    """Run all checks and return their results in reading order; no check raises or takes more than some seconds.

    Args:
        settings: workspace and addresses.
        probes: further checks, for example of the device and the attention that torch will use.
        device: describes the device of a cluster's node in one line; runs on that node.
        store: URI of a folder that this machine, or every node of the cluster, must be able to write to and read from.
    """
    named: list[tuple[str, Probe]] = [
        ("python", _python),
        ("machine", _machine),
        ("packages", _packages),
        *((getattr(probe, "__name__", "probe").strip("_"), probe) for probe in probes),
        ("workspace", lambda: _workspace(settings)),
        ("mlflow", lambda: _mlflow(settings)),
        ("storage", check_storage),
        ("ray", _ray),
        ("ray jobs", _jobs),
    ]
    found = [_guarded(name, probe) for name, probe in named]
    if cluster.cluster_address() is not None and {check.name: check.ok for check in found}["ray"]:
        return found + _on_all_nodes(settings, device, store)
    return found if store is None else [*found, _guarded("store", lambda: _store(store))]


def _on_all_nodes(settings: Settings, device: Callable[[], str], store: str | None) -> list[Check]:
    try:
        cluster.connect(settings)
        return [Check(*one) for one in node_report.checks(settings, device, store)]
    except AnimeDiffusionError as error:
        return [Check("nodes", False, str(error))]
    except Exception as error:  # as in _guarded
        return [Check("nodes", False, f"{type(error).__name__}: {tracking.first_line(error)}")]


def _store(folder: str) -> Check:
    wrong = node_report.write_and_read(folder)
    return Check("store", wrong is None, f"{folder} {wrong or 'can be written and read'}")


@dataclass(frozen=True)
class DoctorReport:
    """All checks, as `doctor --json` prints them."""

    ok: bool
    """Whether all checks passed."""
    checks: list[Check]


def report(found: Sequence[Check]) -> DoctorReport:
    """Return the checks and whether all of them passed."""
    return DoctorReport(all(check.ok for check in found), list(found))


def _guarded(name: str, probe: Probe) -> Check:
    try:
        return probe()
    except AnimeDiffusionError as error:
        return Check(name, False, str(error))
    except Exception as error:  # a check that fails must not stop the others
        return Check(name, False, f"{type(error).__name__}: {tracking.first_line(error)}")


def _python() -> Check:
    low, high = PYTHONS
    ok = low <= sys.version_info[:2] <= high
    needed = "" if ok else f"; {low[0]}.{low[1]} to {high[0]}.{high[1]} is supported"
    package = f"animediffusion {animediffusion.__version__} at {Path(animediffusion.__file__).parent}"
    detail = f"{platform.python_version()} at {sys.executable}, {package}{needed}"
    return Check("python", ok, detail)


def _machine() -> Check:
    memory = psutil.virtual_memory()
    cores = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count()
    detail = f"{platform.system()} {platform.machine()}, {cores} cores, "
    detail += f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB memory free"
    return Check("machine", memory.available > 2 * 2**30, detail)


def _packages() -> Check:
    versions = {name: _version(name) for name in PACKAGES}
    missing = [name for name, version in versions.items() if version is None]
    found = [f"{name} {version}" for name, version in versions.items() if version]
    extra = [f"{name} {_version(name) or 'absent'}" for name in OPTIONAL_PACKAGES]
    detail = ", ".join(found) + f"; optional: {', '.join(extra)}"
    return Check("packages", not missing, detail + (f"; missing: {', '.join(missing)}" if missing else ""))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _workspace(settings: Settings) -> Check:
    folder = settings.workspace
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        return Check("workspace", False, f"{folder} cannot be written ({error.strerror})")
    free = psutil.disk_usage(str(existing)).free
    detail = f"{folder}, {free / 2**30:.1f} GiB free" + (
        "" if existing == folder else ", will be created when it is needed"
    )
    return Check("workspace", free > MIN_FREE_BYTES, detail)


def _mlflow(settings: Settings) -> Check:
    uri = without_password(settings.tracking_uri)
    if not os.environ.get("MLFLOW_TRACKING_URI") and not (settings.workspace / "mlflow.db").exists():
        return Check("mlflow", True, f"embedded, {uri}, will be created when it is needed")
    started = time.monotonic()
    client = tracking.setup(settings)
    models = client.search_registered_models(max_results=100)
    milliseconds = (time.monotonic() - started) * 1000
    kind = "server" if uri.startswith("http") else "embedded"
    names = ", ".join(model.name for model in models) or "no models yet"
    return Check("mlflow", True, f"{kind}, {uri}, {names}, {milliseconds:.0f} ms")


def check_storage() -> Check:
    """Check whether the S3 stores that the environment names answer."""
    endpoint = s3.configured("S3")[0]
    given = {} if endpoint is None else {s3.endpoint_source(endpoint): endpoint}
    mlflow = os.environ.get("MLFLOW_S3_ENDPOINT_URL")
    if mlflow and mlflow != endpoint:  # only MLflow reads this variable: artifacts and data are in different stores
        given["MLFLOW_S3_ENDPOINT_URL"] = mlflow
    if not given:
        return Check("storage", True, "local files, and S3 at AWS (no endpoint is configured)")
    for name, url in given.items():
        reason = why_unreachable(url)
        if reason is not None:
            return Check("storage", False, f"{name}={url} {reason}")
    profile = os.environ.get("AWS_PROFILE")
    keys = "keys of AWS_ACCESS_KEY_ID" if os.environ.get("AWS_ACCESS_KEY_ID") else f"keys of the profile {profile}"
    endpoints = ", ".join(f"{url} ({name})" for name, url in given.items())
    known = keys if os.environ.get("AWS_ACCESS_KEY_ID") or profile else "without AWS_ACCESS_KEY_ID"
    return Check("storage", True, f"S3 at {endpoints} answers, {known}")


def _ray() -> Check:
    address = cluster.cluster_address()
    problem = temporary_folder_problem() if address is None else None
    if problem is not None:
        return Check("ray", False, f"{problem}; set RAY_TMPDIR=/tmp")
    if address is None:
        return Check("ray", True, "embedded: starts when it is needed, listens on loopback, ends with the command")
    reason = why_unreachable(address) if ":" in address else None
    return Check("ray", reason is None, f"RAY_ADDRESS={address} {reason or 'answers'}")


def _jobs() -> Check:
    address, joined = jobs.api_address(), cluster.cluster_address()
    if joined is not None and ":" in joined and why_unreachable(joined) is not None:
        # Ray's client of the jobs API would first try for 40 s to find the dashboard of this cluster.
        return Check("ray jobs", True, f"not checked, because RAY_ADDRESS={joined} does not answer")
    reason = why_unreachable(address)
    if reason is None:
        return Check("ray jobs", True, f"{address} answers, {len(jobs.jobs())} jobs")
    # The user did not configure the default address: a machine without a cluster passes this check.
    is_configured = address != jobs.DEFAULT_ADDRESS
    detail = f"{address} {reason}" if is_configured else f"no cluster at {address}"
    return Check("ray jobs", not is_configured, detail)
