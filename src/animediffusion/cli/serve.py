"""The commands `colorize` and `serve`, and the commands `keys`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from animediffusion.cli import common
from animediffusion.console import table
from animediffusion.models.sampler_options import (
    MAX_GUIDANCE_SCALE,
    MAX_SEED,
    MAX_STEPS,
    SamplerOptions,
)
from animediffusion.platform.errors import ConfigError

if TYPE_CHECKING:
    from animediffusion.platform.config import Settings
    from animediffusion.serve.bulk.drawings import References
    from animediffusion.serve.client.colorize_files import Colorizer, FileFormat
    from animediffusion.serve.rendering.coloring import Background, Style
    from animediffusion.serve.rendering.render import RenderOptions, Size

_SAY_S = 10.0
"""Seconds between two lines on the pace of a coloring of many drawings."""
_STOPS_S = 5.0
"""Seconds after a signal in which a coloring of many drawings may finish the drawings that it has begun."""

keys = common.group(help="Create, list and revoke API keys.")


def colorize(
    sketches: Annotated[
        list[str], typer.Argument(metavar="SKETCH...", help="Image files or folders of image files; local or s3://.")
    ],
    out: Annotated[
        str, typer.Option(metavar="DIR", help="Output folder for STEM.png and STEM.color.png; local or s3://.")
    ],
    reference: Annotated[
        list[str] | None,
        typer.Option(metavar="IMG", help="Reference image with the colors to use; repeat it for up to 4 images."),
    ] = None,
    references: Annotated[
        str | None,
        typer.Option(
            metavar="CSV|DIR",
            help="A reference per drawing: CSV sketch,reference[,reference2...], or a folder with equal names.",
        ),
    ] = None,
    on_cluster: Annotated[
        bool, typer.Option("--on-cluster", help="Color over Ray Data, on the whole cluster; a job always does.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Model to use; by default the champion, or the starter model without one."),
    ] = None,
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="Use a running server instead of a local model.")
    ] = None,
    seed: Annotated[
        int,
        typer.Option(min=0, max=MAX_SEED, metavar="N", help="Seed of the noise; the same seed gives the same picture."),
    ] = 0,
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_STEPS, metavar="N", help="Sampling steps; the model's default if omitted."),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=MAX_GUIDANCE_SCALE,
            metavar="X",
            help="Strength of the guidance by the reference; 1 disables it; the model's default if omitted.",
        ),
    ] = None,
    size: Annotated[
        str, typer.Option(metavar="SIZE", help="Size of the output: native (that of the sketch) or model.")
    ] = "native",
    style: Annotated[
        str | None,
        typer.Option(
            metavar="STYLE",
            help="Colors: flat (one in each region, the default), shaded (soft shading), or painted (the model's).",
        ),
    ] = None,
    background: Annotated[
        str | None,
        typer.Option(
            metavar="WHERE",
            help="What is outside of the figure: paper (default of flat and shaded) keeps its color; white removes "
            "tint and shadows of scans and photographs, under the colors too, with any style; reference colors it.",
        ),
    ] = None,
    palette: Annotated[
        str,
        typer.Option(
            metavar="PALETTE",
            help="Colors of the regions with flat or shaded: reference, none, #RRGGBB,..., or a .gpl or .ase file.",
        ),
    ] = "reference",
    hints: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Exact colors of regions: points as .json, or strokes as .png."),
    ] = None,
    file_format: Annotated[
        str,
        typer.Option("--format", metavar="FORMAT", help="Files to write: png, or layers in one file: ora or psd."),
    ] = "png",
) -> int:
    """Color drawings with the colors of one or more reference images.

    Writes STEM.png, and the color layer without lines as STEM.color.png; with --format, STEM.ora or STEM.psd.
    """
    from animediffusion.platform.storage.addresses import is_remote
    from animediffusion.serve.bulk.drawings import read_references
    from animediffusion.serve.client.colorize_files import (
        OUTPUTS,
        colorize_files,
        list_inner_folders,
        list_own_results,
        list_sketches,
        list_unsupported,
    )
    from animediffusion.serve.rendering.render import RenderOptions, hints_argument, palette_argument

    colors = reference or []
    chosen = read_references(colors, references)
    kind = cast("FileFormat", file_format)
    if kind not in OUTPUTS:
        raise ConfigError("--format", repr(file_format), "png, ora or psd")
    rendering = RenderOptions(
        size=cast("Size", size),
        style=cast("Style | None", style),
        background=cast("Background | None", background),
        palette=palette_argument(palette),
        hints=None if hints is None else hints_argument(str(hints)),
    )
    rendering.check(OUTPUTS[kind], prefix="--")
    if model is not None and url is not None:
        raise ConfigError("--model and --url", "both given", "a server has its own model: give one of them")
    console, settings = common.console(), common.settings()
    options = SamplerOptions(seed=seed, steps=steps, guidance_scale=guidance_scale)
    on_cluster = on_cluster or (url is None and common.in_job())
    if on_cluster or references is not None or any(is_remote(uri) for uri in [*sketches, *colors, out]):
        if url is not None:
            raise ConfigError(
                "--url", "a server cannot be used with --on-cluster, --references or s3://", "leave it out"
            )
        return _colorize_stores(sketches, chosen, out, model, options, rendering, kind, on_cluster)
    paths, pictures = [Path(sketch) for sketch in sketches], [Path(color) for color in colors]
    files, unsupported, done, failed = list_sketches(paths), list_unsupported(paths), [], 0
    if unsupported:
        console.note(f"skipped {_named(unsupported)}; save them as PNG, JPEG or WebP")
    if colored := list_own_results(paths, files):
        console.note(f"skipped {_named(colored)}, made by colorize; give them by name to color them again")
    if inner := list_inner_folders(paths):
        console.note(f"skipped {_named(inner, 'folder')}; give them by name to color their drawings")
    with console.progress("colored", "drawings") as progress, _colorizer(settings, model, url) as colorizer:
        for one in colorize_files(colorizer, files, pictures, Path(out), options, rendering, kind):
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


def _colorize_stores(
    sketches: list[str],
    references: References,
    out: str,
    model: str | None,
    options: SamplerOptions,
    rendering: RenderOptions,
    kind: FileFormat,
    on_cluster: bool,
) -> int:
    """Color the drawings of any store, here or on the cluster; see colorize()."""
    import queue

    from animediffusion.platform.cluster import cluster
    from animediffusion.platform.errors import Interrupted
    from animediffusion.serve.bulk.bulk import Pace, color_here, color_on_cluster
    from animediffusion.serve.bulk.drawings import list_drawings
    from animediffusion.serve.bulk.worker import Outcome

    console, settings = common.console(), common.settings()
    drawings, faults = list_drawings(sketches, out, kind, references)
    total = len(drawings) + len(faults)
    common.use_attention(settings)
    if on_cluster:
        common.connect(settings)
    color = color_on_cluster if on_cluster else color_here
    pace, said = Pace(len(drawings)), time.monotonic()
    summaries: list[dict[str, Any]] = []
    failed = skipped = 0
    outcomes = queue.SimpleQueue[Outcome]()
    stopped: list[float] = []

    def count(one: Outcome) -> None:
        nonlocal failed, skipped
        skipped += one.skipped
        if console.as_json:  # else memory would grow with the number of drawings
            summaries.append(one.summary())
        if one.error:
            failed += 1
            console.note(f"error: {one.error}")

    def work() -> None:
        for one in color(settings, model, drawings, options, rendering, kind, console.note):
            outcomes.put(one)
            if stopped:
                return

    def poll(_: int | None, moved: Callable[[], None]) -> bool:
        nonlocal said
        while not outcomes.empty():
            one = outcomes.get()
            count(one)
            pace.add(one.actor)
            moved()
        if console.terminal:
            progress(pace.done + len(faults), total, failed)
        elif time.monotonic() - said > _SAY_S:
            said = time.monotonic()
            console.note(str(pace))
        return not stopped or time.monotonic() < stopped[0] + _STOPS_S

    with console.progress("colored", "drawings") as progress:
        for sketch, error in faults:
            count(Outcome(sketch, "", options.seed, "", error))
        signum, problem = cluster.run_watched(
            work, poll, on_signal=lambda: stopped.append(time.monotonic()), report=console.note
        )
    if signum is not None:
        raise Interrupted(signum, "colorize", pace.done, unit="drawing", total=len(drawings))
    if problem is not None:
        raise problem
    text = f"colored {total - failed - skipped} of {total}"
    text += f"; {skipped} done before with the same settings" if skipped else ""
    console.result(summaries, text + (f"; {failed} failed" if failed else ""))
    return 1 if failed else 0


def _named(files: list[Path], kind: str = "file") -> str:
    names = ", ".join(file.name for file in files[:5]) + (", ..." if len(files) > 5 else "")
    return f"{len(files)} {kind if len(files) == 1 else f'{kind}s'}: {names}"


@contextmanager
def _colorizer(settings: Settings, model: str | None, url: str | None) -> Iterator[Colorizer]:
    if url is not None:
        from animediffusion.serve.client.remote import RemoteColorizer

        with RemoteColorizer(url) as remote:
            yield remote
        return
    from animediffusion.platform.registry.downloads import STARTER
    from animediffusion.serve.client.local import STARTER_COLORS, LocalColorizer

    common.use_attention(settings)
    colorizer = LocalColorizer(settings, model)
    if model is None and colorizer.version == STARTER:
        common.console().note(STARTER_COLORS)
    yield colorizer


def serve(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Model to serve; by default the champion and its successors, or the starter model without one.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(metavar="HOST", help="Address to listen on; any but loopback requires an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, metavar="PORT", help="HTTP port.")] = 8000,
) -> int:
    """Serve the HTTP API and the page until Ctrl-C."""
    from animediffusion.serve.server import serve_app

    settings = common.settings()
    common.use_attention(settings)
    return serve_app(settings, model, host, port, announce=common.console().say)


@keys.command("create")
def keys_create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Owner of the key; appears in the access log.")],
) -> None:
    """Create an API key and show it once; only its hash is stored."""
    from animediffusion.platform.api_keys import Keys

    console = common.console()
    key = Keys(common.settings().keys_uri).create(name)
    console.note("clients set ANIMEDIFFUSION_API_KEY to this key, or send it as Authorization: Bearer KEY")
    console.result({"name": name, "key": key}, key)


@keys.command("list")
def keys_list() -> None:
    """List the names and dates of all keys, oldest first."""
    from animediffusion.platform.api_keys import Keys

    console = common.console()
    found = [
        {"name": key.name, "created": key.created, "revoked": key.revoked}
        for key in Keys(common.settings().keys_uri).entries()
    ]
    console.result(found, table(found, "no keys yet; run `animediffusion keys create NAME`"))


@keys.command("revoke")
def keys_revoke(name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the key.")]) -> None:
    """Revoke a key; running servers reject it within 5 s."""
    from animediffusion.platform.api_keys import Keys

    console = common.console()
    Keys(common.settings().keys_uri).revoke(name)
    console.result({"name": name, "revoked": True}, f"key {name} is revoked")
