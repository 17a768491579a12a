"""The command line: every verb, its arguments, and the one place where errors become exit codes.

Everything heavy is imported inside the verb that needs it, so that --help is instant. What verbs print for people goes
to stdout (results) and stderr (progress, errors); `--json` makes the last line of stdout one JSON object.

Exit codes: 0 done; 1 failed, or some items failed; 2 wrong usage, setting or input; 130 / 143 after SIGINT / SIGTERM.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from animediffusion.console import Console

if TYPE_CHECKING:
    from animediffusion.pipelines.plan import Plan
    from animediffusion.platform.config import Settings

_HELP: dict[str, Any] = {"no_args_is_help": True, "context_settings": {"help_option_names": ["-h", "--help"]}}
app = typer.Typer(
    **_HELP,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Color anime line art from a reference image: train, tune, promote and serve a diffusion model.",
    epilog="Every verb also takes: --workspace DIR (ANIMEDIFFUSION_WORKSPACE, default ./workspace), --json, --debug.",
)
data = typer.Typer(**_HELP, help="Make and look at datasets.")
tune = typer.Typer(**_HELP, help="Search for better settings with Ray Tune.")
models = typer.Typer(**_HELP, help="Register, promote and roll back models.")
keys = typer.Typer(**_HELP, help="Make and revoke API keys.")
jobs = typer.Typer(**_HELP, help="Run verbs on a Ray cluster.")
for name, group in (("data", data), ("tune", tune), ("models", models), ("keys", keys), ("jobs", jobs)):
    app.add_typer(group, name=name)


class _Common(NamedTuple):
    workspace: str | None
    json: bool
    debug: bool


_common = _Common(None, False, False)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code."""
    sys.exit(run(list(sys.argv[1:] if argv is None else argv)))


def run(arguments: list[str]) -> int:
    """Run one command; returns its exit code."""
    global _common
    from animediffusion.platform.errors import AnimeDiffusionError, Interrupted

    _warn_of_variables()
    # Importing mlflow is enough for it to write to the user's home and to call its maker.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # boto3, with which MLflow moves artifacts: pauses that grow, at random, and more than its three attempts.
    os.environ.setdefault("AWS_RETRY_MODE", "standard")
    os.environ.setdefault("AWS_MAX_ATTEMPTS", "10")
    try:
        arguments, _common = _split_common(arguments)
        code = app(arguments, prog_name="animediffusion", standalone_mode=False)
        return int(code or 0)
    except Interrupted as stopped:
        return _fail(str(stopped), stopped, stopped.exit_code)
    except AnimeDiffusionError as error:
        return _fail(f"error: {error}", error, error.exit_code)
    except typer.Exit as error:
        return int(error.exit_code)
    except typer.Abort:
        return 130
    except BrokenPipeError:
        return 1
    except Exception as error:
        usage = getattr(error, "format_message", None)
        if usage is not None:
            return _fail(f"error: {_usage(error)}", error, 2)
        if _common.debug:
            raise
        return _fail(f"error: {type(error).__name__}: {_first_line(error)}; run again with --debug", error, 1)


def _warn_of_variables() -> None:
    if any(name.upper().startswith("ANIMEDIFFUSION_") for name in os.environ):  # else the import is not needed
        from animediffusion.platform.config import unknown_variables

        for line in unknown_variables():
            print(f"warning: {line}", file=sys.stderr)


def _fail(line: str, error: BaseException, code: int) -> int:
    if _common.debug:
        import traceback

        traceback.print_exception(error)
    print(line, file=sys.stderr)
    return code


