"""`tune sampler`: how a finished model is best sampled, searched with Ray Tune and Optuna.

Settings of a fixed bundle, on fixed rows and fixed noise, so that two trials differ by their settings alone; one of
them is which average of the run's weights the model gets. Two objectives: PSNR, and network rows per image; the result
is a front, and one point of it. All that was ever measured of these weights on these rows is in a journal, so a search
that was killed goes on, and one that is repeated is free. Not here: which settings there are
(pipelines/tuning/sampler_space.py), how trials run (pipelines/tuning/optuna_searcher.py), searches that train
(pipelines/tuning/schedule_search.py).
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import optuna
import ray
import torch
from ray import tune

from animediffusion.models.augmentation.augment import Batch
from animediffusion.models.bundle import Bundle, SamplerDefaults, with_metrics, with_sampler
from animediffusion.models.training.ema import Averages, read_averages
from animediffusion.pipelines.evaluation.measure import Rows, load_rows, measure
from animediffusion.pipelines.evaluation.point import Point
from animediffusion.pipelines.release import promote as release
from animediffusion.pipelines.release.checks import check_bundle
from animediffusion.pipelines.tuning.optuna_searcher import Study, TrialLog, new_study, run_trials
from animediffusion.pipelines.tuning.pareto import Prefer, choose, describe, floor, pareto_front
from animediffusion.pipelines.tuning.plots import draw_front, draw_strip
from animediffusion.pipelines.tuning.sampler_space import SamplerSpace
from animediffusion.platform.cluster import connect as cluster
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import BundleError, ClusterError, ConfigError, Interrupted
from animediffusion.platform.registry.client import Registry
from animediffusion.platform.tracking.run import TUNING, Run

Progress = Callable[[str], None]
"""Takes one line: how many trials are done, and what the last one gave."""

FORMAT = 1
"""Of the journal: another number where the same settings would be measured otherwise."""
CONFIRM_DB = 0.05
"""On rows that the search did not see, a chosen point may be so much below what was allowed there: less than these rows
can tell apart."""


@dataclass(frozen=True)
class _SamplerTask:
    """What every trial needs; sent to the workers once, through Ray's object store."""

    bundle: Bundle
    averages: Averages
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
        trials: how many different settings are known in the end; those of earlier searches count. The first are the
            model's own.
        minutes: stop after this long.
        prefer: `best` quality, the `knee` of quality against cost, or the `fast`est within 0.2 dB of the defaults.
        register: make the model with the chosen defaults the next version.
        num_images: rows of the split to measure on.
        split: which split.
        progress: called after every trial.
        evaluate: measures the new bundle, so that the gate can compare the version at once.

    Returns:
        `{trials, measured, defaults, best, front, unseen, folder, picture, strip}`, and `version, changed` where it is
        registered; points as in `Point`, the front by rising cost. `measured`: trials of this call; `unseen`: PSNR of
        defaults and best on rows that the search did not see, or None.

    Raises:
        ConfigError: an argument out of range. ClusterError: the defaults could not be measured. Interrupted: by a
            signal; the same call goes on.
    """
    if prefer not in get_args(Prefer):
        raise ConfigError("--prefer", repr(prefer), ", ".join(get_args(Prefer)))
    if trials < 1:
        raise ConfigError("--trials", str(trials), "at least 1")
    rows = load_rows(data, split, num_images)
    registry = Registry(settings)
    bundle = check_bundle(registry.fetch(model, averages=True))
    averages = _averages(bundle)
    name = f"sampler-{_search_key(bundle, averages, rows)}"
    folder = settings.workspace / "tune" / name
    cluster.connect(settings)
    record = Run.start(settings, TUNING, name, {"model": str(model), "data": data, "trials": trials, "prefer": prefer})
    try:
        known = len(read_points(folder))
        points = search(bundle, averages, rows.searched, folder, trials=trials, minutes=minutes, progress=progress)
        chosen, unseen, strip = _conclude(bundle, averages, rows, points, prefer, progress)
        result = {
            "trials": len(points),
            "measured": len(points) - known,
            "defaults": asdict(points[0]),
            "best": asdict(chosen),
            "front": [asdict(point) for point in pareto_front(points)],
            "unseen": unseen,
            **_show(points, chosen, strip, folder),
        }
        _record(record, points, result)
        if register:
            result |= _register(registry, bundle, averages, chosen, record.run_id, evaluate)
    except BaseException as error:
        record.finish("KILLED" if isinstance(error, KeyboardInterrupt | Interrupted) else "FAILED")
        raise
    record.finish()
    return result


def search(
    bundle: Bundle,
    averages: Averages,
    batch: Batch,
    folder: Path,
    *,
    trials: int,
    minutes: float | None = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> list[Point]:
    """Measure until `trials` points are known, as many at a time as there are devices; the defaults come first.

    `seed`: of Optuna's draws. With trials side by side, their order of ending decides, too.
    """
    space = _space(bundle, averages)
    study = Study(
        new_study(_optuna_sampler(seed), ["maximize", "minimize"]),
        space.distributions,
        space.point,
        _judge,
        TrialLog(folder / "points.jsonl"),
        space.first(),
        "measured",
    )
    own = (space.simplest(bundle.config.sampler), averages.length)
    known = any((point.settings, point.ema_length) == own for point in read_points(folder))
    device, at_once = _device()
    run_trials(
        folder.name,
        tune.with_resources(tune.with_parameters(_trial, task=_SamplerTask(bundle, averages, batch)), {device: 1}),
        study,
        # Of a model that was tuned before all may be known but its new defaults.
        trials=max(trials, study.num_known + (not known)),
        at_once=at_once,
        minutes=minutes,
        callback=_Report(trials, study, progress),
        reuse=True,
        place=folder,
        tell=progress,
    )
    points = read_points(folder)
    first = next((point for point in points if (point.settings, point.ema_length) == own), None)
    if first is None:
        raise ClusterError("tune sampler", "the model's defaults were not measured", "give more --minutes")
    return [first, *(point for point in points if point is not first)]


def _device() -> tuple[str, int]:
    """What a trial runs on and how many of them there are: GPU where the cluster has one or can add one, else CPU."""
    has, most = cluster.resources()
    name = "GPU" if most.get("GPU", 0) >= 1 else "CPU"
    return name, max(1, int(has.get(name, 0)))


def _optuna_sampler(seed: int) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)


def read_points(folder: Path) -> list[Point]:
    """All points that a search's folder knows, in the order of their measurement."""
    return [Point.of(entry["measured"]) for entry in TrialLog(folder / "points.jsonl").read() if "measured" in entry]


