"""The demo: run every stage once on drawn faces, for `animediffusion demo` and `make demo`.

    synthesize -> ingest -> phase 1 -> tune the sampler -> phase 2 -> evaluate -> register -> promote -> serve -> color

Phase 1 begins with the starter model, as a run on pictures of your own would. Each stage makes the same call as its own
command, so a demo that was stopped resumes when it is run again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from animediffusion import reports
from animediffusion.console import Console
from animediffusion.models.sampler_options import SamplerOptions
from animediffusion.pipelines.data.ingest import prepare
from animediffusion.pipelines.evaluation.evaluate import Evaluation, evaluate
from animediffusion.pipelines.release import release
from animediffusion.pipelines.release.record import evaluate_and_record
from animediffusion.pipelines.synthetic.dataset import DrawnRow, make_row, synthesize
from animediffusion.pipelines.training.driver import train
from animediffusion.pipelines.training.recipe import load_recipe
from animediffusion.pipelines.tuning.sampler_search import tune_sampler
from animediffusion.platform.api_keys import Keys
from animediffusion.platform.cluster import cluster
from animediffusion.platform.cluster.signals import StopSignals
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import ConfigError, RegistryError
from animediffusion.platform.images.codec import contact_sheet, decode_rgb, encode_png
from animediffusion.platform.registry.downloads import STARTER
from animediffusion.serve.client.remote import API_KEY, RemoteColorizer
from animediffusion.serve.deployments import ServeConfig
from animediffusion.serve.rendering.render import RenderOptions
from animediffusion.serve.server import check_address, running

SIZE = 128
"""Side of the training pictures in pixels: that of the starter model."""
KEPT = ("network.hints=true", "augment.hints=0.3", "augment.wrong_reference=0.3")
"""Settings with which training does not unlearn how to use hints."""
PHASE_1_SHARE = 0.75
"""Share of the training minutes for phase 1; phase 2 gets the rest."""
TUNE_TRIALS = 8
NUM_DRAWINGS = 3
DRAWING_SIZE = 512
"""Side in pixels, larger than the model's: the server scales the colors to the size of the drawing."""
RENDERING = RenderOptions(style="flat", background="reference")
UNSEEN_SEED = 2027
"""Seed of the drawings to color; neither the demo, whose rows have seed 0, nor the starter model is trained on it."""
PORTS_TO_TRY = 20


@dataclass(frozen=True)
class DemoResult:
    """What the demo made, as `demo --json` prints it."""

    seconds: float
    version: int
    """The champion."""
    psnr_same: float
    """PSNR in dB on the dataset's unseen rows, with a reference of the same drawing."""
    psnr_cross: float
    """PSNR in dB with another drawing in the same colors as the reference."""
    baseline_psnr_same: float
    """PSNR in dB of the best trivial baseline, with a reference of the same drawing."""
    picture: str
    """File that compares colored drawings with the truth."""
    url: str
    mlflow: str


def run_demo(settings: Settings, minutes: float, console: Console, *, rows: int, port: int, stay: bool) -> int:
    """Run all stages, print where the results are, and return the exit code."""
    if Keys(settings.keys_uri).active() and not os.environ.get(API_KEY):
        raise ConfigError(
            API_KEY,
            f"is not set, and {settings.keys_uri} has keys",
            "set it to one of them, because the demo sends requests to its server",
        )
    started = time.monotonic()
    folder = settings.workspace / "demo"
    console.note(f"workspace {settings.workspace}")
    data = _dataset(settings, rows, console)
    version, result = train_model(settings, data, minutes, console)
    config = ServeConfig(workspace=settings.workspace, model_name=settings.model_name)
    console.note("--- serve")
    with running(settings, config, port=_free(port)) as url:
        with _stage("color over HTTP", console):
            picture = _color(url, folder, console)
        made = DemoResult(
            seconds=round(time.monotonic() - started, 1),
            version=version,
            psnr_same=result.tracks["same"].psnr,
            psnr_cross=result.tracks["cross"].psnr,
            baseline_psnr_same=max(tracks["same"].psnr for tracks in result.baselines.values()),
            picture=str(picture),
            url=url,
            mlflow=settings.tracking_uri,
        )
        console.result(asdict(made), _summary(made, reports.evaluation(result), stay=stay))
        return _wait() if stay else 0


