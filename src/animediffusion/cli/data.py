"""The commands `data`: make and inspect datasets."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from animediffusion.cli import common
from animediffusion.console import facts

data = common.group(help="Make and inspect datasets.")


@data.command("synthesize")
def data_synthesize(
    dst: Annotated[str, typer.Argument(metavar="DST", help="Folder to create.")],
    count: Annotated[
        int, typer.Option(min=1, metavar="N", help="Total number of rows; a tenth of them becomes the val split.")
    ],
    size: Annotated[int, typer.Option(metavar="PX", help="Side of the images in pixels.")] = 64,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed; the same seed gives the same pictures.")] = 0,
    variety: Annotated[
        str,
        typer.Option(
            metavar="PRESET|NAME=SHARE,...",
            help="How varied the drawings are: faces, diverse, or shares 0..1 of factors, as lines=0.5,shapes=0.3.",
        ),
    ] = "faces",
) -> None:
    """Draw anime faces, and with --variety much else, as training images.

    Each row has a target, a sketch, a reference, and a second view with the same colors.
    """
    from animediffusion.pipelines.synthetic.dataset import synthesize
    from animediffusion.pipelines.synthetic.variety import Variety

    console = common.console()
    with console.progress("drawing", "rows") as progress:
        result = synthesize(dst, count, size, seed, progress, variety=Variety.parse(variety))
    console.result(result, f"drew {result['rows']} rows in {result['seconds']:.1f} s: {dst}")


@data.command("ingest")
def data_ingest(
    src: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="Images, archives, tables or drawings: local, s3://, gs:// or hf://; or corrections://."
        ),
    ],
    dst: Annotated[str, typer.Argument(metavar="DST", help="Folder or s3:// URI of the new dataset.")],
    size: Annotated[int, typer.Option(metavar="PX", help="Side of the images in pixels.")] = 64,
    pairs: Annotated[
        str | None, typer.Option(metavar="CSV", help="CSV file with the columns target, sketch, reference, ...")
    ] = None,
    val_fraction: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of the rows in val if no folder or CSV names a split.")
    ] = 0.05,
    max_share: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", help="With corrections://, largest share of the rows from one API key; 0.5 if omitted."
        ),
    ] = None,
) -> None:
    """Turn images into a dataset of Parquet shards; rerun to resume."""
    from animediffusion.pipelines.data.ingest import prepare

    console, settings = common.console(), common.settings()
    job = prepare(src, dst, size, pairs, val_fraction, max_share)
    for key, number in job.left_out.items():
        plural = "s" * (number != 1)
        console.note(f"left out {number} correction{plural} of {key or 'clients without a key'}, beyond --max-share")
    if job.done is None:
        console.note("continuing an earlier ingest" if job.continues else "starting Ray")
        common.connect(settings)
    with console.progress("ingesting", "files") as progress:
        manifest = job.run(progress, console.note)
    splits = {name: split.rows for name, split in manifest.splits.items()}
    left_out = {"left_out": dict(job.left_out)} if job.left_out else {}
    line = ", ".join(f"{name} {rows}" for name, rows in splits.items())
    state = "up to date" if job.done is not None else "ingested"
    console.result(
        {
            "data": dst,
            "splits": splits,
            **left_out,
            **manifest.model_dump(include={"num_files", "num_rejects", "content_hash"}),
        },
        f"{state}: {line} rows, {manifest.num_rejects} of {manifest.num_files} files rejected: {dst}",
    )


@data.command("show")
def data_show(
    dst: Annotated[str, typer.Argument(metavar="DST", help="A dataset or a synthesized folder.")],
    out: Annotated[str | None, typer.Option(metavar="FILE.png", help="PNG file for the contact sheet.")] = None,
) -> None:
    """Count rows and rejects, and draw a contact sheet."""
    from animediffusion.pipelines.data.preview import show

    console = common.console()
    result = asdict(show(dst, out))
    console.result(result, facts(result))


@data.command("export")
def data_export(
    source: Annotated[str, typer.Argument(metavar="DATA", help="A dataset.")],
    dst: Annotated[str, typer.Argument(metavar="DST", help="Folder or s3:// URI of the new files.")],
    form: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="webdataset, or parquet for Hugging Face datasets.")
    ] = "webdataset",
) -> None:
    """Write a dataset in a format that other programs read; rerun to resume."""
    from animediffusion.pipelines.data.formats.export import FORMATS, export
    from animediffusion.platform.errors import ConfigError

    console = common.console()
    if form not in FORMATS:
        raise ConfigError("--format", repr(form), " or ".join(FORMATS))
    with console.progress("exporting", "rows") as progress:
        result = export(source, dst, FORMATS[form], progress)
    console.result(asdict(result), f"exported {result.rows} rows to {result.files} files: {dst}")
