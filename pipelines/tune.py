"""Search with Ray Tune and Optuna: how a finished model is best sampled.

Sampler, steps and guidance scale of a fixed bundle, on fixed rows and fixed noise, so that two trials differ by their
settings alone. Two objectives: PSNR, and network evaluations per image; the result is a front, and one point of it.
Not here: searches that train, see pipelines/train.py for what one trial of them would be.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import optuna
import ray
import torch
from ray import tune
from ray.tune.search.optuna import OptunaSearch
from torch import Tensor

from animediffusion.models.augment import Batch, fixed_batch
from animediffusion.models.bundle import Bundle, SamplerDefaults, with_metrics, with_sampler
from animediffusion.models.colorize import colorize
from animediffusion.models.images import to_uint8
from animediffusion.models.sampler import SAMPLERS, build_sampler
from animediffusion.pipelines import release
from animediffusion.pipelines.dataset import read_split
from animediffusion.pipelines.metrics import psnr
from animediffusion.pipelines.pareto import Point, Prefer, choose, describe, pareto_front
from animediffusion.platform import cluster
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import ClusterError, ConfigError
from animediffusion.platform.registry import Registry
from animediffusion.platform.tracking import TUNING, Run

Progress = Callable[[str], None]
"""Takes one line: how many trials are done, and what the last one gave."""

_GUIDANCE_SCALES = (1.0, 1.25, 1.5, 2.0, 3.0)
_MAX_STEPS = 8
_ROWS_PER_BATCH = 16


@dataclass(frozen=True)
class _Task:
    """What every trial needs; sent to the workers once, through Ray's object store."""

    bundle: Bundle
    batch: Batch


