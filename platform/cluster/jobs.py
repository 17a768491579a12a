"""Run a command as a job on a Ray cluster: submit, list, status, logs, stop.

The cluster's address is RAY_API_SERVER_ADDRESS, an http RAY_ADDRESS, or the dashboard on this machine; its token, if it
requires one, is RAY_AUTH_TOKEN. The job runs `python -m animediffusion COMMAND ...` with the package of the cluster's
image, or with this package if it is sent along. Jobs use the settings and secrets of the cluster; none are sent.
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
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

import animediffusion
from animediffusion.platform.errors import ClusterError, ConfigError
from animediffusion.platform.network import why_unreachable

DEFAULT_ADDRESS = "http://127.0.0.1:8265"

FAILED = 1
STOPPED = 130
"""Exit code of a job that was stopped, equal to that of an interrupted command."""

_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class JobRecord:
    """One job of the cluster, as `jobs list --json` prints it."""

    id: str
    status: str
    """pending, running, succeeded, failed or stopped."""
    entrypoint: str
    """The command that the job runs."""
    started: str | None
    """Time of the start, ISO 8601, UTC; None if the job has not started."""
    ended: str | None
    """Time of the end, ISO 8601, UTC; None if the job has not ended."""
    exit_code: int | None
    """Exit code of the command; None if it has not ended or could not start."""
    message: str
    """First line of Ray's message about the status."""


def api_address() -> str:
    """Return the http address of the cluster's jobs API."""
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        address = os.environ.get(name, "")
        if address.startswith(("http://", "https://")):
            return address.rstrip("/")
    return DEFAULT_ADDRESS


def submit(command: Sequence[str], *, with_code: bool = False, name: str | None = None) -> str:
    """Start `animediffusion COMMAND ...` on the cluster and return the job's id.

    Args:
        command: the command of `animediffusion` and its arguments.
        with_code: send this package along and use it instead of the package in the cluster's image.
        name: id of the job; Ray generates an id if None.

    Raises:
        ConfigError: if `command` is empty.
        ClusterError: if nothing answers, the token is wrong, or the cluster rejects the job.
    """
    if not command:
        raise ConfigError("jobs submit", "no command", "write it after --, for example: jobs submit -- train demo")
    # Send the directory, never a wheel: Ray would pip-install a wheel and its dependencies over the node's own ray.
    runtime_env = {"py_modules": [str(_package())]} if with_code else {}
    with _client() as client:
        return str(
            client.submit_job(
                entrypoint=f"{cluster_python()} -m animediffusion {shlex.join(command)}",
                runtime_env=runtime_env,
                submission_id=name,
                metadata={"job_name": name or f"animediffusion {command[0]}"},
            )
        )


def jobs() -> list[JobRecord]:
    """Return all jobs that the cluster knows, newest first."""
    with _client() as client:
        found = [job for job in client.list_jobs() if job.submission_id]
    return [_record(job) for job in sorted(found, key=lambda job: -(job.start_time or 0))]


def status(job_id: str) -> JobRecord:
    """Return the record of a job."""
    with _client(job_id) as client:
        return _record(client.get_job_info(job_id))


def logs(job_id: str) -> str:
    """Return the output that a job has printed so far."""
    with _client(job_id) as client:
        return str(client.get_job_logs(job_id))


def follow(job_id: str, write: Callable[[str], object]) -> int:
    """Pass a job's output to `write` until the job ends; return the exit code of its command.

    The exit code is 1 if the job could not start and 130 if it was stopped.
    """
    written, complete = 0, False
    with _client(job_id) as client:
        while not complete:
            # Ray returns the complete log of an ended job, so a lost connection loses no output.
            ended = client.get_job_status(job_id).is_terminal()
            written, whole = asyncio.run(_tail(client, job_id, write, written))
            info = client.get_job_info(job_id)
            complete = info.status.is_terminal() and (whole or ended)
            if not complete:
                time.sleep(_POLL_SECONDS)
        return _exit_code(info, write)


