"""Compare the quality of recipes after equal training time: each is trained from scratch and measured on fixed tracks.

    python benchmarks/quality.py --data URI [--size 64] [--minutes 20] [--recipes ours ...] [--seeds 0 1] [--out DIR]

The data is a dataset made by `animediffusion data ingest`. A minute is one minute of the whole machine: on a CPU each
run gets a share of the cores and is timed by its CPU time, so other processes do not count; on a GPU the runs follow
each other. A run whose result is already in OUT is not repeated. The table is printed as Markdown; OUT also gets
results.json and images.

The tracks (animediffusion.pipelines.evaluation.tracks) are A same, B cross (for data with second images), C recolored,
D lines/STYLE and E damage/KIND. Track A uses 1, 2, 4, 10 and 25 network evaluations and the other tracks use 4; the
authors' sampler always uses 10, and the recipe regression uses 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RECIPES, train
from numpy.typing import NDArray

from animediffusion.models.augmentation.augment import Batch
from animediffusion.models.authors import strict as authors
from animediffusion.models.bundle import SamplerDefaults, save_bundle
from animediffusion.models.colorize import noise_for, sample_images
from animediffusion.models.diffusion.denoiser import Denoiser
from animediffusion.models.tensors import to_uint8
from animediffusion.pipelines.data.manifest import Manifest
from animediffusion.pipelines.data.stream import Arrays, read_split
from animediffusion.pipelines.evaluation.metrics import detail, score, trivial_results
from animediffusion.pipelines.evaluation.perceptual import perceptual, require
from animediffusion.pipelines.evaluation.tracks import TRACKS, build
from animediffusion.pipelines.training.recipe import load_recipe
from animediffusion.platform.errors import AnimeDiffusionError, ConfigError
from animediffusion.platform.images.codec import contact_sheet, encode_png

TRIVIAL = ("copy_reference", "mean_color", "sketch")
EVALUATIONS = (1, 2, 4, 10, 25)
COLUMNS = ("psnr", "ssim", "ms_ssim", "ciede2000", "haarpsi", "sharpness", "edge_f1", "lpips", "fid")
CHUNK = 25
CORES = os.cpu_count() or 1
PICTURES = 6

Scores = dict[str, float | None]
"""Metrics of some images by name; None for a metric that the images are too small for."""
Baselines = dict[str, dict[str, Scores]]
"""Scores by baseline and track."""
Result = dict[str, Any]
"""The JSON object in a run's result file: its recipe, training and scores."""


@dataclass(frozen=True)
class Run:
    """One recipe with one seed."""

    recipe: str
    seed: int
    folder: Path

    @property
    def result(self) -> Path:
        """Path of the result file, which exists once the run is finished."""
        return self.folder / f"{Path(self.recipe).stem}-{self.seed}.json"


def parts_of(recipe: str) -> list[tuple[str, float]]:
    """Return the recipes (names or YAML files) of a row of the table, with their shares of the time."""
    return RECIPES.get(recipe, [(recipe, 1.0)])


@torch.no_grad()
def color(denoiser: Denoiser, batch: Batch, steps: int, strict: bool, device: torch.device) -> NDArray[np.uint8]:
    """Color a batch; return images [B, S, S, 3] sampled from noise that depends only on the row number."""
    size = batch.target.shape[-1]
    parts = []
    for start in range(0, len(batch.target), CHUNK):
        part = batch.rows(slice(start, start + CHUNK)).to(device)
        noise = torch.stack([noise_for(start + i, size) for i in range(len(part.target))]).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            if strict:
                image = strict_images(denoiser, part, noise)
            else:
                image = sample_images(denoiser, part.sketch, part.references, noise, SamplerDefaults(steps=steps))
        parts.append(to_uint8(image.clamp(-1, 1)).cpu().numpy())
    return np.concatenate(parts)


def strict_images(denoiser: Denoiser, batch: Batch, noise: torch.Tensor) -> torch.Tensor:
    """Sample with the authors' 10 stochastic steps."""
    predict = authors.noise_predictor(denoiser, denoiser.encode(batch.sketch, batch.reference))
    generator = torch.Generator().manual_seed(0)
    injected = [torch.randn(noise.shape, generator=generator).to(noise) for _ in range(authors.NUM_STEPS)]
    return authors.strict_sample(predict, authors.gammas(authors.require_fit(denoiser)), noise, injected)


def measure(result: NDArray[np.uint8], batch: Batch, weights: Path | None) -> Scores:
    """Return all metrics of result images [B, S, S, 3]; LPIPS and FID only if their weights are given."""
    truth, sketch = (to_uint8(x.cpu()).numpy() for x in (batch.target, batch.sketch.expand(-1, 3, -1, -1)))
    scores: Scores = {**asdict(score(result, truth)), **detail(result, truth, sketch)}
    return scores if weights is None else {**scores, **perceptual(result, truth, weights)}


