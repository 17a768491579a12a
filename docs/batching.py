"""Draw the diagram of the running batch in docs/serving.md from a trace of a real engine.

    python docs/batching.py [--model BUNDLE] [--out docs/images]

Without --model a small untrained network is used, because the schedule of the requests does not depend on the network.
The script itself runs each engine step (one evaluation of the batch), and requests arrive at fixed steps, so the
diagram is the same on every machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pictures import EDGE, FAINT, INK, PAPER, Array, Board, save
from PIL import ImageDraw

from animediffusion.models.bundle import Bundle, BundleConfig, load_bundle
from animediffusion.models.network.unet import UNetConfig
from animediffusion.models.sampler_options import SamplerOptions
from animediffusion.serve.engine.engine import Engine, EngineStep, Request

SEED = 3
MAX_BATCH = 8
STEPS = (4, 8, 16, 25)
KEYS = {"studio": (58, 116, 168), "page": (206, 110, 52), "batch job": (96, 140, 84)}
"""Clients and their colors in the diagram."""
LEAVES = 6
"""Index of the request whose client leaves, LEAVES_AFTER engine steps after the request started."""
LEAVES_AFTER = 5

STEP, BAR, GAP = 15, 11, 4
"""Pixels: width of an engine step, height of a bar, gap between bars."""
LEFT, STRIP = 128, 84
"""Pixels: width of the names at the left, height of the chart at the bottom."""


@dataclass
class Asked:
    """A request, with its times in engine steps."""

    key: str
    steps: int
    guided: bool
    came: int
    started: int | None = None
    ended: int | None = None
    left: bool = False


def pattern() -> list[Asked]:
    """Return requests of a batch job, which arrive all at the start, and of two clients that send one now and then."""
    draw = np.random.default_rng(SEED)
    asked = [Asked("batch job", int(draw.choice(STEPS)), False, 0) for _ in range(12)]
    asked += [
        Asked("studio", int(draw.choice(STEPS)), bool(draw.random() < 0.4), came) for came in (2, 3, 9, 12, 22, 30)
    ]
    asked += [Asked("page", int(draw.choice(STEPS[:2])), False, came) for came in (5, 14, 19, 23, 27, 33)]
    return sorted(asked, key=lambda one: one.came)


def trace(bundle: Bundle, asked: Sequence[Asked]) -> list[EngineStep]:
    """Run the requests, record when each started and ended, and return the engine's steps."""
    steps: list[EngineStep] = []
    engine = Engine(bundle, max_batch=MAX_BATCH, own_thread=False, on_step=steps.append)
    coming, futures = list(asked), list[Future[Any]]()
    while coming or engine.num_running or engine.num_waiting:
        while coming and coming[0].came <= len(steps):
            futures.append(engine.submit(_request(bundle, coming.pop(0), len(futures))))
        if not engine.step():
            raise RuntimeError("nothing runs, but requests are still to come: let them come closer together")
        running = asked[LEAVES]
        running.started = running.started or next((step.number for step in steps if LEAVES in step.running), None)
        if running.started is not None and len(steps) == running.started + LEAVES_AFTER - 1:
            running.left = futures[LEAVES].cancel()
    for number, one in enumerate(asked):
        ran = [step.number for step in steps if number in step.running]
        one.started, one.ended = ran[0], ran[-1]
    return steps


def _request(bundle: Bundle, asked: Asked, seed: int) -> Request:
    size, generator = bundle.config.image_size, torch.Generator().manual_seed(seed)
    sketch, reference = (torch.rand(channels, size, size, generator=generator) * 2 - 1 for channels in (1, 3))
    scale = 2.0 if asked.guided else 1.0
    return Request(
        sketch=sketch,
        references=(reference,),
        options=SamplerOptions(seed=seed, steps=asked.steps, sampler="euler", guidance_scale=scale),
        key=asked.key,
    )


