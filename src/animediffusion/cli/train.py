"""The commands `train` and `evaluate`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from animediffusion import reports
from animediffusion.cli import common
from animediffusion.console import Console
from animediffusion.platform.errors import ConfigError

if TYPE_CHECKING:
    from animediffusion.pipelines.training.plan import RunPlan
    from animediffusion.platform.config import Settings


def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="Name of a recipe (demo, phase1, phase2, ...) or a YAML file.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings to override: data=, max_steps=, init_from=, ..."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved settings and an estimate, and exit.")
    ] = False,
    estimate: Annotated[
        bool,
        typer.Option("--estimate/--no-estimate", help="With --dry-run, time a few steps to estimate time and memory."),
    ] = True,
) -> None:
    """Train a recipe on Ray; rerun the command to resume."""
    from animediffusion.pipelines.training.plan import plan
    from animediffusion.pipelines.training.recipe import load_recipe
    from animediffusion.platform.errors import ConfigError

    if not (dry_run or estimate):
        raise ConfigError("--no-estimate", "given without --dry-run", "omit it")
    console, settings = common.console(), common.settings()
    common.use_attention(settings)
    config = load_recipe(recipe, overrides or [])
    work = plan(settings, config)
    if dry_run:
        _dry_run(console, work, estimate)
        return
    from animediffusion.pipelines.training import driver  # not before: Ray takes seconds, and a typo needs none

    if work.finished:
        console.note(f"{work.run} is finished")
    elif work.start_step:
        console.note(f"resuming {work.run} at step {work.start_step}")
    else:
        console.note(f"run {work.run}")
    if not work.finished:
        common.connect(settings)
    with console.training() as report:
        result = driver.train(settings, config, report)
    console.result(result.to_json(), reports.training(result))


def _dry_run(console: Console, work: RunPlan, measure: bool) -> None:
    """Print the settings immediately, then the estimate of time and memory."""
    from animediffusion.pipelines.training.plan import describe

    described = describe(work)
    if not measure:
        console.result(described.to_json(), described.yaml)
        return
    from animediffusion.pipelines.estimate.estimate import estimate, lines  # not before: it imports Ray

    if not console.as_json:
        console.say(described.yaml)
    console.note("timing some steps, which takes about 15 s; --no-estimate skips this")
    found = estimate(work)
    console.result({**described.to_json(), "estimate": found.to_json()}, "\n".join(lines(found)))


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A bundle folder or URI, models:/animediffusion@champion, ...")
    ],
    data: Annotated[str, typer.Argument(metavar="DATA", help="Folder or s3:// URI of a dataset.")],
    split: Annotated[str, typer.Option(metavar="NAME", help="Split to measure on.")] = "val",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for metrics.json and grid.png.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Use only the first N rows.")] = None,
    on_cluster: Annotated[
        bool,
        typer.Option("--on-cluster", help="Measure on the whole cluster, over Ray Data; for splits with many rows."),
    ] = False,
    native: Annotated[
        bool,
        typer.Option(
            "--native",
            help="Measure the colors of the pictures that colorize makes, at the size of the data; pixels on or near "
            "lines are left out.",
        ),
    ] = False,
) -> None:
    """Measure the quality of a model and of trivial baselines.

    With --native, the data may have another size than the model, and the result is not stored with the model.
    """
    from animediffusion.pipelines.release.record import evaluate_and_record

    console, settings = common.console(), common.settings()
    common.use_attention(settings)
    if native and on_cluster:
        raise ConfigError("--native", "with --on-cluster", "one of the two")
    if native:
        _evaluate_native(console, settings, model, data, split, limit, out)
        return
    if on_cluster:
        common.connect(settings)
    with console.progress("coloring", "images") as progress:
        result = evaluate_and_record(settings, model, data, split, limit, out, progress, on_cluster=on_cluster)
    console.result(result.to_json(), reports.evaluation(result))


def _evaluate_native(
    console: Console, settings: Settings, model: str, data: str, split: str, limit: int | None, out: Path | None
) -> None:
    """Measure the pictures that `colorize` makes, with the reference's background, which the truth has."""
    from animediffusion.pipelines.evaluation.native import evaluate_native
    from animediffusion.serve.client.local import LocalColorizer
    from animediffusion.serve.rendering.render import RenderOptions

    colorizer = LocalColorizer(settings, model)
    rendering = RenderOptions(style="flat", background="reference")
    with console.progress("coloring", "images") as progress:
        result = evaluate_native(
            model,
            colorizer.bundle.sha256,
            functools.partial(colorizer.paint, rendering),
            "flat",
            data,
            split,
            limit,
            out,
            progress,
            threads=colorizer.max_concurrent,
        )
    console.result(result.to_json(), reports.native_evaluation(result))
