"""The command `improve`."""

from __future__ import annotations

from typing import Annotated

import typer

from animediffusion.cli import common


def improve(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the training: rehearse=, max_steps=, storage=, ..."),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Keep running, and wait where needed, until N rounds are over. If omitted, do what can be done now.",
        ),
    ] = None,
    recipe: Annotated[str, typer.Option(metavar="RECIPE", help="Recipe of the training.")] = "improve",
    percent: Annotated[
        int, typer.Option(min=1, max=99, metavar="PERCENT", help="Percentage of the requests for the new version.")
    ] = 10,
    min_new: Annotated[int, typer.Option(min=1, metavar="N", help="New corrections that a round needs.")] = 20,
    min_answered: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Answered requests that champion and challenger each need before the canary is decided.",
        ),
    ] = 100,
    datasets: Annotated[
        str | None,
        typer.Option(metavar="URI", help="Folder or s3:// URI for the datasets; data in the workspace by default."),
    ] = None,
    pause: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="With --rounds, time between two checks.")
    ] = 60.0,
) -> None:
    """Fine-tune the champion on corrections, and promote the new version if people correct its pictures less often.

    One call first decides the running canary. If none is running any more and there are enough new corrections, it
    fine-tunes the champion on all corrections, checks the result and begins a canary with it. Rerun to continue; with
    nothing to do, it says so.
    """
    from animediffusion.pipelines.improve import ImproveOptions
    from animediffusion.pipelines.improve import improve as run

    console, settings = common.console(), common.settings()
    common.use_attention(settings)
    options = ImproveOptions(
        recipe=recipe,
        overrides=tuple(overrides or ()),
        percent=percent,
        min_new=min_new,
        min_answered=min_answered,
        datasets=datasets,
    )
    done = run(settings, options, console.note, console.training, rounds=rounds, pause_s=pause)
    lines = [step.text for step in done]
    console.result({"steps": [step.to_json() for step in done]}, "\n".join(lines))
