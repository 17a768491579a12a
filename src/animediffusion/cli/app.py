"""The command line: all commands with their options, and the conversion of errors to exit codes.

Each command imports heavy packages only when it runs, so that --help is fast. Commands print results to stdout, and
progress and errors to stderr; with `--json`, the last line of stdout is one JSON object.

Exit codes: 0 success; 1 failure, or some items failed; 2 wrong usage, setting or input; 130 after SIGINT; 143 after
SIGTERM.
"""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any

import typer

from animediffusion.cli import common, corrections, data, doctor, improve, jobs, models, serve, train, tune
from animediffusion.cli.common import Common

app = common.group(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Color anime line art from a reference image: train, tune, promote and serve a diffusion model.",
    epilog="All commands also take: --workspace DIR (ANIMEDIFFUSION_WORKSPACE, default ./workspace), --json, --debug.",
)

for _name, _group in (
    ("data", data.data),
    ("tune", tune.tune),
    ("models", models.models),
    ("keys", serve.keys),
    ("corrections", corrections.corrections),
    ("jobs", jobs.jobs),
):
    app.add_typer(_group, name=_name)
for _command in (train.train, train.evaluate, improve.improve, serve.colorize, serve.serve, doctor.doctor):
    app.command()(_command)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code."""
    code = run(list(sys.argv[1:] if argv is None else argv))
    _discard_unwritten()
    sys.stdout = sys.stderr  # until Ray has ended it repeats what its workers print, and the result is the last line
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    from animediffusion.platform.errors import AnimeDiffusionError, Interrupted

    _prepare_streams()
    _warn_of_variables()
    # Otherwise mlflow writes to the user's home and sends telemetry as soon as it is imported.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # MLflow transfers artifacts with boto3: use growing random pauses, and more than boto3's default of three attempts.
    os.environ.setdefault("AWS_RETRY_MODE", "standard")
    os.environ.setdefault("AWS_MAX_ATTEMPTS", "10")
    options = Common()
    try:
        arguments, options = split_common(arguments)
        common.current.set(options)
        _reject_empty(arguments)
        _check_working_directory(arguments)
        code = commands()(arguments, prog_name="animediffusion", standalone_mode=False)
        return int(code or 0)
    except Interrupted as stopped:
        return _fail(str(stopped), stopped, stopped.exit_code, options.debug)
    except AnimeDiffusionError as error:
        return _fail(f"error: {error}", error, error.exit_code, options.debug)
    except typer.Exit as error:
        return int(error.exit_code)
    except typer.Abort:
        return 130
    except BrokenPipeError:
        return 1
    except Exception as error:
        usage = getattr(error, "format_message", None)
        if usage is not None and type(error).__name__ == "NoArgsIsHelpError":  # its message is the help
            return _fail(usage(), error, 2, options.debug)
        if usage is not None:
            return _fail(f"error: {_usage(error)}", error, 2, options.debug)
        if isinstance(error, OSError) and error.errno and error.filename is not None:
            return _fail(f"error: {_file_error(error)}", error, 2, options.debug)
        if options.debug:
            raise
        return _fail(
            f"error: {type(error).__name__}: {_first_line(error)}; run again with --debug", error, 1, options.debug
        )


@functools.cache
def commands() -> Any:
    """Return the commands as click runs them, which takes typer a tenth of a second; tests run many in one process."""
    return typer.main.get_command(app)


def _prepare_streams() -> None:
    """Print characters that the terminal's encoding lacks with escapes, so that no file name ends a command."""
    if sys.stderr is None:  # closed by the process that started the command
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _discard_unwritten() -> None:
    """Discard output that cannot be written: Python would try again at its end, print more lines and exit with 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _check_working_directory(arguments: Sequence[str]) -> None:
    from animediffusion.platform.errors import ConfigError

    try:
        os.getcwd()
    except OSError as error:
        if not {"-h", "--help", "--version"}.intersection(arguments):
            raise ConfigError("working directory", "no longer exists", "change to another folder") from error


def _warn_of_variables() -> None:
    if any(name.upper().startswith("ANIMEDIFFUSION_") for name in os.environ):  # else skip the import
        from animediffusion.platform.config import unknown_variables

        for line in unknown_variables():
            print(f"warning: {line}", file=sys.stderr)


def _fail(line: str, error: BaseException, code: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exception(error)
    print(line, file=sys.stderr)
    return code


def _usage(error: Any) -> str:
    command = error.ctx.command_path if getattr(error, "ctx", None) else "animediffusion"
    message = error.format_message().rstrip(".")
    return f"{command}: {message[:1].lower() + message[1:]}; see {command} --help"


def _file_error(error: OSError) -> Exception:
    """Return the error for a file that cannot be read or written, most often the file of --out."""
    from animediffusion.platform.errors import StorageError
    from animediffusion.platform.storage.local_files import reason

    return StorageError(os.fsdecode(str(error.filename)), reason(error), "check the path and its permissions")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def _reject_empty(arguments: Sequence[str]) -> None:
    """Reject an empty argument: it comes from an unset variable of a shell, and would mean the working directory."""
    from animediffusion.platform.errors import ConfigError

    end = arguments.index("--") if "--" in arguments else len(arguments)
    for before, argument in pairwise(["animediffusion", *arguments[:end]]):
        name, mark, value = argument.partition("=")
        if not argument and before != "--why":
            raise ConfigError(f"argument after {before}", "is empty", "give a value, or omit the argument")
        if name.startswith("--") and mark and not value and name != "--why":
            raise ConfigError(name, "is empty", "give a value, or omit the option")


def split_common(arguments: list[str]) -> tuple[list[str], Common]:
    """Remove --workspace, --json and --debug from any position before a `--` and return them as Common."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    rest: list[str] = []
    options = Common()
    head = iter(arguments[:end])
    for argument in head:
        name, separator, value = argument.partition("=")
        if argument == "--json":
            options = options._replace(json=True)
        elif argument == "--debug":
            options = options._replace(debug=True)
        elif name == "--workspace":
            options = options._replace(workspace=_folder(options, value if separator else next(head, None)))
        else:
            rest.append(argument)
    return rest + arguments[end:], options


def _folder(options: Common, value: str | None) -> str:
    from animediffusion.platform.errors import ConfigError

    if options.workspace:
        raise ConfigError("--workspace", "given twice", "give it once")
    if not value:
        raise ConfigError("--workspace", "no folder given", "write --workspace DIR")
    return value


@app.command()
def demo(
    minutes: Annotated[
        float, typer.Option(min=0.1, metavar="N", help="Training time of both phases together, in minutes.")
    ] = 5.0,
    rows: Annotated[int, typer.Option(min=100, metavar="N", help="Number of faces to draw and to train on.")] = 2000,
    serve: Annotated[bool, typer.Option("--serve/--no-serve", help="Keep serving the page at the end.")] = True,
    port: Annotated[
        int, typer.Option(min=1, max=65000, metavar="PORT", help="Port of the page; the next free port if in use.")
    ] = 8000,
) -> int:
    """Run every stage once, from drawing faces to coloring over HTTP."""
    from animediffusion.demo import run_demo

    return run_demo(common.settings(), minutes, common.console(), rows=rows, port=port, stay=serve)


def _version(show: bool) -> None:
    if show:
        from animediffusion import __version__

        print(f"animediffusion {__version__}")
        raise typer.Exit


for _group in (app, data.data, tune.tune, models.models, serve.keys, corrections.corrections, jobs.jobs):
    for _registered in _group.registered_commands:
        _registered.cls = common.Command


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    # Ray's workers inherit the variable; warnings of libraries do not help users.
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
