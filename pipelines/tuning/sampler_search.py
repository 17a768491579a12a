"""`tune sampler`: search for the best sampler settings of a finished model, with Ray Tune and Optuna.

All trials measure the same bundle on the same rows with the same noise, so they differ only in their settings; one
setting is which average of the run's weights the model gets. The two objectives are PSNR and network rows per image;
the result is a Pareto front and one chosen point. Every measurement of these weights on these rows is kept in a trial
log, so a killed search resumes, and a repeated search measures nothing twice. pipelines/tuning/sampler_space.py lists
the settings, pipelines/tuning/optuna_searcher.py runs the trials, and pipelines/tuning/schedule_search.py searches for
training settings.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import optuna
import ray
import torch
from ray import tune

from animediffusion.models.augmentation.augment import Batch
from animediffusion.models.bundle import Bundle, SamplerDefaults, config_values, with_metrics, with_sampler
from animediffusion.models.network.attention import Backend, chosen_attention, use_attention
from animediffusion.models.training.ema import Averages, read_averages
from animediffusion.pipelines.evaluation.evaluate import Evaluation
from animediffusion.pipelines.evaluation.measure import MeasuredRows, Measurement, load_rows, measure
from animediffusion.pipelines.tuning.optuna_searcher import (
    Point,
    SearchConfig,
    Study,
    TrialLog,
    Verdict,
    new_study,
    run_trials,
)
from animediffusion.pipelines.tuning.pareto import Prefer, choose, describe, floor, pareto_front
from animediffusion.pipelines.tuning.sampler_space import SamplerSpace
from animediffusion.platform.cluster import cluster
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import ClusterError, ConfigError, Interrupted

if TYPE_CHECKING:
    from animediffusion.platform.registry.client import Registry
    from animediffusion.platform.tracking.tracking import Run

FORMAT = 1
"""Version of the trial log; it must change when the same settings would be measured differently."""
MOST_TAG_CHARS = 4900
"""MLflow rejects longer tags."""
CONFIRM_DB = 0.05
"""PSNR in dB that a chosen point may lack on unseen rows; these rows cannot resolve smaller differences."""


@dataclass(frozen=True, slots=True)
class UnseenPsnr:
    """PSNR in dB on rows that a search did not see."""

    defaults: float
    """With the model's own settings."""
    best: float
    """With the chosen settings."""


@dataclass(frozen=True, slots=True)
class SamplerResult:
    """Result of `tune sampler`; the field order is that of its JSON."""

    trials: int
    """Number of known measurements, those of earlier searches included."""
    measured: int
    """Number of measurements of this call."""
    defaults: Measurement
    """The model's own settings."""
    best: Measurement
    """The chosen settings."""
    front: tuple[Measurement, ...]
    """The Pareto front, by rising cost."""
    unseen: UnseenPsnr | None
    """None if the split is too small."""
    folder: str
    picture: str
    """Path of the plot of quality against cost."""
    strip: str
    """Path of the rows that points of the front have colored."""
    version: int | None = None
    """Registered version with the chosen settings; None if it was not registered."""
    changed: bool = False
    """Whether the version is a new one."""

    def to_json(self) -> Mapping[str, object]:
        """Return the JSON object that `tune sampler` prints."""
        unregistered = ("version", "changed") if self.version is None else ()
        return {key: value for key, value in asdict(self).items() if key not in unregistered}