def evaluations(recipe: str, track: str) -> tuple[int, ...]:
    """Return the numbers of network evaluations that a recipe is measured with on a track."""
    if recipe == "authors":
        return (authors.NUM_STEPS,)
    if recipe == "regression":
        return (1,)
    return EVALUATIONS if track == "same" else (4,)


def tracks_of(rows: Arrays) -> list[str]:
    """Return the tracks that the data allows."""
    return [name for name in TRACKS if name != "cross" or rows["has_cross"].all()]


def run(job: Run, data: str, seconds: float, limit: int, weights: Path | None) -> None:
    """Train and measure one recipe, and write its result file, images and bundle."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = read_split(data, "train")
    size = rows["target"].shape[1]
    denoiser, training, strict = None, [], False
    for name, share in parts_of(job.recipe):
        config = load_recipe(name, [f"seed={job.seed}", "max_steps=1000000"])
        denoiser, took = train(config, denoiser, rows, share * seconds, device)
        strict = config.objective.strict
        training.append({"recipe": config.recipe, **took})
    assert denoiser is not None
    bundle = load_recipe(parts_of(job.recipe)[0][0]).bundle_config(size)
    save_bundle(job.folder / "bundles" / job.result.stem, denoiser, bundle)
    val = read_split(data, "val", limit)
    scores, pictures = {}, {}
    for track in tracks_of(val):
        batch = build(val, track)
        for steps in evaluations(job.recipe, track):
            result = color(denoiser, batch, steps, strict, device)
            scores[f"{track} {steps}"] = measure(result, batch, weights)
            pictures[track] = result[:PICTURES] if steps in (1, 4, 10) else pictures.get(track)
    np.savez(job.result.with_suffix(".npz"), **{k.replace("/", "-"): v for k, v in pictures.items()})
    job.result.write_text(json.dumps({"training": training, "scores": scores}, indent=1))


def run_all(jobs: list[Run], args: argparse.Namespace) -> None:
    """Run every unfinished job in its own process, with at most --jobs at a time."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, CORES // args.jobs))}
    waiting = [job for job in jobs if not job.result.exists()]
    running: list[tuple[Run, subprocess.Popen[bytes]]] = []
    while waiting or running:
        while waiting and len(running) < args.jobs:
            job = waiting.pop(0)
            print(f"{time.strftime('%H:%M:%S')} {job.recipe}, seed {job.seed}", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, "--data", args.data, "--out", str(args.out)]
            command += ["--limit", str(args.limit), "--minutes", str(args.minutes), "--job", job.recipe, str(job.seed)]
            command += ["--weights", str(args.weights)] if args.weights else []
            with job.result.with_suffix(".log").open("w") as log:
                running.append((job, subprocess.Popen(command, env=environment, stdout=log, stderr=log)))
        time.sleep(0.5)
        for job, process in [pair for pair in running if pair[1].poll() is not None]:
            running.remove((job, process))
            if process.returncode:
                print(f"{job.recipe}, seed {job.seed}: failed, see its log in {args.out}", file=sys.stderr, flush=True)


def table(results: dict[str, list[Result]], baselines: Baselines, minutes: float) -> str:
    """Return the report in Markdown: a summary of all trainings, then a section per track with means over seeds."""
    lines = [f"{minutes:g} minutes a recipe.", ""]
    lines += ["| recipe | parameters | seeds | steps | images | PSNR spread, dB |", "|---|---|---|---|---|---|"]
    for name, runs in results.items():
        took = [run["training"] for run in runs]
        steps, images = (round(statistics.mean(sum(p[key] for p in t) for t in took)) for key in ("steps", "images"))
        size = took[0][0]["parameters"] / 1e6
        lines.append(f"| {name} | {size:.1f} M | {len(runs)} | {steps} | {images} | {seed_range(runs)} |")
    lines += ["", "The spread is that between seeds, averaged over all rows below; smaller differences are noise."]
    columns = [name for name in COLUMNS if _known(name, baselines)]
    for track in next(iter(baselines.values())):
        lines += [
            "",
            f"**{track}**",
            "",
            f"| | evaluations | {' | '.join(columns)} |",
            "|---" * (2 + len(columns)) + "|",
        ]
        for name, runs in results.items():
            for key in (k for k in runs[0]["scores"] if k.split()[0] == track):
                lines.append(_row(name, key.split()[1], [run["scores"][key] for run in runs], columns))
        lines += [_row(name, "0", [baselines[name][track]], columns) for name in TRIVIAL]
    return "\n".join(lines)


def _known(column: str, baselines: Baselines) -> bool:
    """Return whether a metric is available: MS-SSIM needs large images, LPIPS and FID need weights."""
    return all(scores.get(column) is not None for tracks in baselines.values() for scores in tracks.values())