def stop(job_id: str) -> bool:
    """Stop a job; return False if it had already ended."""
    with _client(job_id) as client:
        if client.get_job_status(job_id).is_terminal():
            return False
        return bool(client.stop_job(job_id))


async def _tail(
    client: JobSubmissionClient, job_id: str, write: Callable[[str], object], written: int
) -> tuple[int, bool]:
    """Write the log from character `written` on; return the length written so far and whether the log has ended."""
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


def _exit_code(info: JobDetails, write: Callable[[str], object]) -> int:
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.status == JobStatus.STOPPED:
        return STOPPED
    code = info.driver_exit_code
    if code is None:
        write(f"{(info.message or 'the job could not start').strip().splitlines()[0]}\n")
        return FAILED
    # Ray reports the exit code -n for a command that was killed by signal n; a shell reports 128 + n.
    return 128 - code if code < 0 else code or FAILED


def _record(job: JobDetails) -> JobRecord:
    return JobRecord(
        id=job.submission_id,
        status=str(job.status.value).lower(),
        entrypoint=job.entrypoint,
        started=_time(job.start_time),
        ended=_time(job.end_time),
        exit_code=job.driver_exit_code,
        message=(job.message or "").strip().split("\n")[0],
    )


def _time(milliseconds: int | None) -> str | None:
    if not milliseconds:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")


def cluster_python() -> str:
    """Return a shell expression for the Python interpreter on the cluster.

    A loopback address may belong to this machine, which uses the running interpreter, or to a cluster behind a tunnel
    or in a container, which does not have that file and uses `python`.
    """
    if urlsplit(api_address()).hostname not in ("127.0.0.1", "localhost", "::1"):
        return "python"
    return f'"$(command -v {shlex.quote(sys.executable)} || echo python)"'


def _token() -> str | None:
    """Return the cluster's token from the places where Ray itself looks for it."""
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    if token or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return token or None
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return path.read_text().strip() if path.is_file() else None


def _package() -> Path:
    return Path(animediffusion.__file__).absolute().parent


@contextmanager
def _client(job_id: str | None = None) -> Iterator[JobSubmissionClient]:
    """Yield a client of the jobs API and convert its errors to a one-line ClusterError."""
    address = api_address()
    thing = f"Ray jobs at {address}"
    reason = why_unreachable(address)
    if reason is not None:
        raise ClusterError(thing, reason, "set RAY_API_SERVER_ADDRESS to the cluster's dashboard")
    token = _token()
    # This logger sets its own level on import and would report the end of each log.
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    try:
        with _api_server(address):
            client = JobSubmissionClient(address, headers={"Authorization": f"Bearer {token}"} if token else None)
        yield client
    except Exception as error:  # Ray raises RuntimeError, ConnectionError and aiohttp's errors
        if isinstance(error, ClusterError):
            raise
        raise _explained(thing, job_id, str(error)) from error


@contextmanager
def _api_server(address: str) -> Iterator[None]:
    """Make Ray use this address of the jobs API. Without RAY_API_SERVER_ADDRESS, it prefers RAY_ADDRESS."""
    before = os.environ.get("RAY_API_SERVER_ADDRESS")
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ["RAY_API_SERVER_ADDRESS"]
        else:
            os.environ["RAY_API_SERVER_ADDRESS"] = before


def _explained(thing: str, job_id: str | None, message: str) -> ClusterError:
    if any(sign in message for sign in ("401", "403", "Unauthorized", "authentication", "InvalidAuthToken")):
        return ClusterError(thing, "rejects the token", "set RAY_AUTH_TOKEN to the cluster's token")
    if job_id is not None and ("404" in message or "does not exist" in message):
        return ClusterError(f"job {job_id}", "no such job", "see `animediffusion jobs list`")
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return ClusterError(thing, f"failed ({lines[0] if lines else 'no reason given'})", "see `animediffusion doctor`")