def tune_sampler(
    settings: Settings,
    model: str | Path,
    data: str,
    *,
    trials: int = 50,
    minutes: float | None = None,
    prefer: Prefer = "knee",
    register: bool = True,
    num_images: int = 64,
    split: str = "val",
    progress: Progress | None = None,
    evaluate: Callable[[Path], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Find sampler defaults for a model and register it with them.

    Args:
        settings: workspace and registry.
        model: bundle folder, URI or models:/ reference.
        data: dataset URI.
        trials: how many settings to try; the first are the model's own defaults.
        minutes: stop starting trials after this long.
        prefer: `best` quality, the `knee` of quality against cost, or the `fast`est within 0.2 dB of the defaults.
        register: make the model with the chosen defaults the next version.
        num_images: rows of the split to measure on.
        split: which split.
        progress: called after every trial.
        evaluate: measures the new bundle, so that the gate can compare the version at once.

    Returns:
        `{trials, defaults, best, front, version, changed}`; points as in `Point`, the front by rising cost.

    Raises:
        ConfigError: an argument out of range. ClusterError: no trial could run.
    """
    if prefer not in get_args(Prefer):
        raise ConfigError("--prefer", repr(prefer), ", ".join(get_args(Prefer)))
    if trials < 1:
        raise ConfigError("--trials", str(trials), "at least 1")
    batch = load_track(data, split, num_images)
    registry = Registry(settings)
    bundle = release.check_bundle(registry.fetch(model))
    cluster.connect(settings)
    record = Run.start(settings, TUNING, f"sampler {bundle.sha256[:12]}", _params(model, data, trials, prefer))
    try:
        points = search(settings, bundle, batch, trials=trials, minutes=minutes, progress=progress)
        result = _choose(points, prefer)
        _record(record, points, result)
        if register:
            result |= _register(registry, bundle, _defaults(bundle, result["best"]), record.run_id, evaluate)
    except BaseException:
        record.finish("FAILED")
        raise
    record.finish()
    return result


def load_track(data: str, split: str, num_images: int) -> Batch:
    """The cross-reference track of the first rows of a split: fixed sketches, references and truths."""
    arrays = read_split(data, split, num_images)
    rows = {name: torch.from_numpy(array) for name, array in arrays.items() if name != "id"}
    return fixed_batch(rows, "cross", torch.Generator().manual_seed(0))


def search(
    settings: Settings,
    bundle: Bundle,
    batch: Batch,
    *,
    trials: int,
    minutes: float | None = None,
    progress: Progress | None = None,
) -> list[Point]:
    """Run the trials on Ray, as many at a time as there are devices; the defaults come first in the result."""
    defaults = bundle.config.sampler
    device = "GPU" if ray.cluster_resources().get("GPU", 0) >= 1 else "CPU"
    place = settings.workspace / "tune" / uuid.uuid4().hex[:12]
    _be_quiet()
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_trial, task=_Task(bundle, batch)), {device: 1}),
        tune_config=tune.TuneConfig(
            search_alg=_searcher(defaults),
            num_samples=trials,
            max_concurrent_trials=max(1, int(ray.cluster_resources().get(device, 1))),
            time_budget_s=minutes * 60 if minutes else None,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="sampler", storage_path=str(place), verbose=0, callbacks=[_Report(trials, progress)]
        ),
    )
    try:
        results = tuner.fit()
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return _points(results, defaults)


@torch.no_grad()
def measure(bundle: Bundle, batch: Batch, sampler: SamplerDefaults) -> Point:
    """Color the rows with these settings and compare with the truth; row i has noise i."""
    started = time.perf_counter()
    images = []
    for start in range(0, len(batch.target), _ROWS_PER_BATCH):
        rows = slice(start, start + _ROWS_PER_BATCH)
        seeds = range(start, min(start + _ROWS_PER_BATCH, len(batch.target)))
        images.append(colorize(bundle, batch.sketch[rows], batch.reference[rows], seeds=seeds, sampler=sampler).cpu())
    seconds = time.perf_counter() - started
    result, truth = to_uint8(torch.cat(images)), to_uint8(batch.target)
    return Point(
        sampler=sampler.name,
        steps=sampler.steps,
        guidance_scale=sampler.guidance_scale,
        psnr=float(psnr(result.numpy(), truth.numpy()).mean()),
        sharpness=float(_detail(result) / _detail(truth).clamp(min=1e-12)),
        evaluations=cost(bundle, sampler),
        seconds_per_image=seconds / len(batch.target),
    )


def cost(bundle: Bundle, sampler: SamplerDefaults) -> int:
    """Network rows that one image takes."""
    evaluations = build_sampler(sampler.name, bundle.denoiser.path).num_evaluations(sampler.steps)
    return evaluations * (1 if sampler.guidance_scale == 1 else 2)


def _trial(config: dict[str, Any], *, task: _Task) -> None:
    """One trial, in a worker that the next trials use, too."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    task.bundle.denoiser.to(device)
    sampler = replace(task.bundle.config.sampler, **config)
    tune.report(asdict(measure(task.bundle, task.batch, sampler)))


def _searcher(defaults: SamplerDefaults) -> OptunaSearch:
    """Multi-objective TPE over settings that always include the defaults and, second, the cheapest there is."""
    scales = sorted({*_GUIDANCE_SCALES, defaults.guidance_scale})
    space = {
        "name": optuna.distributions.CategoricalDistribution(SAMPLERS),
        "steps": optuna.distributions.IntDistribution(1, max(_MAX_STEPS, defaults.steps), log=True),
        "guidance_scale": optuna.distributions.CategoricalDistribution(scales),
    }
    own = {"name": defaults.name, "steps": defaults.steps, "guidance_scale": defaults.guidance_scale}
    cheapest = {"name": defaults.name, "steps": 1, "guidance_scale": 1.0}
    return OptunaSearch(
        space,
        metric=["psnr", "evaluations"],
        mode=["max", "min"],
        points_to_evaluate=[own] if own == cheapest else [own, cheapest],
        seed=0,
    )


class _Report(tune.Callback):
    """Calls `progress` after every trial."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total = total
        self._progress = progress
        self._done = 0

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        self._done += 1
        if self._progress is not None and "psnr" in trial.last_result:
            self._progress(f"trial {self._done}/{self._total}  {describe(_point(trial.last_result))}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        self._done += 1
        if self._progress is not None:
            self._progress(f"trial {self._done}/{self._total}  {trial.config} failed")


def _points(results: Any, defaults: SamplerDefaults) -> list[Point]:
    points = [_point(result.metrics) for result in results if result.metrics and "psnr" in result.metrics]
    wanted = (defaults.name, defaults.steps, defaults.guidance_scale)
    own = [point for point in points if (point.sampler, point.steps, point.guidance_scale) == wanted]
    if not own:
        reason = str(results.errors[0]).strip().splitlines()[-1] if results.errors else "the time was too short"
        raise ClusterError("tune sampler", f"the model's defaults were not measured ({reason})", "give more --minutes")
    return [own[0], *(point for point in points if point is not own[0])]


def _point(metrics: dict[str, Any]) -> Point:
    return Point(**{name: metrics[name] for name in Point.__dataclass_fields__})


def _choose(points: list[Point], prefer: Prefer) -> dict[str, Any]:
    return {
        "trials": len(points),
        "defaults": asdict(points[0]),
        "best": asdict(choose(points, prefer)),
        "front": [asdict(point) for point in pareto_front(points)],
    }


def _defaults(bundle: Bundle, best: dict[str, Any]) -> SamplerDefaults:
    return replace(
        bundle.config.sampler, name=best["sampler"], steps=best["steps"], guidance_scale=best["guidance_scale"]
    )


def _register(
    registry: Registry,
    bundle: Bundle,
    sampler: SamplerDefaults,
    run_id: str,
    evaluate: Callable[[Path], dict[str, Any]] | None,
) -> dict[str, Any]:
    """The version with these defaults: the model's own where they are unchanged, else a new one."""
    settings = registry.settings
    if sampler == bundle.config.sampler:
        return {"version": release.register(settings, bundle.folder).version, "changed": False}
    known = registry.find(bundle.sha256)
    with tempfile.TemporaryDirectory(prefix="animediffusion-") as folder:
        copy = Path(folder) / "bundle"
        # Never the old metrics: they were measured with the old defaults.
        sha256 = with_sampler(bundle.folder, copy, sampler, metrics={})
        if evaluate is not None:
            with_metrics(copy, {**evaluate(copy), "model": f"sha256:{sha256[:12]}"})
        version = release.register(settings, copy, run_id=run_id, parent=known.version if known else None)
    return {"version": version.version, "changed": True}


def _params(model: str | Path, data: str, trials: int, prefer: str) -> dict[str, Any]:
    return {"model": str(model), "data": data, "trials": trials, "prefer": prefer}


def _record(record: Run, points: list[Point], result: dict[str, Any]) -> None:
    for step, point in enumerate(points):
        record.log({"psnr": point.psnr, "sharpness": point.sharpness, "evaluations": point.evaluations}, step)
    record.set_tags({"best": json.dumps(result["best"]), "front": json.dumps(result["front"])})


def _detail(images: Tensor) -> Tensor:
    """Mean energy of the differences between neighbouring pixels of uint8 [B, H, W, 3]."""
    images = images.float()
    return images.diff(dim=1).square().mean() + images.diff(dim=2).square().mean()


def _be_quiet() -> None:
    # Tune prints tables unless it is told to use its old output, which obeys verbose=0.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