@dataclass(frozen=True)
class SamplerTask:
    """Inputs that all trials share; Ray's object store sends them to the workers once."""

    bundle: Bundle
    averages: Averages
    batch: Batch
    """The rows to measure on."""
    attention: Backend = field(default_factory=chosen_attention)


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
    progress: Callable[[str], None] = lambda _line: None,
    evaluate: Callable[[Path], Evaluation] | None = None,
) -> SamplerResult:
    """Search for sampler defaults of a model and register the model with them.

    Args:
        settings: workspace and registry.
        model: bundle folder, URI or models:/ reference.
        data: dataset URI.
        trials: total number of measured settings, including those of earlier searches. The model's own settings are
            measured first.
        minutes: stop after this many minutes.
        prefer: `best` quality, the `knee` of quality against cost, or the `fast`est within 0.2 dB of the defaults.
        register: register the model with the chosen defaults as the next version.
        num_images: number of rows of the split to measure on.
        split: name of the split.
        progress: called with one line after every trial.
        evaluate: measures the new bundle, so that the checks before promotion can compare the version immediately.

    Raises:
        ConfigError: an argument is out of range.
        ClusterError: the defaults could not be measured.
        Interrupted: a signal arrived; the same call resumes.
    """
    # Here, because the processes of the trials need neither MLflow nor matplotlib, which take seconds to import.
    from animediffusion.pipelines.release.checks import check_bundle
    from animediffusion.pipelines.tuning.plots import draw_front
    from animediffusion.platform.registry.client import Registry
    from animediffusion.platform.tracking.tracking import TUNING, Run

    if prefer not in get_args(Prefer):
        raise ConfigError("--prefer", repr(prefer), ", ".join(get_args(Prefer)))
    if trials < 1:
        raise ConfigError("--trials", str(trials), "at least 1")
    rows = load_rows(data, split, num_images)
    registry = Registry(settings)
    bundle = check_bundle(registry.fetch(model, averages=True))
    averages = read_averages(bundle)
    name = f"sampler-{search_key(bundle, averages, rows)}"
    folder = settings.workspace / "tune" / name
    cluster.connect(settings)
    record = Run.start(settings, TUNING, name, {"model": str(model), "data": data, "trials": trials, "prefer": prefer})
    try:
        known = len(read_points(folder))
        points = search(bundle, averages, rows.searched, folder, SearchConfig(trials, minutes, progress))
        conclusion = _conclude(bundle, averages, rows, points, prefer, progress)
        picture, strip = folder / "front.png", folder / "strip.png"
        picture.write_bytes(draw_front(points, conclusion.chosen))
        strip.write_bytes(conclusion.strip)
        result = SamplerResult(
            trials=len(points),
            measured=len(points) - known,
            defaults=points[0],
            best=conclusion.chosen,
            front=tuple(pareto_front(points)),
            unseen=conclusion.unseen,
            folder=str(folder),
            picture=str(picture),
            strip=str(strip),
        )
        _record(record, points, result)
        if register:
            version, changed = register_choice(registry, bundle, averages, conclusion.chosen, record.run_id, evaluate)
            result = replace(result, version=version, changed=changed)
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
    config: SearchConfig,
    seed: int = 0,
) -> list[Measurement]:
    """Measure one trial per device in parallel until enough points are known, and return them, defaults first.

    `seed` seeds Optuna. The order in which parallel trials end also affects what Optuna suggests.
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
    device, at_once = trial_device()
    run_trials(
        folder.name,
        tune.with_resources(tune.with_parameters(trial, task=SamplerTask(bundle, averages, batch)), {device: 1}),
        study,
        # A model that was tuned before may have all points known except its new defaults.
        replace(config, trials=max(config.trials, study.num_known + (not known))),
        at_once=at_once,
        folder=folder,
        callback=_TrialProgress(config, study),
        reuse=True,
    )
    points = read_points(folder)
    first = next((point for point in points if (point.settings, point.ema_length) == own), None)
    if first is None:
        raise ClusterError("tune sampler", "the model's defaults were not measured", "raise --minutes")
    return [first, *(point for point in points if point is not first)]


def trial_device() -> tuple[str, int]:
    """Return the resource that each trial takes, GPU if the cluster has or can add one, else CPU, and their number."""
    available, limits = cluster.resources()
    name = "GPU" if limits.get("GPU", 0) >= 1 else "CPU"
    return name, max(1, int(available.get(name, 0)))


def _optuna_sampler(seed: int) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)


def read_points(folder: Path) -> list[Measurement]:
    """Return all measurements in the trial log of a search's folder, in their order."""
    entries = TrialLog(folder / "points.jsonl").read()
    return [Measurement.of(entry.details["measured"]) for entry in entries if "measured" in entry.details]


@dataclass(frozen=True, slots=True)
class _Conclusion:
    """What follows from the measurements of a search."""

    chosen: Measurement
    unseen: UnseenPsnr | None
    strip: bytes
    """PNG of rows that points of the front have colored."""


def _conclude(
    bundle: Bundle,
    averages: Averages,
    rows: MeasuredRows,
    points: list[Measurement],
    prefer: Prefer,
    warn: Callable[[str], None],
) -> _Conclusion:
    """Choose a point and draw the strip on the kind of device that measured the trials; the driver may have no GPU."""
    if trial_device()[0] == "CPU":
        return _conclude_here(chosen_attention(), bundle, averages, rows, points, prefer)
    with cluster.waits(warn):
        task = ray.remote(num_gpus=1)(_conclude_here).remote(chosen_attention(), bundle, averages, rows, points, prefer)
        conclusion: _Conclusion = ray.get(task)
    return conclusion


def _conclude_here(
    attention: Backend,
    bundle: Bundle,
    averages: Averages,
    rows: MeasuredRows,
    points: list[Measurement],
    prefer: Prefer,
) -> _Conclusion:
    use_attention(attention)
    bundle.denoiser.to("cuda" if torch.cuda.is_available() else "cpu")
    chosen, unseen = confirm(bundle, averages, rows, points, prefer)
    from animediffusion.pipelines.tuning.plots import draw_strip

    return _Conclusion(chosen, unseen, draw_strip(bundle, averages, rows.searched, pareto_front(points), chosen))