def _row(name: str, evaluations: str, scores: list[Scores], columns: list[str]) -> str:
    digits = {"psnr": 2, "ciede2000": 2}
    means = (f"{statistics.mean(s[c] for s in scores):.{digits.get(c, 3)}f}" for c in columns)
    return f"| {name} | {evaluations} | {' | '.join(means)} |"


def seed_range(runs: list[Result]) -> str:
    """Return the range of PSNR over seeds in dB, averaged over all measurements; `-` for a single seed."""
    if len(runs) == 1:
        return "-"
    values = [[run["scores"][key]["psnr"] for run in runs] for key in runs[0]["scores"]]
    return f"{statistics.mean(max(v) - min(v) for v in values):.2f}"


def trivial(val: Arrays, weights: Path | None) -> Baselines:
    """Return the scores of trivial baselines without a model on each track."""
    scores: Baselines = {name: {} for name in TRIVIAL}
    for track in tracks_of(val):
        batch = build(val, track)
        sketch, reference = (to_uint8(x).numpy() for x in (batch.sketch.expand(-1, 3, -1, -1), batch.reference))
        for name, images in trivial_results(sketch, reference).items():
            scores[name][track] = measure(images, batch, weights)
    return scores


def picture(results: dict[str, Path], val: Arrays, track: str) -> bytes:
    """Return a PNG of a track's first faces with all recipes side by side."""
    batch = build(val, track, range(PICTURES))
    columns = [to_uint8(x).numpy() for x in (batch.sketch.expand(-1, 3, -1, -1), batch.reference)]
    columns += [np.load(path)[track.replace("/", "-")] for path in results.values()]
    columns.append(to_uint8(batch.target).numpy())
    labels = ["sketch", "reference", *results, "truth"]
    return encode_png(contact_sheet(list(zip(*columns, strict=True)), labels))


def report(jobs: list[Run], args: argparse.Namespace) -> str:
    """Return the table of all finished jobs, and write results.json and the images."""
    done = [job for job in jobs if job.result.exists()]
    if not done:
        raise SystemExit("error: no recipe finished; the logs are in " + str(args.out))
    results: dict[str, list[Result]] = {}
    for job in done:
        results.setdefault(Path(job.recipe).stem, []).append(json.loads(job.result.read_text()))
    val = read_split(args.data, "val", args.limit)
    baselines = trivial(val, args.weights)
    everything = {"minutes": args.minutes, "results": results, "baselines": baselines}
    (args.out / "results.json").write_text(json.dumps(everything, indent=1) + "\n")
    first = {Path(job.recipe).stem: job.result.with_suffix(".npz") for job in reversed(done)}
    for track in tracks_of(val):
        (args.out / f"{track.replace('/', '-')}.png").write_bytes(picture(dict(reversed(first.items())), val, track))
    return table(results, baselines, args.minutes)


def main() -> None:
    """Run the recipes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="URI of a dataset")
    parser.add_argument("--size", type=int, help="side in pixels; the dataset's, and checked, if given")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument(
        "--recipes", nargs="+", default=list(RECIPES), metavar="NAME", help="rows, recipes or YAML files"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], metavar="N")
    parser.add_argument("--limit", type=int, default=100, help="pictures of val that are measured")
    parser.add_argument("--jobs", type=int, default=1 if torch.cuda.is_available() else CORES, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("quality"))
    parser.add_argument(
        "--weights", type=Path, help="folder of pipelines/evaluation/perceptual.py's files, for LPIPS and FID"
    )
    parser.add_argument("--job", nargs=2, metavar=("RECIPE", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        check(args)
    except AnimeDiffusionError as error:
        raise SystemExit(f"error: {error}") from None
    args.out.mkdir(parents=True, exist_ok=True)
    if args.job:
        job = Run(args.job[0], int(args.job[1]), args.out)
        seconds = 60 * args.minutes * (1 if torch.cuda.is_available() else CORES)
        run(job, args.data, seconds, args.limit, args.weights)
        return
    jobs = [Run(recipe, seed, args.out) for seed in args.seeds for recipe in args.recipes]
    run_all(jobs, args)
    print(report(jobs, args))


def check(args: argparse.Namespace) -> None:
    """Check the arguments before any training starts.

    Raises:
        ConfigError: if the size differs from the dataset's, a recipe does not load, or files or packages for LPIPS and
            FID are missing.
    """
    size = Manifest.load(args.data).image_size
    if args.size and args.size != size:
        raise ConfigError("--size", f"is {args.size}, the dataset has {size} px", "ingest the source at that size")
    for name in (name for recipe in args.recipes for name, _ in parts_of(recipe)):
        try:
            load_recipe(name)
        except ConfigError as error:
            raise ConfigError(error.thing, error.found, f"{error.allowed}; or a row of {', '.join(RECIPES)}") from None
    if args.weights:
        require(args.weights)


if __name__ == "__main__":
    main()