def _usage(error: Any) -> str:
    command = error.ctx.command_path if getattr(error, "ctx", None) else "animediffusion"
    message = error.format_message().rstrip(".")
    return f"{command}: {message[:1].lower() + message[1:]}; see {command} --help"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def _split_common(arguments: list[str]) -> tuple[list[str], _Common]:
    """Take --workspace, --json and --debug out, wherever they stand before a `--`."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    rest: list[str] = []
    values: dict[str, Any] = {"workspace": None, "json": False, "debug": False}
    head = iter(arguments[:end])
    for argument in head:
        name, separator, value = argument.removeprefix("--").partition("=")
        if argument in ("--json", "--debug"):
            values[name] = True
        elif argument.startswith("--") and name == "workspace":
            from animediffusion.platform.errors import ConfigError

            if values["workspace"]:
                raise ConfigError("--workspace", "given twice", "give it once")
            values["workspace"] = value if separator else next(head, None)
            if not values["workspace"]:
                raise ConfigError("--workspace", "no folder given", "write --workspace DIR")
        else:
            rest.append(argument)
    return rest + arguments[end:], _Common(**values)


def _settings() -> Settings:
    from animediffusion.platform.config import Settings

    return Settings.from_environment(workspace=_common.workspace)


def _use_attention(settings: Settings) -> None:
    """ANIMEDIFFUSION_ATTENTION, for the models of this process."""
    from animediffusion.models.attention import use_attention
    from animediffusion.platform.errors import ConfigError

    try:
        use_attention(settings.attention)
    except ValueError as error:
        raise ConfigError("ANIMEDIFFUSION_ATTENTION", str(error), "unset it") from error


def _connect(settings: Settings) -> None:
    from animediffusion.platform import cluster

    cluster.connect(settings)


def _console() -> Console:
    return Console(as_json=_common.json)


# --- demo -----------------------------------------------------------------------------------------------------------


@app.command()
def demo(
    minutes: Annotated[float, typer.Option(min=0.1, help="Training minutes, both phases together.")] = 6.0,
    rows: Annotated[int, typer.Option(min=100, help="Faces to draw and learn from.")] = 4000,
    serve: Annotated[bool, typer.Option("--serve/--no-serve", help="Stay up and serve the page at the end.")] = True,
    port: Annotated[int, typer.Option(min=1, max=65000, help="Port of the page; the next free one if taken.")] = 8000,
) -> int:
    """Every stage once, from drawn faces to pictures colored over HTTP."""
    from animediffusion.demo import run_demo

    return run_demo(_settings(), minutes, _console(), rows=rows, port=port, stay=serve)


# --- data -----------------------------------------------------------------------------------------------------------


@data.command("synthesize")
def data_synthesize(
    dst: Annotated[str, typer.Argument(help="A new folder.")],
    count: Annotated[int, typer.Option(min=1, help="Rows in all; a tenth of them is for val.")],
    size: Annotated[int, typer.Option(help="Side in pixels.")] = 64,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Draw anime faces: target, sketch, reference and a second view with the same colors."""
    from animediffusion.pipelines.synthesize import synthesize

    console = _console()
    with console.progress("drawing", "rows") as progress:
        result = synthesize(dst, count, size, seed, progress)
    console.result(result, f"drew {result['rows']} rows in {result['seconds']:.1f} s: {dst}")


@data.command("ingest")
def data_ingest(
    src: Annotated[str, typer.Argument(help="Folder or s3:// prefix of images.")],
    dst: Annotated[str, typer.Argument(help="Folder or s3:// prefix of the dataset to make.")],
    size: Annotated[int, typer.Option(help="Side in pixels.")] = 64,
    pairs: Annotated[str | None, typer.Option(help="CSV with target,sketch,reference,... paths.")] = None,
    val_fraction: Annotated[float, typer.Option(help="Where no folder names a split.")] = 0.05,
) -> None:
    """Turn images into a dataset of Parquet shards; goes on where it was killed."""
    from animediffusion.pipelines.ingest import over_ray, prepare

    console, settings = _console(), _settings()
    job = prepare(src, dst, size, pairs, val_fraction)
    if job.done is None:
        console.note("continues an earlier ingest" if job.continues else "starting Ray")
        _connect(settings)
    with console.progress("ingesting", "files") as progress:
        manifest = job.run(progress, partial(over_ray, tell=console.note))
    splits = {name: split.rows for name, split in manifest.splits.items()}
    line = ", ".join(f"{name} {rows}" for name, rows in splits.items())
    state = "up to date" if job.done is not None else "ingested"
    console.result(
        {"data": dst, "splits": splits, **manifest.model_dump(include={"num_files", "num_rejects", "content_hash"})},
        f"{state}: {line} rows, {manifest.num_rejects} of {manifest.num_files} files rejected: {dst}",
    )


