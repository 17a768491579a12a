"""`models`: register, compare, promote, roll back and export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from animediffusion.cli import common

if TYPE_CHECKING:
    pass

models = typer.Typer(**common.HELP, help="Register, promote and roll back models.")


@models.command("list")
def models_list() -> None:
    """All versions, the newest first."""
    from animediffusion.pipelines.release import promote as release
    from animediffusion.platform.registry.model_version import headline

    console = common.console()
    found = release.versions(common.settings())
    rows = [{**row, "sha256": row["sha256"][:12], "metrics": headline(row["metrics"])} for row in found]
    console.result(found, console.table(rows, "no versions yet; `animediffusion models register DIR` makes one"))


@models.command("show")
def models_show(
    version: Annotated[str, typer.Argument(help="A number, an alias or models:/...")],
    out: Annotated[Path | None, typer.Option(help="Where to write the drawings it colored (PNG).")] = None,
) -> None:
    """One version: where it comes from, what it is, how good it is, who moved it."""
    from animediffusion.pipelines.release import promote as release

    console = common.console()
    found = release.show(common.settings(), version, out)
    console.result(found, console.version(found))


@models.command("compare")
def models_compare(
    first: Annotated[str, typer.Argument(metavar="V1", help="A number, an alias or models:/...")],
    second: Annotated[str, typer.Argument(metavar="V2", help="Another one.")],
    data: Annotated[str | None, typer.Option(help="A dataset to color rows of; drawn faces if left out.")] = None,
    out: Annotated[Path | None, typer.Option(help="The picture, compare-V1-V2.png if left out.")] = None,
) -> None:
    """Two versions side by side: their metrics, and the same drawings colored by both."""
    from animediffusion.pipelines.release.compare import compare

    console, settings = common.console(), common.settings()
    common.use_attention(settings)
    found = compare(settings, first, second, data=data, out=out)
    console.result(found, console.comparison(found))


@models.command("register")
def models_register(folder: Annotated[str, typer.Argument(metavar="DIR", help="A bundle folder or URI.")]) -> None:
    """Make a bundle the next version."""
    from animediffusion.pipelines.release import promote as release

    console = common.console()
    found = release.register(common.settings(), folder)
    console.result(found.summary(), f"version {found.version}")


@models.command("promote")
def models_promote(
    version: Annotated[str, typer.Argument(help="A number or models:/...")],
    alias: Annotated[str, typer.Option(help="champion or challenger.")] = "champion",
    why: Annotated[str, typer.Option(help="Written to the history.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Also a worse one; is written down.")] = False,
) -> None:
    """Point an alias at a version that passes the gate."""
    from animediffusion.pipelines.release import promote as release

    console = common.console()
    found = release.promote(common.settings(), version, alias, why, force=force)
    now = "is now" if found["changed"] else "was already"
    console.result(found, f"version {found['version']} {now} {alias}{_canary_ended(found)}")


@models.command("canary", context_settings={"ignore_unknown_options": True})
def models_canary(
    percent: Annotated[int, typer.Argument(metavar="PERCENT", help="0 to 100; 0 ends the canary.")],
    why: Annotated[str, typer.Option(help="Written to the history.")] = "",
) -> None:
    """Send a part of the requests to the challenger; promoting or rolling back ends it."""
    from animediffusion.pipelines.release.canary import canary

    console = common.console()
    found = canary(common.settings(), percent, why)
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
    from animediffusion.pipelines.release import promote as release

    console = common.console()
    found = release.rollback(common.settings(), alias, why)
    console.result(found, f"version {found['version']} is {alias} again (was {found['from']}){_canary_ended(found)}")


def _canary_ended(found: dict[str, Any]) -> str:
    return f"; the canary of {found['canary_ended']} % has ended" if "canary_ended" in found else ""


@models.command("history")
def models_history() -> None:
    """Every promotion, rollback and canary, the oldest first."""
    from animediffusion.pipelines.release import promote as release

    console = common.console()
    found = release.history(common.settings())
    console.result(found, console.table(found, "nothing was ever promoted"))


@models.command("import")
def models_import(
    file: Annotated[Path, typer.Argument(metavar="FILE.pth", help="A model checkpoint of the authors' code.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The bundle to make.")],
) -> None:
    """Turn weights of the authors' AnimeDiffusion into a bundle."""
    from animediffusion.pipelines.release.import_weights import import_weights

    console = common.console()
    found = import_weights(file, folder)
    console.result(found, f"imported {found['num_parameters'] / 1e6:.1f} M parameters: {folder}")


@models.command("export")
def models_export(
    version: Annotated[str, typer.Argument(help="A number, an alias, models:/... or a bundle folder.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
) -> None:
    """Write a folder that colors drawings with torch, safetensors, numpy and pillow alone."""
    from animediffusion.pipelines.release.export import export

    console = common.console()
    found = export(common.settings(), version, folder)
    size = f"{found['num_files']} files, {found['bytes'] / 1e6:.1f} MB"
    console.result(found, f"{folder}: {size}\n{found['command']}")
