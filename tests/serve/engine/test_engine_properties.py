"""What holds under any arrival pattern. Steps are made by hand and are the clock's unit, so nothing here sleeps."""

import dataclasses
import functools
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from animediffusion.models.bundle import Bundle, SamplerDefaults, load_bundle
from animediffusion.models.colorize import colorize
from animediffusion.models.diffusion.sampler import build_sampler
from animediffusion.models.sampler_options import SamplerOptions
from animediffusion.models.tensors import to_uint8
from animediffusion.platform.errors import BusyError, DeadlineError
from animediffusion.serve.engine.engine import Engine, EngineStep, Request

SIZE = 32
MAX_BATCH, MAX_QUEUE = 4, 6
LEVELS_FLOAT32 = 1
LEVELS_BFLOAT16 = 8
"""Largest difference to the picture made alone, of 255; in bfloat16 a product has 8 bits."""


@dataclass(frozen=True)
class Arrival:
    """A request, in steps: how long after the one before, when its client leaves, how long it can wait."""

    gap: int
    steps: int
    guidance: float
    sampler: str
    key: str
    pair: int
    leaves_after: int | None
    deadline_after: int | None


arrivals = st.lists(
    st.builds(
        Arrival,
        gap=st.integers(0, 3),
        steps=st.integers(1, 6),
        guidance=st.sampled_from((1.0, 1.0, 0.0, 2.5)),
        sampler=st.sampled_from(("euler", "heun", "dpmpp_2m")),
        key=st.sampled_from("abc"),
        pair=st.integers(0, 2),
        leaves_after=st.one_of(st.none(), st.integers(0, 8)),
        deadline_after=st.one_of(st.none(), st.integers(0, 20)),
    ),
    min_size=1,
    max_size=14,
)