Conclusion = tuple[Point, dict[str, float] | None, bytes]
"""What confirm() returns, and the strip of pictures (PNG)."""


def _conclude(
    bundle: Bundle, averages: Averages, rows: Rows, points: list[Point], prefer: Prefer, tell: Progress | None
) -> Conclusion:
    """The conclusion, made on the kind of device that the search ran on: the driver of a cluster has no GPU."""
    if _device()[0] == "CPU":
        return _conclude_here(bundle, averages, rows, points, prefer)
    with cluster.waits(tell or (lambda _: None)):
        task = ray.remote(num_gpus=1)(_conclude_here).remote(bundle, averages, rows, points, prefer)
        conclusion: Conclusion = ray.get(task)
    return conclusion


def _conclude_here(bundle: Bundle, averages: Averages, rows: Rows, points: list[Point], prefer: Prefer) -> Conclusion:
    bundle.denoiser.to("cuda" if torch.cuda.is_available() else "cpu")
    chosen, unseen = confirm(bundle, averages, rows, points, prefer)
    return chosen, unseen, draw_strip(bundle, averages, rows.searched, pareto_front(points), chosen)


def confirm(
    bundle: Bundle, averages: Averages, rows: Rows, points: list[Point], prefer: Prefer
) -> tuple[Point, dict[str, float] | None]:
    """The point to use, and its and the defaults' PSNR on rows that the search did not see.

    A point that is worse than the defaults there was good by chance; the next best takes its place.
    """
    defaults = points[0]
    if rows.unseen is None:
        return choose(points, prefer), None
    unseen = _SamplerTask(bundle, averages, rows.unseen)
    own = _measure(unseen, defaults.settings, defaults.ema_length).psnr
    while True:
        chosen = choose(points, prefer)
        same = chosen == defaults
        found = own if same else _measure(unseen, chosen.settings, chosen.ema_length).psnr
        if same or found >= floor(own, prefer) - CONFIRM_DB:
            return chosen, {"defaults": own, "best": found}
        points = [point for point in points if point != chosen]


