"""The commands `jobs`: run commands as jobs on a Ray cluster."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from animediffusion.cli import common
from animediffusion.console import facts, table

jobs = common.group(help="Run commands as jobs on a Ray cluster.")


@jobs.command("submit", context_settings={"ignore_unknown_options": True})
def jobs_submit(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND ...", help="Command to run on the cluster.")],
    with_code: Annotated[
        bool, typer.Option("--with-code", help="Send this package along; the job uses it instead of the installed one.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the job's log and exit with its code.")] = False,
) -> int:
    """Run a command as a job on the cluster."""
    from animediffusion.platform.cluster.jobs import submit
    from animediffusion.platform.errors import ConfigError

    if command[0].startswith("-"):
        raise ConfigError(
            command[0], "unknown option of jobs submit", "write jobs submit [--with-code] [--wait] -- COMMAND ..."
        )
    console = common.console()
    job = submit(command, with_code=with_code)
    console.note(f"job {job}")
    code = _follow(job) if wait else 0
    console.result({"id": job, "exit_code": code if wait else None}, job)
    return code


@jobs.command("list")
def jobs_list() -> None:
    """List the jobs that the cluster knows, newest first."""
    from animediffusion.platform.cluster.jobs import jobs

    console = common.console()
    found = [asdict(job) for job in jobs()]
    console.result(found, table(found, "no jobs"))


@jobs.command("status")
def jobs_status(job: Annotated[str, typer.Argument(metavar="ID", help="Id of the job.")]) -> None:
    """Show a job's status."""
    from animediffusion.platform.cluster.jobs import status

    console = common.console()
    found = asdict(status(job))
    console.result(found, facts(found))


@jobs.command("logs")
def jobs_logs(
    job: Annotated[str, typer.Argument(metavar="ID", help="Id of the job.")],
    follow: Annotated[bool, typer.Option("--follow", help="Follow until the job ends and exit with its code.")] = False,
) -> int:
    """Show a job's output so far."""
    from animediffusion.platform.cluster.jobs import logs

    console = common.console()
    if not follow:
        text = logs(job)
        console.result({"id": job, "log": text}, text.removesuffix("\n"))
        return 0
    code = _follow(job)
    if console.as_json:
        console.result({"id": job, "exit_code": code}, "")
    return code


@jobs.command("stop")
def jobs_stop(job: Annotated[str, typer.Argument(metavar="ID", help="Id of the job.")]) -> None:
    """Stop a job; a training job saves a checkpoint first."""
    from animediffusion.platform.cluster.jobs import stop

    console = common.console()
    stopped = stop(job)
    console.result({"id": job, "stopped": stopped}, f"{job} {'is stopping' if stopped else 'had ended already'}")


def _follow(job: str) -> int:
    """Print a job's output until the job ends; return its exit code."""
    from animediffusion.platform.cluster.jobs import follow

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    return follow(job, write)
