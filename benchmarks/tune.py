"""Measure the results and the cost of the searches of `tune`.

    python benchmarks/tune.py [--model BUNDLE --data URI] [--images 32] [--searches 3] [--out DIR]
    python benchmarks/tune.py --schedule MINUTES [--data URI] [--recipe FILE.yaml] [--steps 270] [--out DIR]

Without --data, faces are drawn (at 64 px, or at 32 px for --schedule); without --model, the recipe `demo` is trained on
the data for three minutes.

The first command measures a grid of about 200 sampler settings, each with every average that the model's run kept. Then
the search of `tune sampler` runs on the same rows with a quarter as many trials as the grid has sampler settings,
several times with different seeds and an empty trial log. At every cost on the grid's Pareto front, the best setting of
the grid and of each search at this cost or below are compared.

The second command starts `tune schedule` from a deliberately bad recipe with a limit of MINUTES. Then it trains the bad
and the found recipe with `train` for equally many steps, and evaluates both. Both commands print Markdown.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import torch

from animediffusion.models.bundle import Bundle, SamplerDefaults, load_bundle
from animediffusion.models.diffusion.guidance import EVERYWHERE
from animediffusion.models.diffusion.sampler import SAMPLERS
from animediffusion.models.training.ema import Averages, read_averages
from animediffusion.pipelines.data.ingest import prepare
from animediffusion.pipelines.evaluation.evaluate import evaluate
from animediffusion.pipelines.evaluation.measure import MeasuredRows, Measurement, load_rows, measure
from animediffusion.pipelines.synthetic.dataset import synthesize
from animediffusion.pipelines.training.driver import train
from animediffusion.pipelines.training.recipe import load_recipe
from animediffusion.pipelines.tuning.optuna_searcher import SearchConfig, TrialEntry, TrialLog
from animediffusion.pipelines.tuning.pareto import describe, pareto_front
from animediffusion.pipelines.tuning.plots import draw_front
from animediffusion.pipelines.tuning.sampler_search import search
from animediffusion.pipelines.tuning.sampler_space import SamplerSpace, to_point
from animediffusion.pipelines.tuning.schedule_search import tune_schedule
from animediffusion.platform.cluster import cluster
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import AnimeDiffusionError, ConfigError

Setting = tuple[SamplerDefaults, float | None]
"""Sampler settings, and the length of the weights' average; None is the trained average."""
STEPS = (1, 2, 3, 4, 6, 8)
SHIFTS = (0.5, 1.0, 2.0, 4.0)
GUIDANCE = ((1.0, EVERYWHERE), (1.5, EVERYWHERE), (2.5, EVERYWHERE), (2.5, (0.0, 0.5)))
WITHIN_DB = 0.1
BAD = """\
# Everything about as wrong as a recipe can be that still trains.
base: demo
recipe: bad
path: {name: linear}
prediction: eps
objective: {denoising: {time_distribution: uniform, drop_reference: 0.5}}
optimizer: {learning_rate: 1.0e-4, muon_learning_rate: 1.0e-3}
"""
GAIN_DB = 0.5
TRAIN_MINUTES = 3


def grid(space: SamplerSpace) -> list[SamplerDefaults]:
    """Return all combinations of the grid, without duplicates that sample identically."""
    found: dict[SamplerDefaults, None] = {}
    for name, steps, shift, (scale, interval) in itertools.product(SAMPLERS, STEPS, SHIFTS, GUIDANCE):
        settings = SamplerDefaults(
            name=name, steps=steps, shift=shift, guidance_scale=scale, guidance_interval=interval
        )
        found[space.simplest(settings)] = None
    return list(found)


