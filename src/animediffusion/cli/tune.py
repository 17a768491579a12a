"""The commands `tune`: search for better settings with Ray Tune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from animediffusion import reports
from animediffusion.cli import common

tune = common.group(help="Search for better settings with Ray Tune.")


@tune.command("sampler")
def tune_sampler(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A bundle folder or URI, models:/animediffusion@champion, ...")
    ],
    data: Annotated[str, typer.Argument(metavar="DATA", help="Folder or s3:// URI of a dataset.")],
    trials: Annotated[
        int, typer.Option(min=1, metavar="N", help="Total trials, including those of earlier searches.")
    ] = 50,
    minutes: Annotated[float | None, typer.Option(min=0.0, metavar="N", help="Stop after N minutes.")] = None,
    prefer: Annotated[
        str, typer.Option(metavar="CHOICE", help="Choice from the Pareto front: knee, fast or best.")
    ] = "knee",
    register: Annotated[
        bool, typer.Option("--register/--no-register", help="Register the best settings as a new version.")
    ] = True,
) -> None:
    """Search sampler settings of a model and register the best.

    The search covers sampler, steps, guidance, shift and the averaging length of the weights.
    """
    from animediffusion.pipelines.evaluation.evaluate import evaluate
    from animediffusion.pipelines.tuning import sampler_search

    console, settings = common.console(), common.settings()
    common.use_attention(settings)
    result = sampler_search.tune_sampler(
        settings,
        model,
        data,
        trials=trials,
        minutes=minutes,
        prefer=prefer,  # type: ignore[arg-type]
        register=register,
        progress=console.note,
        evaluate=lambda folder: evaluate(settings, str(folder), data),
    )
    console.result(result.to_json(), reports.sampler_search(result))


@tune.command("schedule")
def tune_schedule(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Folder or s3:// URI of a dataset.")],
    recipe: Annotated[
        str, typer.Option(metavar="RECIPE", help="Phase 1 recipe to start from: a name or a YAML file.")
    ] = "phase1",
    trials: Annotated[
        int, typer.Option(min=1, metavar="N", help="Total trials, including those of earlier searches.")
    ] = 24,
    minutes: Annotated[float | None, typer.Option(min=0.0, metavar="N", help="Stop after N minutes.")] = None,
    steps: Annotated[int, typer.Option(metavar="N", help="Number of training steps of the longest trials.")] = 270,
    out: Annotated[Path | None, typer.Option(metavar="RECIPE.yaml", help="File for the best recipe.")] = None,
) -> None:
    """Search training settings by short training runs.

    The search covers path, times, prediction, loss weight and learning rates. The best settings are written as a
    recipe.
    """
    from animediffusion.pipelines.tuning import schedule_search

    console, settings = common.console(), common.settings()
    common.use_attention(settings)
    result = schedule_search.tune_schedule(
        settings,
        data,
        recipe=recipe,
        trials=trials,
        minutes=minutes,
        steps=steps,
        out=out,
        progress=console.note,
    )
    console.result(result.to_json(), reports.schedule_search(result))