@functools.cache
def pair(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.rand(1, SIZE, SIZE, generator=generator) * 2 - 1, torch.rand(
        3, SIZE, SIZE, generator=generator
    ) * 2 - 1


class Alone:
    """Pictures as models/colorize.py makes them, one at a time; made once."""

    def __init__(self, bundle: Bundle):
        self.bundle = bundle
        self.picture = functools.cache(self._picture)

    def _picture(self, asked: SamplerDefaults, number: int) -> np.ndarray:
        sketch, reference = pair(number)
        made = colorize(self.bundle, sketch[None], reference[None], seeds=[number], sampler=asked)
        return to_uint8(made)[0].numpy().astype(int)


@dataclass
class Run:
    """An engine, driven through arrivals, and a record of its steps and requests."""

    bundle: Bundle
    sizes: tuple[int, ...] | None = None
    now: float = 0.0
    steps: list[EngineStep] = field(default_factory=list)
    futures: dict = field(default_factory=dict)
    rejected: int = 0
    left_at: dict = field(default_factory=dict)
    """Steps that had been made when a client left."""
    deadline: dict = field(default_factory=dict)
    ended_at: dict = field(default_factory=dict)

    def go(self, pattern: list[Arrival]) -> None:
        # A step takes one second of this clock: the network's first layer moves it.
        hook = self.bundle.denoiser.network.input.register_forward_pre_hook(
            lambda *_: setattr(self, "now", self.now + 1)
        )
        self.engine = Engine(
            self.bundle,
            max_batch=MAX_BATCH,
            max_queue=MAX_QUEUE,
            own_thread=False,
            clock=lambda: self.now,
            on_step=self.steps.append,
            sizes=self.sizes,
        )
        try:
            self._go(pattern)
        finally:
            hook.remove()

    def _tick(self, *_: object) -> None:
        """A step takes one second of this clock: the network's first layer moves it."""
        self.now += 1

    def _go(self, pattern: list[Arrival]) -> None:
        due, passes = np.cumsum([one.gap for one in pattern]).tolist(), 0
        coming, leaving = list(zip(due, pattern, strict=True)), []
        while coming or leaving or self.engine.num_running or self.engine.num_waiting:
            while coming and coming[0][0] <= passes:
                self._submit(coming.pop(0)[1], passes, leaving)
            for when, future in leaving:
                if when <= passes and future.cancel():
                    self.left_at[future] = len(self.steps)
            leaving = [(when, future) for when, future in leaving if when > passes]
            self.engine.step()
            passes += 1
            assert passes < 300

    def _submit(self, asked: Arrival, passes: int, leaving: list) -> None:
        sketch, reference = pair(asked.pair)
        deadline = None if asked.deadline_after is None else self.now + asked.deadline_after
        try:
            future = self.engine.submit(
                Request(
                    sketch=sketch,
                    references=(reference,),
                    options=SamplerOptions(
                        seed=asked.pair, steps=asked.steps, guidance_scale=asked.guidance, sampler=asked.sampler
                    ),
                    key=asked.key,
                    deadline=deadline,
                )
            )
        except BusyError:
            self.rejected += 1
            return
        self.futures[future] = (len(self.futures), asked)
        self.deadline[future] = deadline
        future.add_done_callback(lambda _: self.ended_at.setdefault(future, self.now))
        if asked.leaves_after is not None:
            leaving.append((passes + asked.leaves_after, future))


def settings_of(bundle: Bundle, asked: Arrival) -> SamplerDefaults:
    return dataclasses.replace(
        bundle.config.sampler, name=asked.sampler, steps=asked.steps, guidance_scale=asked.guidance
    )


def num_steps(bundle: Bundle, asked: Arrival) -> int:
    return build_sampler(asked.sampler, bundle.denoiser.path).num_evaluations(asked.steps)


def slots(asked: Arrival) -> int:
    return 1 if asked.guidance == 1 else 2


def check_everyone_is_answered(run: Run) -> None:
    counts = run.engine.counts
    assert all(future.done() for future in run.futures)
    assert (counts.submitted, counts.rejected, counts.failed) == (len(run.futures), run.rejected, 0)
    assert counts.submitted == counts.finished + counts.cancelled + counts.late
    assert run.engine.num_running == run.engine.num_waiting == run.engine.work_left == 0


def check_turns(run: Run) -> None:
    """Each request runs without a gap, for as many steps as its sampler needs, and never after its client has left."""
    for future, (number, asked) in run.futures.items():
        ran = [step.number for step in run.steps if number in step.running]
        assert ran == list(range(ran[0], ran[0] + len(ran))) if ran else True
        if future in run.left_at:
            assert all(step <= run.left_at[future] for step in ran)
        elif future.exception() is None:
            assert len(ran) == num_steps(run.bundle, asked)
        else:
            assert isinstance(future.exception(), DeadlineError)
            assert len(ran) < num_steps(run.bundle, asked)
        if run.deadline[future] is not None and not future.cancelled():
            assert run.ended_at[future] <= run.deadline[future] + 1


def check_places(run: Run) -> None:
    """Never more rows than there are slots for, and none free that the next in line could use."""
    asked = dict(run.futures.values())
    for step in run.steps:
        used = sum(slots(asked[number]) for number in step.running)
        assert used <= MAX_BATCH or len(step.running) == 1
        assert not step.waiting or used >= MAX_BATCH - 1


def check_first_come_first_served_within_a_key(run: Run) -> None:
    first_step = {}
    for step in run.steps:
        for number in step.running:
            first_step.setdefault(number, step.number)
    for key in "abc":
        started = [number for number, asked in run.futures.values() if asked.key == key and number in first_step]
        assert [first_step[number] for number in started] == sorted(first_step[number] for number in started)


def check_pictures(run: Run, alone: Alone, levels: int) -> None:
    for future, (_, asked) in run.futures.items():
        if not future.cancelled() and future.exception() is None:
            expected = alone.picture(settings_of(run.bundle, asked), asked.pair)
            assert np.abs(future.result() - expected).max() <= levels


@pytest.fixture(scope="module")
def alone(bundle: Bundle) -> Alone:
    return Alone(bundle)


@pytest.fixture(scope="module")
def alone_bfloat16(bundle_folder: Path) -> Alone:
    return Alone(load_bundle(bundle_folder, dtype=torch.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [None, (2, 4)], ids=["as-they-are", "filled-up"])
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pattern=arrivals)
def test_any_pattern_of_arrivals(bundle: Bundle, alone: Alone, sizes, pattern: list[Arrival]):
    run = Run(bundle, sizes)
    run.go(pattern)
    check_everyone_is_answered(run)
    check_turns(run)
    check_places(run)
    check_first_come_first_served_within_a_key(run)
    check_pictures(run, alone, LEVELS_FLOAT32)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pattern=arrivals)
def test_any_pattern_of_arrivals_in_bfloat16(alone_bfloat16: Alone, pattern: list[Arrival]):
    run = Run(alone_bfloat16.bundle)
    run.go(pattern)
    check_everyone_is_answered(run)
    check_pictures(run, alone_bfloat16, LEVELS_BFLOAT16)


@given(num_greedy=st.integers(1, 10), steps=st.integers(1, 5))
@settings(max_examples=15, deadline=None)
def test_a_key_with_few_requests_waits_for_one_slot_only(bundle: Bundle, num_greedy: int, steps: int):
    greedy = [Arrival(0, steps, 1.0, "euler", "a", 0, None, None)] * num_greedy
    modest = Arrival(1, 1, 1.0, "euler", "b", 1, None, None)
    run = Run(bundle)
    run.go([*greedy[: MAX_BATCH + MAX_QUEUE - 1], modest])
    number = len(run.futures) - 1
    waited = [step.number for step in run.steps if number in step.waiting]
    assert len(waited) < steps
    assert Counter(step.running.count(number) for step in run.steps)[1] == 1
