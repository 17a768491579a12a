"""Output of commands: progress bars on a terminal, plain lines elsewhere, and one JSON object at the end with --json.

Progress and notes go to stderr, results to stdout.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from animediffusion.platform.errors import one_line

PLAIN_EVERY_S = 5.0
"""Seconds between two plain progress lines."""


class Console:
    """Output of one command.

    Args:
        as_json: print the result as JSON in the last line of stdout.
    """

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self.terminal = sys.stderr.isatty()

    def say(self, line: str) -> None:
        """Print a line of the result; with `as_json` it goes to stderr."""
        _print(line, sys.stderr if self.as_json else sys.stdout)

    def note(self, line: str) -> None:
        """Print a note to stderr while the command runs; a line end in a file's name does not end the line."""
        print(one_line(line), file=sys.stderr, flush=True)

    def result(self, value: Any, text: str) -> None:
        """Print the final result: `value` as JSON if `as_json`, else `text`."""
        _print(json.dumps(value, default=str) if self.as_json else text, sys.stdout)

    @contextmanager
    def progress(self, what: str, unit: str) -> Iterator[Callable[..., None]]:
        """Yield a function (done, total, rejected=0) that moves a progress bar; the rate counts from its first call."""
        began: list[tuple[float, int]] = []

        def line(done: int, total: int, rejected: int) -> str:
            if not began:
                began.append((time.monotonic(), done))
            started, before = began[0]
            rate = (done - before) / max(time.monotonic() - started, 1e-6)
            aside = f", {rejected} rejected" if rejected else ""
            return f"{what} {done}/{total} {unit}, {rate:.{0 if rate >= 10 else 1}f} {unit}/s{aside}"

        with self._bar(what) as move:
            yield lambda done, total, rejected=0: move(done, total, line(done, total, rejected))

    @contextmanager
    def training(self) -> Iterator[Callable[[Mapping[str, Any]], None]]:
        """Yield a function that shows a training report (pipelines/training/driver.py)."""
        with self._bar("training") as move:
            shown = 0

            def report(now: Mapping[str, Any]) -> None:
                nonlocal shown
                lines = now.get("warnings", [])
                for line in lines[shown:]:
                    self.note(f"warning: {line}")
                shown = len(lines)
                step = int(now.get("step", 0))
                last = int(now.get("max_steps", 0))
                move(step, last if last < 1 << 40 else 0, training_line(now))

            yield report

    @contextmanager
    def _bar(self, what: str) -> Iterator[Callable[[int, int, str], None]]:
        if not self.terminal:
            yield _plain()
            return
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (BarColumn(bar_width=30), TextColumn("{task.description}"))
        with Progress(*columns, console=RichConsole(stderr=True), transient=False) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total, line: bar.update(task, completed=done, total=total or None, description=line)

    def facts(self, values: Mapping[str, Any]) -> str:
        """Format values as lines of `name   value`; the names of nested values are dotted."""
        flat = dict(_flat(values))
        width = max((len(key) for key in flat), default=0)
        return "\n".join(f"{key:{width}}  {value}" for key, value in flat.items())

    def table(self, rows: Sequence[Mapping[str, Any]], empty: str) -> str:
        """Format rows as aligned columns; return `empty` if there are no rows."""
        if not rows:
            return empty
        names = list(rows[0])
        cells = [names, *([one_line(_cell(row.get(name))) for name in names] for row in rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
        return "\n".join(
            "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
        )

    def metrics(self, result: Mapping[str, Any]) -> str:
        """Format the table of `evaluate`: the model and the baselines on both tracks."""
        rows = [{"": "model", **_columns(result["tracks"])}]
        rows += [{"": name, **_columns(tracks)} for name, tracks in result["baselines"].items()]
        sampler = result["sampler"]
        head = (
            f"{result['num_images']} images of {result['data']} ({result['split']}, {result['image_size']} px), "
            f"{sampler['name']} {sampler['steps']} steps, guidance {sampler['guidance_scale']:g}"
        )
        tail = f"\npicture: {result['grid']}" if result["grid"] else ""
        return f"{head}\n{self.table(rows, '')}{tail}"

    def version(self, found: Mapping[str, Any]) -> str:
        """Format the output of `models show`: facts, ancestors, metrics, history and configuration of a version."""
        tags, made = found["tags"], found["training"]
        aliases = f" ({', '.join(found['aliases'])})" if found["aliases"] else ""
        steps = f", {made['steps']} steps of {made.get('batch_size', '?')} images" if "steps" in made else ""
        facts = {
            "sha256": found["sha256"],
            "created": found["created"],
            "made": found["lineage"][0]["made"],
            "training": f"{made.get('run', '-')}, recipe {made.get('recipe', '-')}{steps}",
            "MLflow run": found["run"],
            "data": f"{found['dataset']['uri'] or '-'}, hash {(found['dataset']['hash'] or '-')[:12]}",
            "network": f"{int(tags.get('num_parameters', 0)) / 1e6:.1f} M parameters, {tags.get('image_size')} px",
            "path": f"{tags.get('path')}, predicts {tags.get('prediction')}",
            "sampler": tags.get("sampler"),
            "samples": found["samples"],
        }
        parts = [f"version {found['version']} of {found['name']}{aliases}\n{self.facts(facts)}"]
        ancestors = [
            {**one, "metrics": {k: v for k, v in one["metrics"].items() if k.endswith("psnr")}}
            for one in found["lineage"]
        ]
        parts.append(f"from\n{self.table(ancestors, '')}")
        parts.append(f"metrics\n{self.table(_evaluation_rows(found['evaluations']), 'not evaluated')}")
        events = [_without(event, "metrics") for event in found["history"]]
        parts.append(f"history\n{self.table(events, 'never promoted')}")
        if found["config"]:
            groups = {key: _cell(value) for key, value in found["config"].items()}
            parts.append(f"configuration of the training run\n{self.facts(groups)}")
        return "\n\n".join(parts)

    def comparison(self, found: Mapping[str, Any]) -> str:
        """Format the output of `models compare`: one line per metric with the better version."""
        a, b = (version["version"] for version in found["versions"])
        rows = [
            {
                "data": f"{str(row['data_hash'])[:12]} {row['split']}, {row['num_images']} images",
                "track": row["track"],
                "metric": row["metric"],
                f"version {a}": row["a"],
                f"version {b}": row["b"],
                "difference": row["difference"] if row["difference"] is None else f"{row['difference']:+.4g}",
                "better": row["better"],
            }
            for row in found["metrics"]
        ]
        heads = [f"version {v['version']}: {v['sampler']}, sha256 {v['sha256'][:12]}" for v in found["versions"]]
        table = self.table(rows, "neither was evaluated; run `animediffusion evaluate models:/... DATA`")
        return "\n".join([*heads, "", table, "", f"picture: {found['picture']}"])

    def front(self, result: Mapping[str, Any]) -> str:
        """Format the table of `tune sampler`: the Pareto front by rising cost, with the defaults and the choice."""
        own, best = result["defaults"], result["best"]
        rows = [
            {
                "": "choice" if point == best else "defaults" if point == own else "",
                "rows/image": point["evaluations"],
                "PSNR": f"{point['psnr']:.2f}",
                "sharpness": f"{point['sharpness']:.2f}",
                **{key: point[key] for key in ("sampler", "steps", "shift", "guidance_scale")},
                "interval": "-" if point["guidance_scale"] == 1 else "{:g} to {:g}".format(*point["guidance_interval"]),
                "average": "trained" if point["ema_length"] is None else f"{point['ema_length']:.0%} of the run",
            }
            for point in [*([] if own in result["front"] else [own]), *result["front"]]
        ]
        keys = ("trials", "measured", "version", "changed", "picture", "strip")
        facts = {key: result[key] for key in keys if key in result}
        if result["unseen"]:
            facts["PSNR on unseen rows"] = "choice {best:.2f}, defaults {defaults:.2f}".format(**result["unseen"])
        return f"{self.table(rows, '')}\n\n{self.facts(facts)}"

    def schedule(self, result: Mapping[str, Any]) -> str:
        """Format the result of `tune schedule`: the best trial at each rung, how the trials ended, and the recipe."""
        rows = [
            {
                "steps": rung["steps"],
                "trials": rung["trials"],
                "best PSNR": f"{rung['psnr']:.2f}",
                "began with": "-" if rung["base_psnr"] is None else f"{rung['base_psnr']:.2f}",
            }
            for rung in result["front"]
        ]
        ends = (
            f"{result['trials']} trials: {result['finished']} to the end, {result['stopped_early']} stopped early, "
            f"{result['failed']} failed, {result['cut']} cut by the clock"
        )
        facts = self.facts({"best": result["best"], "recipe": result["recipe"]})
        return f"{self.table(rows, '')}\n\n{ends}\n{facts}"

    def run(self, result: Mapping[str, Any]) -> str:
        """Format the summary of `train`: facts, and a line for each checkpoint that has a score."""
        facts = self.facts({key: value for key, value in result.items() if key != "scores"})
        rows = [
            {"checkpoint": step, **_columns({"cross": score}), "PSNR same": f"{score['psnr_same']:.2f}"}
            for step, score in result.get("scores", {}).items()
        ]
        return f"{facts}\n\n{self.table(rows, '')}" if rows else facts


def _print(text: str, stream: TextIO) -> None:
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:  # a full disk is not named by the system
        raise OSError(error.errno, error.strerror, "standard output") from error


def training_line(now: Mapping[str, Any]) -> str:
    """Format a training report as one line.

    step 40/200  loss 0.0812  75 images/s  data wait 1%  best dE00 5.91 at 20  ETA 1:20
    """
    step, last = int(now.get("step", 0)), int(now.get("max_steps", 0))
    parts = [f"step {step}/{last}" if last < 1 << 40 else f"step {step}"]
    if "loss" in now:
        parts += [f"loss {now['loss']:.4f}", f"{now['images_per_s']:.0f} images/s", f"data wait {now['data_wait']:.0%}"]
    if now.get("best_score"):
        parts.append(f"best dE00 {now['best_score']['ciede2000']:.2f} at {now['best_step']}")
    if last < 1 << 40 and step:
        per_step = now.get("seconds_per_step", 0.0)
        left = int((last - step) * per_step)
        parts.append(f"ETA {left // 60}:{left % 60:02d}")
    return "  ".join(parts)


def _plain() -> Callable[[int, int, str], None]:
    shown = [float("-inf")]

    def move(done: int, total: int, line: str) -> None:
        now = time.monotonic()
        if now - shown[0] >= PLAIN_EVERY_S or (total and done >= total):
            shown[0] = now
            print(line, file=sys.stderr, flush=True)

    return move


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for number, item in enumerate(value):
                yield f"{prefix}{key}[{number}]", ", ".join(f"{k} {v}" for k, v in _flat(item))
        else:
            yield f"{prefix}{key}", _cell(value)


def _cell(value: Any) -> str:
    if value is None or value == [] or value == {}:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_cell(item)}" for key, item in _flat(value))
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item) for item in value)
    return str(value)


def _evaluation_rows(evaluations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each track of each evaluation (checks.evaluation_line), with a column for each metric."""
    rows: list[dict[str, Any]] = []
    for found in evaluations:
        numbers = {key: value for key, value in found.items() if "." in key}
        for track in dict.fromkeys(key.partition(".")[0] for key in numbers):
            where = f"{str(found['data_hash'])[:12]} {found['split']}, {found['num_images']} images"
            own = {key.partition(".")[2]: v for key, v in numbers.items() if key.startswith(f"{track}.")}
            rows.append({"data": where, "track": track, **own})
    names = list(dict.fromkeys(key for row in rows for key in row))
    return [{name: row.get(name) for name in names} for row in rows]


def _without(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


def _columns(tracks: Mapping[str, Mapping[str, float | None]]) -> dict[str, str]:
    names = (("psnr", "PSNR", ".2f"), ("ssim", "SSIM", ".3f"), ("ciede2000", "dE00", ".2f"))
    return {
        f"{title} {track}": f"{values[key]:{form}}" for track, values in tracks.items() for key, title, form in names
    }