@data.command("show")
def data_show(
    dst: Annotated[str, typer.Argument(help="A dataset, or a synthesized folder.")],
    out: Annotated[str | None, typer.Option(help="Where to write a contact sheet (PNG).")] = None,
) -> None:
    """Count rows and rejects, and draw a contact sheet."""
    from animediffusion.pipelines.sheet import show

    console = _console()
    result = show(dst, out)
    console.result(result, console.facts(result))


# --- train, evaluate ------------------------------------------------------------------------------------------------


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (demo, phase1, phase2, ...) or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="data=, max_steps=, init_from=, ...")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved run, try some steps for what it will take, and stop.")
    ] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate/--no-estimate", help="Of --dry-run: time and memory, or only the settings.")
    ] = True,
) -> None:
    """Train on Ray; the same command continues a run that was stopped."""
    from animediffusion.pipelines.plan import plan
    from animediffusion.pipelines.recipe import load_recipe
    from animediffusion.pipelines.train import train as run_training
    from animediffusion.platform.errors import ConfigError

    if not (dry_run or estimate):
        raise ConfigError("--no-estimate", "given without --dry-run", "leave it out")
    console, settings = _console(), _settings()
    _use_attention(settings)
    config = load_recipe(recipe, overrides or [])
    work = plan(settings, config)
    if dry_run:
        _dry_run(console, work, estimate)
        return
    if work.finished:
        console.note(f"{work.run} is finished")
    elif work.start_step:
        console.note(f"resuming {work.run} at step {work.start_step}")
    else:
        console.note(f"run {work.run}")
    if not work.finished:
        _connect(settings)
    with console.training() as report:
        result = run_training(settings, config, report)
    console.result(result, console.run(result))


def _dry_run(console: Console, work: Plan, measure: bool) -> None:
    """Settings at once, then what the run will take."""
    from animediffusion.pipelines.estimate import estimate, lines
    from animediffusion.pipelines.plan import describe

    facts = describe(work)
    if not measure:
        console.result(facts, facts["yaml"])
        return
    if not console.as_json:
        console.say(facts["yaml"])
    console.note("trying some steps, about 15 s; --no-estimate leaves that out")
    found = estimate(work)
    console.result({**facts, "estimate": found}, "\n".join(lines(found)))


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A bundle folder or URI, models:/animediffusion@champion, ...")],
    data: Annotated[str, typer.Argument(help="A dataset.")],
    split: Annotated[str, typer.Option()] = "val",
    out: Annotated[Path | None, typer.Option(help="Folder for metrics.json and grid.png.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N rows.")] = None,
) -> None:
    """Measure a model, with trivial baselines beside it."""
    from animediffusion.pipelines.evaluate import evaluate_and_record

    console, settings = _console(), _settings()
    _use_attention(settings)
    with console.progress("coloring", "images") as progress:
        result = evaluate_and_record(settings, model, data, split, limit, out, progress)
    console.result(result, console.metrics(result))


# --- tune -----------------------------------------------------------------------------------------------------------


