"""Output of commands: progress bars on a terminal, plain lines elsewhere, and one JSON object at the end with --json.

Progress and notes go to stderr, results to stdout. src/animediffusion/reports.py formats the results of the commands.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from animediffusion.platform.errors import one_line

if TYPE_CHECKING:
    from animediffusion.pipelines.training.reporting import TrainProgress

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
            rejects = f", {rejected} rejected" if rejected else ""
            return f"{what} {done}/{total} {unit}, {rate:.{0 if rate >= 10 else 1}f} {unit}/s{rejects}"

        with self._bar(what) as move:
            yield lambda done, total, rejected=0: move(done, total, line(done, total, rejected))

    @contextmanager
    def training(self) -> Iterator[Callable[[TrainProgress], None]]:
        """Yield a function that shows the state of a run, and each of its warnings once."""
        with self._bar("training") as move:
            shown = 0

            def report(now: TrainProgress) -> None:
                nonlocal shown
                for line in now.warnings[shown:]:
                    self.note(f"warning: {line}")
                shown = len(now.warnings)
                move(now.step, now.max_steps, training_line(now))

            yield report

    @contextmanager
    def _bar(self, what: str) -> Iterator[Callable[[int, int | None, str], None]]:
        """Yield a function (done, total, line) that moves a bar or prints lines; `total` is None if it is unknown."""
        if not self.terminal:
            yield _plain()
            return
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (BarColumn(bar_width=30), TextColumn("{task.description}"))
        with Progress(*columns, console=RichConsole(stderr=True), transient=False) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total, line: bar.update(task, completed=done, total=total, description=line)


def _print(text: str, stream: TextIO) -> None:
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:  # a full disk is not named by the system
        raise OSError(error.errno, error.strerror, "standard output") from error


def training_line(now: TrainProgress) -> str:
    """Format the state of a run as one line.

    step 40/200  loss 0.0812  75 images/s  data wait 1%  best dE00 5.91 at 20  ETA 1:20
    """
    parts = [f"step {now.step}/{now.max_steps}" if now.max_steps is not None else f"step {now.step}"]
    if (metrics := now.metrics) is not None:
        parts.append(f"loss {metrics.loss:.4f}")
        parts.append(f"{metrics.images_per_s:.0f} images/s")
        parts.append(f"data wait {metrics.data_wait:.0%}")
    if now.best_score is not None:
        parts.append(f"best dE00 {now.best_score.ciede2000:.2f} at {now.best_step}")
    if now.max_steps is not None and metrics is not None:
        left_s = int((now.max_steps - now.step) * metrics.seconds_per_step)
        parts.append(f"ETA {left_s // 60}:{left_s % 60:02d}")
    return "  ".join(parts)


def _plain() -> Callable[[int, int | None, str], None]:
    shown = float("-inf")

    def move(done: int, total: int | None, line: str) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown >= PLAIN_EVERY_S or (total is not None and done >= total):
            shown = now
            print(line, file=sys.stderr, flush=True)

    return move


def facts(values: Mapping[str, Any]) -> str:
    """Format values as lines of `name   value`; the names of nested values are dotted."""
    flat = dict(_flat(values))
    width = max((len(key) for key in flat), default=0)
    return "\n".join(f"{key:{width}}  {value}" for key, value in flat.items())


def table(rows: Sequence[Mapping[str, Any]], empty: str = "") -> str:
    """Format rows as aligned columns, with the keys of the first row as names; return `empty` if there are no rows."""
    if not rows:
        return empty
    names = list(rows[0])
    cells = [names, *([one_line(cell(row.get(name))) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join(
        "  ".join(f"{text:{width}}" for text, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for number, item in enumerate(value):
                yield f"{prefix}{key}[{number}]", ", ".join(f"{k} {v}" for k, v in _flat(item))
        else:
            yield f"{prefix}{key}", cell(value)


def cell(value: Any) -> str:
    """Format one value in a line: `-` for an empty one, four digits of a float, nested values by commas."""
    if value is None or value == [] or value == {}:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {cell(item)}" for key, item in _flat(value))
    if isinstance(value, list | tuple):
        return ", ".join(cell(item) for item in value)
    return str(value)
