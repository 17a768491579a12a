"""The results of commands as text for people: one function for each kind of result.

The commands print this text without --json. src/animediffusion/console.py formats tables and facts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from animediffusion.console import cell, facts, table

if TYPE_CHECKING:
    from animediffusion.pipelines.evaluation.evaluate import Evaluation
    from animediffusion.pipelines.evaluation.measure import Measurement
    from animediffusion.pipelines.evaluation.metrics import ColorScores
    from animediffusion.pipelines.evaluation.native import NativeEvaluation
    from animediffusion.pipelines.release.compare import Comparison
    from animediffusion.pipelines.release.correction_rate import CanaryVerdict
    from animediffusion.pipelines.training.result import TrainResult
    from animediffusion.pipelines.tuning.sampler_search import SamplerResult
    from animediffusion.pipelines.tuning.schedule_search import ScheduleResult


def evaluation(result: Evaluation) -> str:
    """Format the table of `evaluate`: the model and the baselines on both tracks."""
    rows = [{"": "model", **_scores(result.tracks)}]
    rows += [{"": name, **_scores(tracks)} for name, tracks in result.baselines.items()]
    head = (
        f"{result.num_images} images of {result.data} ({result.split}, {result.image_size} px), "
        f"{result.sampler.describe()}"
    )
    picture = f"\npicture: {result.grid}" if result.grid is not None else ""
    return f"{head}\n{table(rows)}{picture}"


def native_evaluation(result: NativeEvaluation) -> str:
    """Format the table of `evaluate --native`: the model and the baselines on both tracks."""
    rows = [{"": "model", **_color_scores(result.tracks)}]
    rows += [{"": name, **_color_scores(tracks)} for name, tracks in result.baselines.items()]
    head = (
        f"{result.num_images} images of {result.data} ({result.split}, {result.image_size} px), style {result.style}, "
        f"off the lines"
    )
    picture = f"\npicture: {result.grid}" if result.grid is not None else ""
    return f"{head}\n{table(rows)}{picture}"


def training(result: TrainResult) -> str:
    """Format the summary of `train`: facts, and a line for each checkpoint that has a score."""
    about = facts({key: value for key, value in result.to_json().items() if key != "scores"})
    rows = [
        {"checkpoint": step, **_scores({"cross": score}), "PSNR same": f"{score.psnr_same:.2f}"}
        for step, score in result.scores.items()
    ]
    return f"{about}\n\n{table(rows)}" if rows else about


def sampler_search(result: SamplerResult) -> str:
    """Format the result of `tune sampler`: the Pareto front by rising cost, with the defaults and the choice."""
    points = result.front if result.defaults in result.front else (result.defaults, *result.front)
    rows = [_measurement(point, result) for point in points]
    about: dict[str, object] = {"trials": result.trials, "measured": result.measured}
    if result.version is not None:
        about |= {"version": result.version, "changed": result.changed}
    about |= {"picture": result.picture, "strip": result.strip}
    if (unseen := result.unseen) is not None:
        about["PSNR on unseen rows"] = f"choice {unseen.best:.2f}, defaults {unseen.defaults:.2f}"
    return f"{table(rows)}\n\n{facts(about)}"


def schedule_search(result: ScheduleResult) -> str:
    """Format the result of `tune schedule`: the best trial at each rung, how the trials ended, and the recipe."""
    rows = [
        {
            "steps": rung.steps,
            "trials": rung.trials,
            "best PSNR": f"{rung.psnr:.2f}",
            "base recipe": "-" if rung.base_psnr is None else f"{rung.base_psnr:.2f}",
        }
        for rung in result.front
    ]
    ends = (
        f"{result.trials} trials: {result.finished} finished, {result.stopped_early} stopped early, "
        f"{result.failed} failed, {result.cut} ended by the time limit"
    )
    return f"{table(rows)}\n\n{ends}\n{facts({'best': result.best.to_json(), 'recipe': result.recipe})}"


def canary(found: CanaryVerdict) -> str:
    """Format the output of `models canary` without PERCENT: the split, the counts and the decision."""
    split = (
        f"{found.percent} % of the requests go to version {found.challenger}, {100 - found.percent} % to version "
        f"{found.champion}, since {found.since}"
    )
    return f"{split}\n{found.decision}: {found.why}"


def version(found: Mapping[str, Any]) -> str:
    """Format the output of `models show`: facts, ancestors, metrics, history and configuration of a version."""
    tags, made = found["tags"], found["training"]
    aliases = f" ({', '.join(found['aliases'])})" if found["aliases"] else ""
    steps = made.get("steps")
    rows = "" if steps is None else f", {steps} step{'s' * (steps != 1)} of {made.get('batch_size', '?')} images"
    about = {
        "sha256": found["sha256"],
        "created": found["created"],
        "made": found["lineage"][0]["made"],
        "training": f"{made.get('run', '-')}, recipe {made.get('recipe', '-')}{rows}",
        "MLflow run": found["run"],
        "data": f"{found['dataset']['uri'] or '-'}, hash {(found['dataset']['hash'] or '-')[:12]}",
        "network": f"{int(tags.get('num_parameters', 0)) / 1e6:.1f} M parameters, {tags.get('image_size')} px",
        "path": f"{tags.get('path')}, predicts {tags.get('prediction')}",
        "sampler": tags.get("sampler"),
        "samples": found["samples"],
    }
    parts = [f"version {found['version']} of {found['name']}{aliases}\n{facts(about)}"]
    ancestors = [
        {**one, "metrics": {k: v for k, v in one["metrics"].items() if k.endswith("psnr")}} for one in found["lineage"]
    ]
    parts.append(f"ancestors\n{table(ancestors)}")
    parts.append(f"metrics\n{table(_evaluation_rows(found['evaluations']), 'not evaluated')}")
    events = [_without(event, "metrics") for event in found["history"]]
    parts.append(f"history\n{table(events, 'never promoted')}")
    if found["config"]:
        groups = {key: cell(value) for key, value in found["config"].items()}
        parts.append(f"configuration of the training run\n{facts(groups)}")
    return "\n\n".join(parts)


def comparison(found: Comparison) -> str:
    """Format the output of `models compare`: one line per metric with the better version."""
    a, b = (version.version for version in found.versions)
    rows = [
        {
            "data": f"{str(row.data_hash)[:12]} {row.split}, {row.num_images} images",
            "track": row.track,
            "metric": row.metric,
            f"version {a}": row.a,
            f"version {b}": row.b,
            "difference": None if row.difference is None else f"{row.difference:+.4g}",
            "better": row.better,
        }
        for row in found.metrics
    ]
    heads = [f"version {v.version}: {v.tags.get('sampler')}, sha256 {v.sha256[:12]}" for v in found.versions]
    text = table(rows, "neither was evaluated; run `animediffusion evaluate models:/... DATA`")
    return "\n".join([*heads, "", text, "", f"picture: {found.picture}"])


def _evaluation_rows(evaluations: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
    """Return a row for each track of each evaluation (checks.evaluation_line), with a column for each metric."""
    rows: list[dict[str, object]] = []
    for found in evaluations:
        numbers = {key: value for key, value in found.items() if "." in key}
        for track in dict.fromkeys(key.partition(".")[0] for key in numbers):
            where = f"{str(found['data_hash'])[:12]} {found['split']}, {found['num_images']} images"
            own = {key.partition(".")[2]: v for key, v in numbers.items() if key.startswith(f"{track}.")}
            rows.append({"data": where, "track": track, **own})
    names = list(dict.fromkeys(key for row in rows for key in row))
    return [{name: row.get(name) for name in names} for row in rows]


def _without(values: Mapping[str, Any], name: str) -> dict[str, object]:
    return {key: value for key, value in values.items() if key != name}


def _measurement(point: Measurement, result: SamplerResult) -> Mapping[str, object]:
    """Return the row of a measurement."""
    role = "choice" if point == result.best else "defaults" if point == result.defaults else ""
    return {
        "": role,
        "rows/image": point.evaluations,
        "PSNR": f"{point.psnr:.2f}",
        "sharpness": f"{point.sharpness:.2f}",
        "sampler": point.sampler,
        "steps": point.steps,
        "shift": point.shift,
        "guidance_scale": point.guidance_scale,
        "interval": "-" if point.guidance_scale == 1 else "{:g} to {:g}".format(*point.guidance_interval),
        "average": "trained" if point.ema_length is None else f"{point.ema_length:.0%} of the run",
    }


class _Scores(Protocol):
    """The metrics that tables show."""

    @property
    def psnr(self) -> float: ...
    @property
    def ssim(self) -> float: ...
    @property
    def ciede2000(self) -> float: ...


def _color_scores(tracks: Mapping[str, ColorScores]) -> dict[str, str]:
    """Return the columns of each track's color scores."""
    row: dict[str, str] = {}
    for track, scores in tracks.items():
        row |= {
            f"dE00 {track}": f"{scores.ciede2000:.2f}",
            f"within 3 {track}": f"{scores.within_3:.2f}",
            f"within 6 {track}": f"{scores.within_6:.2f}",
        }
    return row


def _scores(tracks: Mapping[str, _Scores]) -> dict[str, str]:
    """Return the columns of each track's scores."""
    row: dict[str, str] = {}
    for track, scores in tracks.items():
        row |= {
            f"PSNR {track}": f"{scores.psnr:.2f}",
            f"SSIM {track}": f"{scores.ssim:.3f}",
            f"dE00 {track}": f"{scores.ciede2000:.2f}",
        }
    return row