def _dataset(settings: Settings, rows: int, console: Console) -> str:
    drawn, data = str(settings.workspace / "data" / "demo-faces"), str(settings.workspace / "data" / "demo")
    with _stage("synthesize", console), console.progress("drawing", "rows") as progress:
        synthesize(drawn, rows, SIZE, 0, progress)
    with _stage("ingest", console), console.progress("ingesting", "files") as progress:
        job = prepare(drawn, data, SIZE)
        cluster.connect(settings)
        job.run(progress)
    return data


def train_model(settings: Settings, data: str, minutes: float, console: Console) -> tuple[int, Evaluation]:
    """Train both phases, tune the sampler between them and promote the result; return its version and scores."""
    budget = [f"data={data}", f"init_from={STARTER}", f"max_minutes={minutes * PHASE_1_SHARE}", *KEPT]
    with _stage("phase 1: denoising", console), console.training() as report:
        first = train(settings, load_recipe("demo", budget), report)
    with _stage("tune the sampler", console):
        tuned = tune_sampler(
            settings,
            first.bundle,
            data,
            trials=TUNE_TRIALS,
            num_images=32,
            progress=console.note,
            evaluate=lambda bundle: evaluate(settings, str(bundle), data, limit=64),
        )
    parent = f"models:/{settings.model_name}/{tuned.version}"
    budget = [f"data={data}", f"init_from={parent}", f"max_minutes={minutes * (1 - PHASE_1_SHARE)}", *KEPT]
    with _stage("phase 2: reconstruction through the sampler", console), console.training() as report:
        second = train(settings, load_recipe("demo-phase2", budget), report)
    with _stage("evaluate", console), console.progress("coloring", "images") as progress:
        out = settings.workspace / "demo" / "evaluation"
        result = evaluate_and_record(settings, second.bundle, data, out=out, progress=progress)
    with _stage("register and promote", console):
        version = release.register(settings, second.bundle, parent=tuned.version).version
        try:
            release.promote(settings, version, why="demo")
        except RegistryError as error:
            # A repeated demo may train a worse model than before. It is promoted anyway; the audit log records this.
            console.note(str(error))
            release.promote(settings, version, why="demo, run again", force=True)
        console.note(f"version {version} is champion")
    return version, result


def _color(url: str, folder: Path, console: Console) -> Path:
    """Color unseen drawings through the HTTP API and write a picture that compares them with their sketches."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[list[NDArray[np.uint8]]] = []
    with RemoteColorizer(url) as colorizer:
        for number in range(NUM_DRAWINGS):
            row: DrawnRow = make_row(UNSEEN_SEED, number, DRAWING_SIZE)
            sketch, reference = encode_png(row.sketch), encode_png(row.cross_reference)
            options, name = SamplerOptions(seed=number), f"drawing {number + 1}"
            colored = colorizer.colorize(sketch, [reference], options, RENDERING, name=name)
            (folder / f"drawing_{number + 1}.png").write_bytes(colored.picture)
            lines.append([row.sketch, row.cross_reference, decode_rgb(colored.picture), row.target])
            console.note(f"colored drawing {number + 1} of {NUM_DRAWINGS}")
    picture = folder / "before_after.png"
    labels = ["sketch", "reference", "colored", "truth"]
    picture.write_bytes(encode_png(contact_sheet(lines, labels)))
    return picture


def _summary(made: DemoResult, metrics: str, *, stay: bool) -> str:
    page = f"page       {made.url}" if stay else "page       animediffusion serve"
    return (
        f"\n{metrics}\n\n{page}\nMLflow     {made.mlflow}   (mlflow ui --backend-store-uri {made.mlflow})\n"
        f"picture    {made.picture}\ntime       {made.seconds:.0f} s" + ("\nCtrl-C stops the server" if stay else "")
    )


@contextmanager
def _stage(name: str, console: Console) -> Iterator[None]:
    started = time.monotonic()
    console.note(f"--- {name}")
    yield
    console.note(f"    {name}: {time.monotonic() - started:.0f} s")


def _free(port: int) -> int:
    """Return `port`, or the next free port if it is in use."""
    for candidate in range(port, port + PORTS_TO_TRY):
        try:
            check_address("127.0.0.1", candidate)
        except ConfigError:
            continue
        return candidate
    raise ConfigError("--port", f"{port} to {port + PORTS_TO_TRY - 1} are all in use", "choose another port")


def _wait() -> int:
    """Wait for SIGINT or SIGTERM, the normal end of a demo, and return exit code 0."""
    with StopSignals() as stop:
        stop.wait()
    return 0