def _trial(config: dict[str, Any], *, task: _SamplerTask) -> None:
    """One trial, in a worker that the next trials use, too."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    task.bundle.denoiser.to(device)
    sampler = SamplerDefaults(**{key: value for key, value in config.items() if key != "ema_length"})
    tune.report({"measured": json.dumps(asdict(_measure(task, sampler, config.get("ema_length"))))})


def _measure(task: _SamplerTask, sampler: SamplerDefaults, length: float | None) -> Point:
    return measure(task.averages.use(task.bundle, length), task.batch, sampler, length)


def _judge(
    trial_id: str,  # noqa: ARG001
    point: dict[str, Any],  # noqa: ARG001
    result: dict[str, Any],
) -> tuple[list[float], dict[str, Any]] | None:
    if "measured" not in result:
        return None
    measured = json.loads(result["measured"])
    return [measured["psnr"], measured["evaluations"]], {"measured": measured}


class _Report(tune.Callback):
    """Calls `progress` after every trial; several may have failed."""

    def __init__(self, total: int, study: Study, progress: Progress | None) -> None:
        self._total = total
        self._study = study
        self._progress = progress

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        if self._progress is not None and "measured" in trial.last_result:
            point = Point.of(json.loads(trial.last_result["measured"]))
            self._progress(f"trial {self._study.num_known}/{self._total}  {describe(point)}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        if self._progress is not None:
            self._progress(f"trial {self._study.num_known}/{self._total}  {trial.config} failed")


def _show(points: list[Point], chosen: Point, strip: bytes, folder: Path) -> dict[str, str]:
    """front.png and strip.png in the search's folder."""
    pictures = {"picture": folder / "front.png", "strip": folder / "strip.png"}
    pictures["picture"].write_bytes(draw_front(points, chosen))
    pictures["strip"].write_bytes(strip)
    return {"folder": str(folder), **{name: str(path) for name, path in pictures.items()}}


def _averages(bundle: Bundle) -> Averages:
    try:
        return read_averages(bundle)
    except ValueError as error:
        raise BundleError(str(bundle.folder), str(error), "give a folder as training wrote it") from error


def _space(bundle: Bundle, averages: Averages) -> SamplerSpace:
    return SamplerSpace(bundle.denoiser.path, bundle.config.sampler, averages.range, averages.length)


def _search_key(bundle: Bundle, averages: Averages, rows: Rows) -> str:
    """12 hex of what decides a measurement: weights, how they are run, rows; not the defaults that they come with."""
    config = asdict(replace(bundle.config, sampler=SamplerDefaults(), provenance={}))
    facts = [FORMAT, averages.sha256(), config, rows.key]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def _register(
    registry: Registry,
    bundle: Bundle,
    averages: Averages,
    chosen: Point,
    run_id: str,
    evaluate: Callable[[Path], dict[str, Any]] | None,
) -> dict[str, Any]:
    """The version with the chosen settings: the model's own where they are unchanged, else a new one."""
    settings, sampler = registry.settings, chosen.settings
    same_weights = chosen.ema_length == averages.length
    if same_weights and sampler == _space(bundle, averages).simplest(bundle.config.sampler):
        return {"version": release.register(settings, bundle.folder).version, "changed": False}
    known = registry.find(bundle.sha256)
    with tempfile.TemporaryDirectory(prefix="animediffusion-") as folder:
        copy = Path(folder) / "bundle"
        # Never the old metrics: they were measured with the old defaults.
        if same_weights:
            sha256 = with_sampler(bundle.folder, copy, sampler, metrics={})
        else:
            sha256 = averages.save(bundle, copy, chosen.ema_length, sampler)
        if evaluate is not None:
            with_metrics(copy, {**evaluate(copy), "model": f"sha256:{sha256[:12]}"})
        version = release.register(settings, copy, run_id=run_id, parent=known.version if known else None)
    return {"version": version.version, "changed": True}


def _record(record: Run, points: list[Point], result: dict[str, Any]) -> None:
    for step, point in enumerate(points):
        record.log({"psnr": point.psnr, "sharpness": point.sharpness, "evaluations": point.evaluations}, step)
    record.set_tags({"best": json.dumps(result["best"]), "front": json.dumps(result["front"])[:4900]})
    for name in ("picture", "strip"):
        record.log_artifact(result[name])