def draw(asked: Sequence[Asked], steps: Sequence[EngineStep]) -> Array:
    """Draw the requests as bars over engine steps, and below them the number of network rows in each engine step."""
    width = LEFT + STEP * len(steps) + 2 * EDGE
    bars = len(asked) * (BAR + GAP)
    top = EDGE + 56
    board = Board(width, top + bars + 26 + STRIP + 44)
    _legend(board)
    for step in range(0, len(steps) + 1, 10):
        board.lines([(_x(step), top - 4), (_x(step), top + bars + 26 + STRIP)], FAINT, 0.5)
        board.text(str(step), _x(step), top + bars + 12, 12)
    for number, one in enumerate(asked):
        _bar(board, one, top + number * (BAR + GAP))
    _rows(board, steps, top + bars + 26)
    board.text("engine steps", _x(len(steps) / 2), top + bars + 26 + STRIP + 24)
    return board.array()


def _x(step: float) -> float:
    return LEFT + EDGE + STEP * step


def _bar(board: Board, asked: Asked, y: int) -> None:
    assert asked.started is not None
    assert asked.ended is not None
    color = KEYS[asked.key]
    _box(board, _x(asked.came), _x(asked.started - 1), y, BAR, lighter(color))
    for top, height in ((y, 5), (y + 6, 5)) if asked.guided else ((y, BAR),):
        _box(board, _x(asked.started - 1), _x(asked.ended), top, height, color)
    if asked.left:
        middle, end = y + BAR / 2, _x(asked.ended) + 7
        for slope in (-1, 1):
            board.lines([(end - 3, middle - 3 * slope), (end + 3, middle + 3 * slope)], INK, 1.5)
    board.text(f"{asked.key}, {asked.steps}", LEFT + EDGE - 8, y + BAR / 2, 11, "rm")


def _rows(board: Board, steps: Sequence[EngineStep], top: int) -> None:
    """Draw the number of network rows in each engine step, from 0 to MAX_BATCH."""
    bottom = top + STRIP
    for step in steps:
        height = round(STRIP * step.num_evaluated / MAX_BATCH)
        _box(board, _x(step.number - 1) + 1, _x(step.number), bottom - height, height, FAINT)
    board.text("rows of the network", LEFT + EDGE - 24, top + STRIP / 2, 11, "rm")
    for rows in (0, MAX_BATCH):
        board.text(str(rows), LEFT + EDGE - 8, bottom - STRIP * rows / MAX_BATCH, 11, "rm")


def _legend(board: Board) -> None:
    entries: Iterator[tuple[str, Any]] = iter([*KEYS.items(), ("lighter: waits", lighter(INK))])
    x = float(LEFT + EDGE)
    for words, color in entries:
        _box(board, x, x + 18, EDGE - 6, BAR, color)
        board.text(words, x + 24, EDGE, 13, "lm")
        x += 60 + 7 * len(words)
    words = "thin line through it: guided, takes two slots      x: its client left      25: steps"
    board.text(words, LEFT + EDGE, EDGE + 24, 13, "lm")


def _box(board: Board, left: float, right: float, top: float, height: int, color: Any) -> None:
    if right > left:
        ImageDraw.Draw(board.sheet).rectangle((left, top, right - 2, top + height - 1), fill=color)


def lighter(color: tuple[int, int, int]) -> tuple[int, ...]:
    return tuple(round(0.3 * own + 0.7 * paper) for own, paper in zip(color, PAPER, strict=True))


def small_bundle() -> Bundle:
    """Build a bundle with a small, untrained network that evaluates in about a millisecond."""
    torch.manual_seed(SEED)
    network = UNetConfig(base_channels=32, channel_multipliers=(1,), num_res_blocks=1, patch_size=4, head_channels=32)
    config = BundleConfig(network=network, image_size=16)
    return Bundle(config, config.build().eval().requires_grad_(False), {}, "", Path())


def main() -> None:
    """Draw and save the diagram."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="bundle folder")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    args = parser.parse_args()
    asked = pattern()
    steps = trace(load_bundle(args.model) if args.model else small_bundle(), asked)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "batching.png"
    save(draw(asked, steps), path)
    print(f"{path} {path.stat().st_size // 1000} kB, {len(asked)} requests in {len(steps)} engine steps")


if __name__ == "__main__":
    main()
