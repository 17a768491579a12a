"""Run a verb as a job on a Ray cluster: submit, list, status, log, stop.

The cluster is RAY_API_SERVER_ADDRESS, an http RAY_ADDRESS, or the dashboard on this machine; RAY_AUTH_TOKEN is the
token where it asks for one. What runs there is `python -m animediffusion VERB ...` of the image, or of this package
directory when it is sent along. Settings and secrets are the cluster's own: none is sent.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

import animediffusion
from animediffusion.platform.errors import ClusterError, ConfigError
from animediffusion.platform.network import why_unreachable

DEFAULT_ADDRESS = "http://127.0.0.1:8265"

FAILED = 1
STOPPED = 130
"""Exit code of a job that was stopped, as of a command that was interrupted."""

_POLL_SECONDS = 1.0


def api_address() -> str:
    """The http address of the cluster's jobs API."""
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        address = os.environ.get(name, "")
        if address.startswith(("http://", "https://")):
            return address.rstrip("/")
    return DEFAULT_ADDRESS


def submit(verb: Sequence[str], *, with_code: bool = False, name: str | None = None) -> str:
    """Start `animediffusion VERB ...` on the cluster; returns the job's id.

    Args:
        verb: the verb and its arguments.
        with_code: send this package along, in place of the one that the cluster's image has.
        name: id of the job; one is made up if None.

    Raises:
        ClusterError: nothing answers, the token is wrong, or the cluster refuses the job.
    """
    if not verb:
        raise ConfigError("jobs submit", "no verb", "write it after --, for example: jobs submit -- train demo")
    runtime_env: dict[str, Any] = {}
    if with_code:
        # The directory, never a wheel: Ray would pip-install that with its dependencies over the node's own ray.
        runtime_env["py_modules"] = [str(_package())]
    with _client() as client:
        return str(
            client.submit_job(
                entrypoint=f"{_python()} -m animediffusion {shlex.join(verb)}",
                runtime_env=runtime_env,
                submission_id=name,
                metadata={"job_name": name or f"animediffusion {verb[0]}"},
            )
        )


def jobs() -> list[dict[str, Any]]:
    """All jobs that the cluster remembers, the newest first."""
    with _client() as client:
        found = [job for job in client.list_jobs() if job.submission_id]
    return [_summary(job) for job in sorted(found, key=lambda job: -(job.start_time or 0))]


def status(job_id: str) -> dict[str, Any]:
    """`{id, status, entrypoint, started, ended, exit_code, message}` of a job."""
    with _client(job_id) as client:
        return _summary(client.get_job_info(job_id))


def logs(job_id: str) -> str:
    """What a job has printed so far."""
    with _client(job_id) as client:
        return str(client.get_job_logs(job_id))


def follow(job_id: str, write: Callable[[str], Any]) -> int:
    """Hand a job's output to `write` until it ends; returns the exit code of the command that ran.

    1 where Ray gives none (the job could not start), 130 where it was stopped.
    """
    written, complete = 0, False
    with _client(job_id) as client:
        while not complete:
            # The log of a job that has ended comes whole, so a connection that drops loses nothing.
            ended = client.get_job_status(job_id).is_terminal()
            written, whole = asyncio.run(_tail(client, job_id, write, written))
            info = client.get_job_info(job_id)
            complete = info.status.is_terminal() and (whole or ended)
            if not complete:
                time.sleep(_POLL_SECONDS)
        return _exit_code(info, write)


def stop(job_id: str) -> bool:
    """Ask a job to end; False where it had ended already."""
    with _client(job_id) as client:
        if client.get_job_status(job_id).is_terminal():
            return False
        return bool(client.stop_job(job_id))


async def _tail(
    client: JobSubmissionClient, job_id: str, write: Callable[[str], Any], written: int
) -> tuple[int, bool]:
    """Write the log from character `written` on; returns its length so far, and whether it came to its end."""
    position = 0
    try:
        async for text in client.tail_job_logs(job_id):
            position += len(text)
            if position > written:
                write(text[len(text) - (position - written) :])
                written = position
    except (RuntimeError, OSError):
        return written, False
    return written, True


def _exit_code(info: JobDetails, write: Callable[[str], Any]) -> int:
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.status == JobStatus.STOPPED:
        return STOPPED
    code = info.driver_exit_code
    if code is None:
        write(f"{(info.message or 'the job could not start').strip().splitlines()[0]}\n")
        return FAILED
    # A command that died from signal n has the exit code -n here, and 128 + n in a shell.
    return 128 - code if code < 0 else code or FAILED


def _summary(job: JobDetails) -> dict[str, Any]:
    return {
        "id": job.submission_id,
        "status": str(job.status.value).lower(),
        "entrypoint": job.entrypoint,
        "started": _time(job.start_time),
        "ended": _time(job.end_time),
        "exit_code": job.driver_exit_code,
        "message": (job.message or "").strip().split("\n")[0],
    }


def _time(milliseconds: int | None) -> str | None:
    if not milliseconds:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")


def _python() -> str:
    """The interpreter on the cluster, for its shell: the image's.

    Behind a loopback address may be this machine, where it is the one that runs this; or a cluster at the other end of
    a tunnel or in a container, which has no such file.
    """
    if urlsplit(api_address()).hostname not in ("127.0.0.1", "localhost", "::1"):
        return "python"
    return f'"$(command -v {shlex.quote(sys.executable)} || echo python)"'


def _token() -> str | None:
    """The cluster's token, found as Ray itself finds it."""
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    if token or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return token or None
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return path.read_text().strip() if path.is_file() else None


def _package() -> Path:
    return Path(animediffusion.__file__).absolute().parent


@contextmanager
def _client(job_id: str | None = None) -> Iterator[JobSubmissionClient]:
    """A client of the jobs API, with what goes wrong in one line."""
    address = api_address()
    thing = f"Ray jobs at {address}"
    reason = why_unreachable(address)
    if reason is not None:
        raise ClusterError(thing, reason, "set RAY_API_SERVER_ADDRESS to the cluster's dashboard")
    token = _token()
    # It sets its own level when it is imported, and would say that each log has ended.
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    try:
        yield JobSubmissionClient(address, headers={"Authorization": f"Bearer {token}"} if token else None)
    except Exception as error:  # Ray raises RuntimeError, ConnectionError and aiohttp's errors
        if isinstance(error, ClusterError):
            raise
        raise _explained(thing, job_id, str(error)) from error


def _explained(thing: str, job_id: str | None, message: str) -> ClusterError:
    if any(sign in message for sign in ("401", "403", "Unauthorized", "authentication", "InvalidAuthToken")):
        return ClusterError(thing, "refuses the token", "set RAY_AUTH_TOKEN to the cluster's token")
    if job_id is not None and ("404" in message or "does not exist" in message):
        return ClusterError(f"job {job_id}", "no such job", "see `animediffusion jobs list`")
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return ClusterError(thing, f"failed ({lines[0] if lines else 'no reason given'})", "see `animediffusion doctor`")