@tune.command("sampler")
def tune_sampler(
    model: Annotated[str, typer.Argument(help="A bundle folder or URI, models:/animediffusion@champion, ...")],
    data: Annotated[str, typer.Argument(help="A dataset.")],
    trials: Annotated[int, typer.Option(min=1, help="Settings to know in the end, earlier searches counted.")] = 50,
    minutes: Annotated[float | None, typer.Option(min=0.0, help="Stop after this.")] = None,
    prefer: Annotated[str, typer.Option(help="knee, fast or best.")] = "knee",
    register: Annotated[bool, typer.Option("--register/--no-register")] = True,
) -> None:
    """Search sampler, steps, guidance, shift and the weights' average of a fixed model; register it with the best."""
    from animediffusion.pipelines.evaluate import evaluate as measure
    from animediffusion.pipelines.tune import tune_sampler as search

    console, settings = _console(), _settings()
    _use_attention(settings)
    result = search(
        settings,
        model,
        data,
        trials=trials,
        minutes=minutes,
        prefer=prefer,  # type: ignore[arg-type]
        register=register,
        progress=console.note,
        evaluate=lambda folder: measure(settings, str(folder), data),
    )
    console.result(result, console.front(result))


@tune.command("schedule")
def tune_schedule(
    data: Annotated[str, typer.Argument(help="A dataset.")],
    recipe: Annotated[str, typer.Option(help="The phase 1 recipe to begin with, a name or a YAML file.")] = "phase1",
    trials: Annotated[int, typer.Option(min=1, help="Settings to try in the end, earlier searches counted.")] = 24,
    minutes: Annotated[float | None, typer.Option(min=0.0, help="Stop after this.")] = None,
    steps: Annotated[int, typer.Option(help="Training steps of the longest trials.")] = 270,
    out: Annotated[Path | None, typer.Option(metavar="RECIPE.yaml", help="Where the recipe goes.")] = None,
) -> None:
    """Search path, times, prediction, rates by short training runs; write the best as a recipe."""
    from animediffusion.pipelines.schedule import tune_schedule as search

    console, settings = _console(), _settings()
    _use_attention(settings)
    result = search(
        settings,
        data,
        recipe=recipe,
        trials=trials,
        minutes=minutes,
        steps=steps,
        out=out,
        progress=console.note,
    )
    console.result(result, console.schedule(result))


# --- models ---------------------------------------------------------------------------------------------------------


@models.command("list")
def models_list() -> None:
    """All versions, the newest first."""
    from animediffusion.pipelines import release
    from animediffusion.platform.version import headline

    console = _console()
    found = release.versions(_settings())
    rows = [{**row, "sha256": row["sha256"][:12], "metrics": headline(row["metrics"])} for row in found]
    console.result(found, console.table(rows, "no versions yet; `animediffusion models register DIR` makes one"))


@models.command("show")
def models_show(
    version: Annotated[str, typer.Argument(help="A number, an alias or models:/...")],
    out: Annotated[Path | None, typer.Option(help="Where to write the drawings it colored (PNG).")] = None,
) -> None:
    """One version: where it comes from, what it is, how good it is, who moved it."""
    from animediffusion.pipelines import release

    console = _console()
    found = release.show(_settings(), version, out)
    console.result(found, console.version(found))


@models.command("compare")
def models_compare(
    first: Annotated[str, typer.Argument(metavar="V1", help="A number, an alias or models:/...")],
    second: Annotated[str, typer.Argument(metavar="V2", help="Another one.")],
    data: Annotated[str | None, typer.Option(help="A dataset to color rows of; drawn faces if left out.")] = None,
    out: Annotated[Path | None, typer.Option(help="The picture, compare-V1-V2.png if left out.")] = None,
) -> None:
    """Two versions side by side: their metrics, and the same drawings colored by both."""
    from animediffusion.pipelines.compare import compare

    console, settings = _console(), _settings()
    _use_attention(settings)
    found = compare(settings, first, second, data=data, out=out)
    console.result(found, console.comparison(found))


@models.command("register")
def models_register(folder: Annotated[str, typer.Argument(metavar="DIR", help="A bundle folder or URI.")]) -> None:
    """Make a bundle the next version."""
    from animediffusion.pipelines import release

    console = _console()
    found = release.register(_settings(), folder)
    console.result(found.summary(), f"version {found.version}")


