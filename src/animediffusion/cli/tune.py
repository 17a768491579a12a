"""`tune`: search for better settings with Ray Tune."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from animediffusion.cli import common

if TYPE_CHECKING:
    pass

tune = typer.Typer(**common.HELP, help="Search for better settings with Ray Tune.")


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
    from animediffusion.pipelines.evaluation.evaluate import evaluate as measure
    from animediffusion.pipelines.tuning.sampler_search import tune_sampler as search

    console, settings = common.console(), common.settings()
    common.use_attention(settings)
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
    from animediffusion.pipelines.tuning.schedule_search import tune_schedule as search

    console, settings = common.console(), common.settings()
    common.use_attention(settings)
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