def measure_all(
    bundle: Bundle, averages: Averages, rows: MeasuredRows, settings: list[Setting], log: TrialLog
) -> list[Measurement]:
    """Measure all settings on Ray, except those that the trial log already contains."""
    found = [Measurement.of(entry.details["measured"]) for entry in log.read()]
    known = {(point.settings, point.ema_length): point for point in found}
    shared = ray.put((bundle, averages, rows.searched))

    @ray.remote(num_cpus=1)
    def one(task: Any, some: list[Setting]) -> list[Measurement]:
        model, weights, batch = task
        return [measure(weights.use(model, length), batch, sampler, length) for sampler, length in some]

    missing = [setting for setting in settings if setting not in known]
    tasks = [one.remote(shared, missing[start : start + 8]) for start in range(0, len(missing), 8)]
    while tasks:
        [done], tasks = ray.wait(tasks)
        for point in ray.get(done):
            values = [point.psnr, float(point.evaluations)]
            log.write(
                TrialEntry(to_point(point.settings, point.ema_length), values, details={"measured": asdict(point)})
            )
            known[point.settings, point.ema_length] = point
        print(f"grid: {len(known)} of {len(settings)}", file=sys.stderr, flush=True)
    return [known[setting] for setting in settings]


def best_at(points: list[Measurement], cost: int) -> Measurement:
    """Return the best of the points with at most this cost."""
    return max((point for point in points if point.evaluations <= cost), key=lambda point: point.psnr)


def sampler_table(model: str, data: str, images: int, searches: int, out: Path) -> bool:
    """Compare grid and searches in a table; return whether no search is more than WITHIN_DB below the grid."""
    bundle, rows = load_bundle(model), load_rows(data, "val", images)
    averages = read_averages(bundle)
    sampled = grid(SamplerSpace(bundle.denoiser.path, bundle.config.sampler))
    settings: list[Setting] = list(itertools.product(sampled, [None, *averages.kept]))
    whole = measure_all(bundle, averages, rows, settings, TrialLog(out / "grid" / "points.jsonl"))
    (out / "grid.png").write_bytes(draw_front(whole, whole[0]))
    trials = len(sampled) // 4
    begun, found = time.monotonic(), []
    for seed in range(searches):
        folder = out / f"search-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        found.append(search(bundle, averages, rows.searched, folder, SearchConfig(trials, progress=note), seed))
        (folder / "front.png").write_bytes(draw_front(found[-1], found[-1][0]))
    seconds = (time.monotonic() - begun) / searches
    path, made = bundle.config.path, bundle.config.provenance
    print(
        f"Recipe {made.get('recipe', 'unknown')}, {path.name}, {bundle.config.prediction}; {images} images; "
        f"grid {len(whole)} points; searches {searches} of {trials} points, {seconds:.0f} s each.\n"
    )
    print("| rows per image | grid, dB | worst search, dB | difference | best search | the worst search's setting |")
    print("|---|---|---|---|---|---|")
    worst = 0.0
    for point in pareto_front(whole):
        ours = sorted((best_at(one, point.evaluations) for one in found), key=lambda point: point.psnr)
        low, high = (one.psnr - point.psnr for one in (ours[0], ours[-1]))
        worst = min(worst, low)
        print(
            f"| {point.evaluations} | {point.psnr:.2f} | {ours[0].psnr:.2f} | {low:+.2f} | {high:+.2f} | "
            f"{describe(ours[0]).partition(':')[0]} |"
        )
    print(f"\nWorst difference {worst:+.2f} dB, allowed {-WITHIN_DB:.2f}: {'ok' if worst >= -WITHIN_DB else 'NOT ok'}")
    return worst >= -WITHIN_DB


def note(line: str) -> None:
    """Print a line of progress to stderr, separate from the table."""
    print(line, file=sys.stderr, flush=True)


