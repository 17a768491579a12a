"""The commands `models`: register, compare, promote, roll back and export model versions."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from animediffusion import reports
from animediffusion.cli import common
from animediffusion.console import table

if TYPE_CHECKING:
    from animediffusion.pipelines.release.release import AliasChange

models = common.group(help="Register, compare, promote, roll back and export models.")


@models.command("list")
def models_list() -> None:
    """List all versions, newest first."""
    from animediffusion.pipelines.release import release
    from animediffusion.platform.registry.model_version import headline

    console = common.console()
    found = release.versions(common.settings())
    rows = [{**row, "sha256": row["sha256"][:12], "metrics": headline(row["metrics"])} for row in found]
    console.result(found, table(rows, "no versions yet; run `animediffusion models register DIR`"))


@models.command("show")
def models_show(
    version: Annotated[str, typer.Argument(metavar="V", help="A version number, an alias or models:/...")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="PNG file for drawings colored by the version.")
    ] = None,
) -> None:
    """Show the details of a version.

    The details include lineage, metrics, promotion history and configuration.
    """
    from animediffusion.pipelines.release import release

    console = common.console()
    found = release.show(common.settings(), version, out)
    console.result(found, reports.version(found))


@models.command("compare")
def models_compare(
    first: Annotated[str, typer.Argument(metavar="V1", help="A version number, an alias or models:/...")],
    second: Annotated[str, typer.Argument(metavar="V2", help="The version to compare with.")],
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="Dataset whose rows are colored; drawn faces by default.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="File of the picture; compare-V1-V2.png by default.")
    ] = None,
) -> None:
    """Compare the metrics of two versions.

    Both versions also color the same drawings, which are written as one picture.
    """
    from animediffusion.pipelines.release.compare import compare

    console, settings = common.console(), common.settings()
    common.use_attention(settings)
    found = compare(settings, first, second, data=data, out=out)
    console.result(found.to_json(), reports.comparison(found))


@models.command("register")
def models_register(folder: Annotated[str, typer.Argument(metavar="DIR", help="A bundle folder or URI.")]) -> None:
    """Register a bundle as the next version."""
    from animediffusion.pipelines.release import release

    console = common.console()
    found = release.register(common.settings(), folder)
    console.result(found.summary(), f"version {found.version}")


@models.command("promote")
def models_promote(
    version: Annotated[str, typer.Argument(metavar="V", help="A version number or models:/...")],
    alias: Annotated[str, typer.Option(metavar="ALIAS", help="Alias to move: champion or challenger.")] = "champion",
    why: Annotated[str, typer.Option(metavar="TEXT", help="Reason, recorded in the audit log.")] = "",
    force: Annotated[
        bool, typer.Option("--force", help="Promote even if metrics are worse (recorded in the audit log).")
    ] = False,
) -> None:
    """Check a version and point an alias at it."""
    from animediffusion.pipelines.release import release

    console = common.console()
    found = release.promote(common.settings(), version, alias, why, force=force)
    now = "is now" if found.changed else "was already"
    console.result(found.to_json(), f"version {found.version} {now} {alias}{_canary_ended(found)}")


@models.command("canary", context_settings={"ignore_unknown_options": True})
def models_canary(
    percent: Annotated[
        int | None,
        typer.Argument(
            metavar="[PERCENT]", help="Percentage, 0 to 100; 0 ends the canary. If omitted, show the running canary."
        ),
    ] = None,
    why: Annotated[str, typer.Option(metavar="TEXT", help="Reason, recorded in the audit log.")] = "",
) -> None:
    """Send a percentage of the requests to the challenger.

    A promotion or a rollback ends the canary. Without PERCENT, show how often people corrected the pictures of both
    versions, and whether improve would promote the challenger, end the canary or wait.
    """
    from animediffusion.pipelines.release.canary import canary
    from animediffusion.pipelines.release.correction_rate import judge
    from animediffusion.platform.errors import ConfigError

    console = common.console()
    if percent is None:
        if why:
            raise ConfigError("--why", "is given without PERCENT", "omit it")
        verdict = judge(common.settings())
        console.result(verdict.to_json(), reports.canary(verdict))
        return
    found = canary(common.settings(), percent, why)
    before = f" (was {found.previous} %)" if found.changed else " already"
    champion, challenger = found.champion, found.challenger
    split = f"{percent} % of the requests go to version {challenger}, {100 - percent} % to version {champion}{before}"
    none = f"the canary has ended{before}" if found.changed else "no canary was running"
    console.result(found.to_json(), split if percent else none)


@models.command("rollback")
def models_rollback(
    alias: Annotated[str, typer.Option(metavar="ALIAS", help="Alias to move: champion or challenger.")] = "champion",
    why: Annotated[str, typer.Option(metavar="TEXT", help="Reason, recorded in the audit log.")] = "",
) -> None:
    """Restore the alias's previous version; repeat to go further back."""
    from animediffusion.pipelines.release import release

    console = common.console()
    found = release.rollback(common.settings(), alias, why)
    text = f"version {found.version} is {alias} again (was {found.previous}){_canary_ended(found)}"
    console.result(found.to_json(), text)


def _canary_ended(found: AliasChange) -> str:
    return "" if found.canary_ended is None else f"; the canary of {found.canary_ended} % has ended"


@models.command("history")
def models_history() -> None:
    """List all promotions, rollbacks and canary changes, oldest first."""
    from animediffusion.pipelines.release import release

    console = common.console()
    found = release.history(common.settings())
    console.result(found, table(found, "no version was promoted yet"))


@models.command("import")
def models_import(
    file: Annotated[Path, typer.Argument(metavar="FILE.pth", help="A model checkpoint written by the authors' code.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the new bundle.")],
) -> None:
    """Convert weights of the authors' AnimeDiffusion to a bundle."""
    from animediffusion.pipelines.release.import_weights import import_weights

    console = common.console()
    found = import_weights(file, folder)
    console.result(asdict(found), f"imported {found.num_parameters / 1e6:.1f} M parameters: {folder}")


@models.command("export")
def models_export(
    version: Annotated[
        str, typer.Argument(metavar="V", help="A version number, an alias, models:/... or a bundle folder.")
    ],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to create.")],
) -> None:
    """Export a model as a folder that works without this package.

    The folder colors drawings and needs only torch, safetensors, numpy and pillow.
    """
    from animediffusion.pipelines.release.export import export

    console = common.console()
    found = export(common.settings(), version, folder)
    size = f"{found.num_files} files, {found.bytes / 1e6:.1f} MB"
    console.result(asdict(found), f"{folder}: {size}\n{found.command}")