@models.command("promote")
def models_promote(
    version: Annotated[str, typer.Argument(help="A number or models:/...")],
    alias: Annotated[str, typer.Option(help="champion or challenger.")] = "champion",
    why: Annotated[str, typer.Option(help="Written to the history.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Also a worse one; is written down.")] = False,
) -> None:
    """Point an alias at a version that passes the gate."""
    from animediffusion.pipelines import release

    console = _console()
    found = release.promote(_settings(), version, alias, why, force=force)
    now = "is now" if found["changed"] else "was already"
    console.result(found, f"version {found['version']} {now} {alias}{_canary_ended(found)}")


@models.command("canary", context_settings={"ignore_unknown_options": True})
def models_canary(
    percent: Annotated[int, typer.Argument(metavar="PERCENT", help="0 to 100; 0 ends the canary.")],
    why: Annotated[str, typer.Option(help="Written to the history.")] = "",
) -> None:
    """Send a part of the requests to the challenger; promoting or rolling back ends it."""
    from animediffusion.pipelines.canary import canary

    console = _console()
    found = canary(_settings(), percent, why)
    before = f" (was {found['from']} %)" if found["changed"] else " already"
    champion, challenger = found["champion"], found["challenger"]
    split = f"{percent} % of the requests go to version {challenger}, {100 - percent} % to version {champion}{before}"
    none = f"the canary has ended{before}" if found["changed"] else "no canary was running"
    console.result(found, split if percent else none)


@models.command("rollback")
def models_rollback(
    alias: Annotated[str, typer.Option(help="champion or challenger.")] = "champion",
    why: Annotated[str, typer.Option(help="Written to the history.")] = "",
) -> None:
    """Point an alias back at the version it had before; again goes one further."""
    from animediffusion.pipelines import release

    console = _console()
    found = release.rollback(_settings(), alias, why)
    console.result(found, f"version {found['version']} is {alias} again (was {found['from']}){_canary_ended(found)}")


def _canary_ended(found: dict[str, Any]) -> str:
    return f"; the canary of {found['canary_ended']} % has ended" if "canary_ended" in found else ""


@models.command("history")
def models_history() -> None:
    """Every promotion, rollback and canary, the oldest first."""
    from animediffusion.pipelines import release

    console = _console()
    found = release.history(_settings())
    console.result(found, console.table(found, "nothing was ever promoted"))


@models.command("import")
def models_import(
    file: Annotated[Path, typer.Argument(metavar="FILE.pth", help="A model checkpoint of the authors' code.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The bundle to make.")],
) -> None:
    """Turn weights of the authors' AnimeDiffusion into a bundle."""
    from animediffusion.pipelines.importer import import_weights

    console = _console()
    found = import_weights(file, folder)
    console.result(found, f"imported {found['num_parameters'] / 1e6:.1f} M parameters: {folder}")