def schedule_table(settings: Settings, data: str, minutes: float, steps: int, recipe: Path) -> bool:
    """Search and train both recipes, and print the results; return whether the found recipe is GAIN_DB better."""
    found = settings.workspace / "found.yaml"
    begun = time.monotonic()
    result = tune_schedule(
        settings,
        data,
        recipe=str(recipe),
        trials=10_000,
        minutes=minutes,
        steps=steps,
        out=found,
        progress=note,
    )
    seconds = time.monotonic() - begun
    print("| training steps | trials that reached them | best, dB | the bad recipe, dB |")
    print("|---|---|---|---|")
    for rung in result.front:
        base = "stopped early" if rung.base_psnr is None else f"{rung.base_psnr:.2f}"
        print(f"| {rung.steps} | {rung.trials} | {rung.psnr:.2f} | {base} |")
    print(
        f"\n{result.trials} trials in {seconds:.0f} s: {result.finished} finished, "
        f"{result.stopped_early} stopped early, {result.failed} failed, {result.cut} ended by the time limit.\n"
    )
    # Restart Ray, because it keeps the CPUs of trials that ran out of time reserved for minutes.
    cluster.shutdown()
    cluster.connect(settings)
    scores = {}
    for name, path in (("the bad recipe", recipe), ("the found recipe", found)):
        run = train(settings, load_recipe(str(path), [f"data={data}", f"max_steps={steps}", "num_workers=1"]))
        scores[name] = evaluate(settings, run.bundle, data).tracks
    print(f"Both trained by `train` for {steps} steps, all rows of val:\n")
    print("| | PSNR same | PSNR cross |\n|---|---|---|")
    for name, tracks in scores.items():
        print(f"| {name} | {tracks['same'].psnr:.2f} | {tracks['cross'].psnr:.2f} |")
    gain = scores["the found recipe"]["cross"].psnr - scores["the bad recipe"]["cross"].psnr
    print(f"\nGain {gain:+.2f} dB, wanted {GAIN_DB:+.2f}: {'ok' if gain >= GAIN_DB else 'NOT ok'}\n")
    print(f"```yaml\n{found.read_text().rstrip()}\n```")
    return gain >= GAIN_DB


def drawn_faces(out: Path, size: int) -> str:
    """Return the URI of a dataset of drawn faces, which is made if it does not exist yet."""
    faces, data = str(out / f"faces-{size}"), str(out / f"data-{size}")
    synthesize(faces, 2000, size, 0)
    prepare(faces, data, size).run(lambda *_: None)
    return data


def trained(settings: Settings, data: str) -> str:
    """Train the recipe `demo` for TRAIN_MINUTES and return its bundle."""
    overrides = [f"data={data}", f"max_minutes={TRAIN_MINUTES}", "name=model"]
    return train(settings, load_recipe("demo", overrides)).bundle


def main() -> int:
    """Run one of the two benchmarks; return exit code 0 if the search reached its target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a dataset")
    parser.add_argument("--model", help="a bundle that was trained at the size of the data")
    parser.add_argument("--images", type=int, default=32, help="rows of val to measure on")
    parser.add_argument("--searches", type=int, default=3, help="number of searches, each from another seed")
    parser.add_argument("--schedule", type=float, metavar="MINUTES", help="search a recipe for this time")
    parser.add_argument("--steps", type=int, default=270, help="training steps of the longest trials")
    parser.add_argument("--recipe", type=Path, help="recipe to start from; a bad one by default")
    parser.add_argument("--out", type=Path, help="folder to keep; a search with the same settings resumes there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    out = (args.out or Path(tempfile.mkdtemp(prefix="tune-"))).absolute()
    out.mkdir(parents=True, exist_ok=True)
    settings = Settings(workspace=out)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        if args.model is not None and (args.data is None or args.schedule is not None):
            raise ConfigError(
                "--model", "is given without --data, or with --schedule", "give --data and omit --schedule"
            )
        if args.searches < 1:
            raise ConfigError("--searches", str(args.searches), "at least 1")
        cluster.connect(settings)
        data = args.data or drawn_faces(out, 64 if args.schedule is None else 32)
        if args.schedule is None:
            model = args.model or trained(settings, data)
            return 0 if sampler_table(model, data, args.images, args.searches, out) else 1
        bad = args.recipe or out / "bad.yaml"
        if args.recipe is None:
            bad.write_text(BAD)
        return 0 if schedule_table(settings, data, args.schedule, args.steps, bad) else 1
    except AnimeDiffusionError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