def confirm(
    bundle: Bundle, averages: Averages, rows: MeasuredRows, points: list[Measurement], prefer: Prefer
) -> tuple[Measurement, UnseenPsnr | None]:
    """Return the point to use, and the PSNR of that point and the defaults on rows that the search did not see.

    A point that is too much worse than the defaults on those rows was good by chance; the next best replaces it.
    """
    defaults = points[0]
    if rows.unseen is None:
        return choose(points, prefer), None
    unseen = SamplerTask(bundle, averages, rows.unseen)
    own = measure_point(unseen, defaults.settings, defaults.ema_length).psnr
    while True:
        chosen = choose(points, prefer)
        same = chosen == defaults
        found = own if same else measure_point(unseen, chosen.settings, chosen.ema_length).psnr
        if same or found >= floor(own, prefer) - CONFIRM_DB:
            return chosen, UnseenPsnr(own, found)
        points = [point for point in points if point != chosen]


def trial(point: Point, *, task: SamplerTask) -> None:
    """Measure one trial, in a worker process that later trials reuse."""
    use_attention(task.attention)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    task.bundle.denoiser.to(device)
    sampler = SamplerDefaults(**{key: value for key, value in point.items() if key != "ema_length"})
    tune.report({"measured": json.dumps(asdict(measure_point(task, sampler, point.get("ema_length"))))})


def measure_point(task: SamplerTask, sampler: SamplerDefaults, length: float | None) -> Measurement:
    """Measure sampler settings with the average of this length as the weights; None is the trained weights."""
    return measure(task.averages.use(task.bundle, length), task.batch, sampler, length)


def _judge(trial_id: str, result: Mapping[str, Any]) -> Verdict | None:  # noqa: ARG001
    if "measured" not in result:
        return None
    measured = json.loads(result["measured"])
    return Verdict([measured["psnr"], measured["evaluations"]], {"measured": measured})


class _TrialProgress(tune.Callback):
    """Tune callback that reports every trial, finished or failed."""

    def __init__(self, config: SearchConfig, study: Study) -> None:
        self._config, self._study = config, study

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        if "measured" in trial.last_result:
            self._report(describe(Measurement.of(json.loads(trial.last_result["measured"]))))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        self._report(f"{trial.config} failed")

    def _report(self, line: str) -> None:
        self._config.progress(f"trial {self._study.num_known}/{self._config.trials}  {line}")


def _space(bundle: Bundle, averages: Averages) -> SamplerSpace:
    return SamplerSpace(bundle.denoiser.path, bundle.config.sampler, averages.range, averages.length)


def search_key(bundle: Bundle, averages: Averages, rows: MeasuredRows) -> str:
    """Return 12 hex digits that identify what decides a measurement: weights, config and rows, not sampler defaults."""
    config = config_values(replace(bundle.config, sampler=SamplerDefaults(), provenance={}))
    del config["format"]  # searches of version 0.1 had none
    facts = [FORMAT, averages.sha256(), config, rows.key]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def register_choice(
    registry: Registry,
    bundle: Bundle,
    averages: Averages,
    chosen: Measurement,
    run_id: str,
    evaluate: Callable[[Path], Evaluation] | None,
) -> tuple[int, bool]:
    """Register the model itself if the chosen settings are its own, else a copy with them as a new version.

    Returns the version, and whether it is a new one.
    """
    from animediffusion.pipelines.release import release

    settings, sampler = registry.settings, chosen.settings
    same_weights = chosen.ema_length == averages.length
    if same_weights and sampler == _space(bundle, averages).simplest(bundle.config.sampler):
        return release.register(settings, bundle.folder).version, False
    known = registry.find(bundle.sha256)
    with tempfile.TemporaryDirectory(prefix="animediffusion-") as folder:
        copy = Path(folder) / "bundle"
        # Do not copy the old metrics: they were measured with the old defaults.
        if same_weights:
            sha256 = with_sampler(bundle.folder, copy, sampler, metrics={})
        else:
            sha256 = averages.save(bundle, copy, chosen.ema_length, sampler)
        if evaluate is not None:
            with_metrics(copy, replace(evaluate(copy), model=f"sha256:{sha256[:12]}").to_json())
        version = release.register(settings, copy, run_id=run_id, parent=known.version if known else None)
    return version.version, True


def _record(record: Run, points: list[Measurement], result: SamplerResult) -> None:
    for step, point in enumerate(points):
        record.log({"psnr": point.psnr, "sharpness": point.sharpness, "evaluations": point.evaluations}, step)
    front = json.dumps([asdict(point) for point in result.front])
    record.set_tags({"best": json.dumps(asdict(result.best)), "front": front[:MOST_TAG_CHARS]})
    record.log_artifact(result.picture)
    record.log_artifact(result.strip)