@models.command("export")
def models_export(
    version: Annotated[str, typer.Argument(help="A number, an alias, models:/... or a bundle folder.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
) -> None:
    """Write a folder that colors drawings with torch, safetensors, numpy and pillow alone."""
    from animediffusion.pipelines.export import export

    console = _console()
    found = export(_settings(), version, folder)
    size = f"{found['num_files']} files, {found['bytes'] / 1e6:.1f} MB"
    console.result(found, f"{folder}: {size}\n{found['command']}")


# --- colorize, serve ------------------------------------------------------------------------------------------------


@app.command()
def colorize(
    sketches: Annotated[list[Path], typer.Argument(metavar="SKETCH...", help="Image files, or folders of them.")],
    reference: Annotated[Path, typer.Option(help="Image with the colors.")],
    out: Annotated[Path, typer.Option(help="Folder for STEM.png and STEM.color.png.")],
    model: Annotated[str | None, typer.Option(help="The champion by default.")] = None,
    url: Annotated[str | None, typer.Option(help="A server to ask in place of a model here.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="The model's own default if left out.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(min=0.0, max=20.0)] = None,
    size: Annotated[str, typer.Option(help="native: the sketch's own size; model: the model's.")] = "native",
) -> int:
    """Color drawings: STEM.png and the color layer without lines, STEM.color.png."""
    from animediffusion.platform.errors import ConfigError
    from animediffusion.serve.painter import Options, colorize_files, list_left_out, list_sketches

    if size not in ("native", "model"):
        raise ConfigError("--size", repr(size), "native or model")
    if model is not None and url is not None:
        raise ConfigError("--model and --url", "both given", "a server has its own model: give one of them")
    console, settings = _console(), _settings()
    options = Options(seed=seed, steps=steps, guidance_scale=guidance_scale, size=size)  # type: ignore[arg-type]
    files, left_out, done, failed = list_sketches(sketches), list_left_out(sketches), [], 0
    if left_out:
        names = ", ".join(file.name for file in left_out[:5]) + (", ..." if len(left_out) > 5 else "")
        count = f"{len(left_out)} {'file' if len(left_out) == 1 else 'files'}"
        console.note(f"left out {count}: {names}; save them as PNG, JPEG or WebP")
    with console.progress("colored", "drawings") as progress:
        for one in colorize_files(_painter(settings, model, url), files, reference, out, options):
            done.append(one)
            failed += one.error is not None
            if one.error:
                console.note(f"error: {one.error}")
            elif not console.terminal:
                console.note(f"{one.sketch} -> {one.output}{' (done before)' if one.skipped else ''}")
            if console.terminal:
                progress(len(done), len(files), failed)
    skipped = sum(one.skipped for one in done)
    text = f"colored {len(done) - failed - skipped} of {len(done)}"
    text += f"; {skipped} done before with the same settings" if skipped else ""
    console.result([one.summary() for one in done], text + (f"; {failed} failed" if failed else ""))
    return 1 if failed else 0


def _painter(settings: Settings, model: str | None, url: str | None) -> Any:
    if url is not None:
        from animediffusion.serve.client import RemotePainter

        return RemotePainter(url)
    from animediffusion.serve.local import LocalPainter

    _use_attention(settings)
    return LocalPainter(settings, model)


@app.command()
def serve(
    model: Annotated[str | None, typer.Option(help="The champion by default, followed when it changes.")] = None,
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
) -> int:
    """Serve the HTTP API and the page until Ctrl-C."""
    from animediffusion.serve.server import serve_app

    settings = _settings()
    _use_attention(settings)
    return serve_app(settings, model, host, port, announce=_console().say)


# --- keys -----------------------------------------------------------------------------------------------------------


@keys.command("create")
def keys_create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose it is; servers log this name.")],
) -> None:
    """Make an API key and show it, once: only its hash is kept."""
    from animediffusion.platform.keys import Keys

    console = _console()
    key = Keys(_settings().keys_uri).create(name)
    console.note("clients set ANIMEDIFFUSION_API_KEY to this key, or send it as Authorization: Bearer KEY")
    console.result({"name": name, "key": key}, key)


@keys.command("list")
def keys_list() -> None:
    """All keys ever made, the oldest first; never the keys themselves."""
    from animediffusion.platform.keys import Keys

    console = _console()
    found = [
        {"name": key.name, "created": key.created, "revoked": key.revoked}
        for key in Keys(_settings().keys_uri).entries()
    ]
    console.result(found, console.table(found, "no keys yet; `animediffusion keys create NAME` makes one"))


@keys.command("revoke")
def keys_revoke(name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Make a key useless; running servers notice within 5 s."""
    from animediffusion.platform.keys import Keys

    console = _console()
    Keys(_settings().keys_uri).revoke(name)
    console.result({"name": name, "revoked": True}, f"key {name} is revoked")


# --- jobs -----------------------------------------------------------------------------------------------------------


@jobs.command("submit", context_settings={"ignore_unknown_options": True})
def jobs_submit(
    verb: Annotated[list[str], typer.Argument(metavar="-- VERB ...", help="What to run there.")],
    with_code: Annotated[bool, typer.Option("--with-code", help="Send this package along.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Show its log, end with its exit code.")] = False,
) -> int:
    """Run a verb on the cluster."""
    from animediffusion.platform import jobs as ray_jobs
    from animediffusion.platform.errors import ConfigError

    if verb[0].startswith("-"):
        raise ConfigError(
            verb[0], "unknown option of jobs submit", "write jobs submit [--with-code] [--wait] -- VERB ..."
        )
    console = _console()
    job = ray_jobs.submit(verb, with_code=with_code)
    console.note(f"job {job}")
    code = _follow(ray_jobs.follow, job) if wait else 0
    console.result({"id": job, "exit_code": code if wait else None}, job)
    return code


@jobs.command("list")
def jobs_list() -> None:
    """Jobs that the cluster remembers, the newest first."""
    from animediffusion.platform import jobs as ray_jobs

    console = _console()
    found = ray_jobs.jobs()
    console.result(found, console.table(found, "no jobs"))


@jobs.command("status")
def jobs_status(job: Annotated[str, typer.Argument(metavar="ID")]) -> None:
    """One job."""
    from animediffusion.platform import jobs as ray_jobs

    console = _console()
    found = ray_jobs.status(job)
    console.result(found, console.facts(found))


@jobs.command("logs")
def jobs_logs(
    job: Annotated[str, typer.Argument(metavar="ID")],
    follow: Annotated[bool, typer.Option("--follow", help="Until it ends; its exit code is ours.")] = False,
) -> int:
    """What a job printed."""
    from animediffusion.platform import jobs as ray_jobs

    console = _console()
    if not follow:
        text = ray_jobs.logs(job)
        console.result({"id": job, "log": text}, text.removesuffix("\n"))
        return 0
    code = _follow(ray_jobs.follow, job)
    if console.as_json:
        console.result({"id": job, "exit_code": code}, "")
    return code


@jobs.command("stop")
def jobs_stop(job: Annotated[str, typer.Argument(metavar="ID")]) -> None:
    """End a job; it saves a checkpoint first."""
    from animediffusion.platform import jobs as ray_jobs

    console = _console()
    stopped = ray_jobs.stop(job)
    console.result({"id": job, "stopped": stopped}, f"{job} {'is stopping' if stopped else 'had ended already'}")


def _follow(follow: Callable[[str, Callable[[str], Any]], int], job: str) -> int:
    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    return follow(job, write)


# --- doctor ---------------------------------------------------------------------------------------------------------


@app.command()
def doctor(
    storage: Annotated[
        str | None, typer.Option(help="Folder or s3:// prefix to write to and read from, on a cluster from every node.")
    ] = None,
) -> int:
    """Say what is installed, reachable, and which attention will run; on a cluster (RAY_ADDRESS), on every node."""
    from animediffusion.platform import doctor as checkup

    console = _console()
    settings = _settings()
    _use_attention(settings)
    found = checkup.checks(settings, [_torch_probe], _device, storage)
    lines = [f"{'ok' if check.ok else 'NO':3} {check.name:10} {check.detail}" for check in found]
    report = checkup.report(found)
    console.result(report, "\n".join(lines))
    return 0 if report["ok"] else 1


def _torch_probe() -> Any:
    from animediffusion.platform.doctor import Check

    return Check("torch", _unused_gpu() is None, _device())


def _device() -> str:
    """Of this process, and the attention that will run on it; `doctor` asks this of every node."""
    import torch

    from animediffusion.models.attention import explain_attention

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = f"{count} x {torch.cuda.get_device_name()}" if count else f"cpu, {torch.get_num_threads()} threads"
    unused = _unused_gpu()
    return f"{device}; attention {explain_attention()}" + (f"; {unused}" if unused else "")


def _unused_gpu() -> str | None:
    """Why torch does not use a GPU that is there."""
    import torch

    from animediffusion.platform.gpu import why_unused

    return None if torch.cuda.is_available() else why_unused(str(torch.__version__), torch.version.cuda)


def _version(show: bool) -> None:
    if show:
        from animediffusion import __version__

        print(f"animediffusion {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
