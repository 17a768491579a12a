import copy
import threading
import time
from dataclasses import replace
from itertools import cycle

import numpy as np
import pytest
import torch

from animediffusion.models.bundle import Bundle
from animediffusion.models.colorize import colorize, noise_for
from animediffusion.models.diffusion.sampler import SAMPLERS
from animediffusion.models.doubt import doubt_map
from animediffusion.models.network.hints import draw_hints
from animediffusion.models.sampler_options import SamplerOptions
from animediffusion.models.tensors import from_pixels, to_uint8
from animediffusion.platform.errors import BusyError, DeadlineError, UnavailableError
from animediffusion.serve.engine import batch
from animediffusion.serve.engine.admission import MIN_STEPS
from animediffusion.serve.engine.engine import Engine, EngineStep, Request

SIZE = 32


def request(number: int, *, deadline=None, key="", on_progress=None, **settings) -> Request:
    generator = torch.Generator().manual_seed(number)
    sketch = torch.rand(1, SIZE, SIZE, generator=generator) * 2 - 1
    reference = torch.rand(3, SIZE, SIZE, generator=generator) * 2 - 1
    options = SamplerOptions(seed=number, **settings)
    return Request(
        sketch=sketch, references=(reference,), options=options, deadline=deadline, key=key, on_progress=on_progress
    )


def alone(bundle: Bundle, asked: Request) -> np.ndarray:
    settings, seeds = asked.options.apply_to(bundle.config.sampler), [asked.options.seed]
    picture = colorize(bundle, asked.sketch[None], asked.references[0][None], seeds=seeds, sampler=settings)
    return to_uint8(picture)[0].numpy()


def levels_apart(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def by_hand(bundle: Bundle, **options) -> tuple[Engine, list[EngineStep]]:
    """An engine whose steps the test makes, and what it says of them."""
    steps: list[EngineStep] = []
    return Engine(bundle, own_thread=False, on_step=steps.append, **options), steps


def step_once(engine: Engine, count: int) -> None:
    for number in range(count):
        engine.submit(request(number, steps=1, sampler="euler", guidance_scale=1.0))
        assert engine.step()


def test_rows_with_different_numbers_of_references_and_hints_share_a_batch(bundle: Bundle):
    engine, _ = by_hand(bundle, max_batch=8)
    one, other = request(1), request(2)
    both = replace(one, references=(*one.references, *other.references))
    asked = [one, both, other, replace(one, hints=draw_hints([(9, 9, (255, 0, 0))], SIZE))]
    futures = [engine.submit(each) for each in asked]
    while engine.step():
        pass
    pictures = [future.result() for future in futures]
    expected = [
        colorize(
            bundle,
            each.sketch[None],
            [reference[None] for reference in each.references],
            seeds=[each.options.seed],
            sampler=each.options.apply_to(bundle.config.sampler),
            hints=None if each.hints is None else each.hints[None],
        )
        for each in asked
    ]
    for picture, image in zip(pictures, expected, strict=True):
        assert levels_apart(picture, to_uint8(image)[0].numpy()) <= 1
    assert levels_apart(pictures[0], pictures[1]) > 1
    assert levels_apart(pictures[0], pictures[3]) > 10


def test_too_many_references_raise_value_error(bundle: Bundle):
    engine, _ = by_hand(bundle)
    for count in (0, 5):
        with pytest.raises(ValueError, match=f"takes 1 to 4 references, got {count}"):
            engine.submit(replace(request(1), references=request(1).references * count))


def test_a_request_can_ask_for_the_doubt(bundle: Bundle):
    engine, _ = by_hand(bundle)
    doubts: list[np.ndarray] = []
    future = engine.submit(replace(request(1), on_doubt=doubts.append))
    plain = engine.submit(request(2))
    while engine.step():
        pass
    assert [(doubt.shape, doubt.dtype) for doubt in doubts] == [((SIZE, SIZE), np.uint8)]
    condition = bundle.denoiser.encode(request(1).sketch[None], request(1).references[0][None])
    picture = from_pixels(future.result())
    assert abs(255 * doubt_map(condition, picture)[0].numpy() - doubts[0]).max() <= 1.5
    assert plain.result().shape == (SIZE, SIZE, 3)


@pytest.fixture
def ticks(bundle: Bundle):
    """A clock [seconds] that every step moves by one."""
    now = [0]
    hook = bundle.denoiser.network.input.register_forward_pre_hook(lambda *_: now.__setitem__(0, now[0] + 1))
    yield now
    hook.remove()


@pytest.fixture
def engine(bundle: Bundle):
    engine = Engine(bundle, max_batch=4, max_queue=64)
    yield engine
    engine.close(drain=False)


def test_a_result_is_that_of_the_request_alone_whatever_its_neighbours(bundle: Bundle, engine: Engine):
    mixed = zip(cycle(["euler", "heun", "dpmpp_2m", None]), cycle([1, 4, 2, 7, None]), cycle([1.0, 3.0, None]))
    asked = [
        request(number, sampler=name, steps=steps, guidance_scale=scale)
        for number, (name, steps, scale) in zip(range(24), mixed, strict=False)
    ]
    futures = []
    for number, one in enumerate(asked):
        futures.append(engine.submit(one))
        time.sleep(0.004 * (number % 3))
    for one, future in zip(asked, futures, strict=True):
        assert levels_apart(future.result(60), alone(bundle, one)) <= 1


def test_requests_share_engine_steps(bundle: Bundle):
    engine, _ = by_hand(bundle, max_batch=4)
    futures = [engine.submit(request(number, steps=10, guidance_scale=1.0, sampler="euler")) for number in range(4)]
    while engine.step():
        pass
    assert all(future.done() for future in futures)
    assert engine.num_steps < 20


def test_the_second_picture_of_a_reference_needs_no_second_encoding_of_it(engine: Engine):
    first = request(1, guidance_scale=1.0)
    for seed, sketch in ((1, first.sketch), (2, first.sketch), (3, -first.sketch)):
        again = replace(first, sketch=sketch, options=SamplerOptions(seed=seed, guidance_scale=1.0))
        engine.submit(again).result(60)
    assert (engine.counts.reference_hits, engine.counts.reference_misses) == (2, 1)


def test_a_canceled_request_leaves_at_the_next_engine_step(engine: Engine):
    started = threading.Event()
    long = engine.submit(request(0, steps=1000, on_progress=lambda *_: started.set()))
    assert started.wait(30)
    assert long.cancel()
    engine.submit(request(1)).result(30)
    assert engine.num_running == 0


def test_the_bundles_shift_and_guidance_interval_count(bundle: Bundle):
    sampler = replace(bundle.config.sampler, shift=2.5, guidance_interval=(0.2, 0.7), steps=6)
    other = replace(bundle, config=replace(bundle.config, sampler=sampler))
    asked = [request(number, sampler=name, guidance_scale=3.0) for number, name in enumerate(SAMPLERS)]
    engine, steps = by_hand(other)
    futures = [engine.submit(one) for one in asked]
    while engine.step():
        pass
    for one, future in zip(asked, futures, strict=True):
        assert levels_apart(future.result(0), alone(other, one)) <= 1
        assert levels_apart(future.result(0), alone(bundle, replace(one, options=replace(one.options, steps=6)))) > 1
    assert len({step.num_evaluated for step in steps}) > 1  # outside of the interval a request costs one row


def test_a_guided_request_takes_two_slots(bundle: Bundle):
    engine, steps = by_hand(bundle, max_batch=4)
    for number, scale in enumerate((2.0, 1.0, 2.0, 1.0)):
        engine.submit(request(number, steps=2, sampler="euler", guidance_scale=scale))
    while engine.step():
        pass
    # The third holds the place that is free for it, and the fourth does not pass it.
    assert [step.running for step in steps] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert {step.num_evaluated for step in steps} == {3}


def test_a_guided_request_runs_in_a_batch_of_one_slot(bundle: Bundle):
    engine, _ = by_hand(bundle, max_batch=1)
    future = engine.submit(request(1, steps=2, sampler="euler", guidance_scale=2.0))
    engine.step()
    engine.step()
    assert levels_apart(future.result(0), alone(bundle, request(1, steps=2, sampler="euler", guidance_scale=2.0))) <= 1


class Poisoned(torch.nn.Module):
    """A first layer that fails for a batch in which one value is there."""

    POISON = 1234.5

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.weight = layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (x == self.POISON).any():
            raise RuntimeError("out of memory")
        return self.layer(x)


def test_a_request_that_makes_the_network_fail_does_not_take_others_with_it(bundle: Bundle, monkeypatch):
    denoiser = copy.deepcopy(bundle.denoiser)
    denoiser.network.input = Poisoned(denoiser.network.input)
    monkeypatch.setattr(batch, "noise_for", lambda seed, size: poison if seed == 2 else noise_for(seed, size))
    poison = torch.full((3, SIZE, SIZE), Poisoned.POISON)
    engine, _ = by_hand(replace(bundle, denoiser=denoiser), max_batch=8)
    asked = [request(number, steps=3, guidance_scale=scale) for number, scale in enumerate((1.0, 2.0, 1.0, 1.0, 2.0))]
    futures = [engine.submit(one) for one in asked]
    while engine.step():
        pass
    with pytest.raises(UnavailableError, match="out of memory"):
        futures[2].result(0)
    for number in (0, 1, 3, 4):
        assert levels_apart(futures[number].result(0), alone(bundle, asked[number])) <= 1
    assert engine.is_alive
    assert (engine.counts.failed, engine.counts.finished) == (1, 4)


def test_an_engine_whose_every_request_fails_says_so(bundle: Bundle):
    denoiser = copy.deepcopy(bundle.denoiser)
    denoiser.network.input.forward = None  # whatever is called, fails
    engine, _ = by_hand(replace(bundle, denoiser=denoiser))
    for number in range(3):
        assert engine.is_alive
        future = engine.submit(request(number))
        engine.step()
        assert isinstance(future.exception(0), TypeError)
    assert not engine.is_alive


def test_a_request_that_cannot_meet_its_deadline_fails_immediately(bundle: Bundle, ticks: list[int]):
    engine, _ = by_hand(bundle, clock=lambda: ticks[0], max_batch=1)
    step_once(engine, MIN_STEPS)
    hopeless = engine.submit(request(1, steps=5, sampler="euler", guidance_scale=1.0, deadline=ticks[0] + 4))
    assert isinstance(hopeless.exception(0), DeadlineError)
    assert not engine.step()
    assert (engine.counts.late, engine.num_waiting) == (1, 0)


def test_a_request_whose_deadline_the_work_before_it_uses_up_raises_busy_error(bundle: Bundle, ticks: list[int]):
    engine, _ = by_hand(bundle, clock=lambda: ticks[0], max_batch=1)
    step_once(engine, MIN_STEPS)
    first = engine.submit(request(1, steps=10, sampler="euler", guidance_scale=1.0))
    with pytest.raises(BusyError, match="it would take 13") as refusal:
        engine.submit(request(2, steps=3, sampler="euler", guidance_scale=1.0, deadline=ticks[0] + 8))
    assert refusal.value.retry_after_s == 5
    second = engine.submit(request(2, steps=3, sampler="euler", guidance_scale=1.0, deadline=ticks[0] + 13))
    while engine.step():
        pass
    assert first.exception(0) is second.exception(0) is None


def test_a_full_queue_rejects_immediately(bundle: Bundle):
    engine = Engine(bundle, max_batch=1, max_queue=1)
    futures = [engine.submit(request(number, steps=500)) for number in range(2)]
    with pytest.raises(BusyError):
        engine.submit(request(2))
    for future in futures:
        future.cancel()
    engine.close()


def test_a_request_past_its_deadline_is_given_up_whether_it_waits_or_runs(bundle: Bundle):
    engine = Engine(bundle, max_batch=1)
    soon = time.monotonic() + 0.1
    futures = [engine.submit(request(number, steps=1000, deadline=soon)) for number in range(2)]
    for future in futures:
        with pytest.raises(DeadlineError):
            future.result(30)
    engine.close()


def test_a_key_with_many_requests_does_not_keep_another_waiting(bundle: Bundle):
    engine, _ = by_hand(bundle, max_batch=2)
    order: list[str] = []
    greedy = [engine.submit(request(number, steps=30, key="greedy")) for number in range(8)]
    modest = engine.submit(request(9, steps=30, key="modest"))
    for name, future in [*(("greedy", one) for one in greedy), ("modest", modest)]:
        future.add_done_callback(lambda _, name=name: order.append(name))
    while engine.step():
        pass
    assert order.index("modest") <= 3


def test_progress_counts_steps_and_shows_the_picture_so_far(engine: Engine):
    seen: list[tuple[int, int, tuple[int, ...]]] = []
    asked = request(3, steps=4, sampler="heun", on_progress=lambda *a: seen.append((a[0], a[1], a[2].shape)))
    engine.submit(asked).result(60)
    assert seen == [(step, 4, (SIZE, SIZE, 3)) for step in (1, 2, 3)]


def test_a_listener_that_fails_hurts_only_its_own_request(bundle: Bundle, engine: Engine):
    def broken(*_: object) -> None:
        raise ConnectionError("gone")

    bad, good = engine.submit(request(1, steps=5, on_progress=broken)), engine.submit(request(2, steps=5))
    with pytest.raises(ConnectionError):
        bad.result(30)
    assert levels_apart(good.result(30), alone(bundle, request(2, steps=5))) <= 1


def test_a_picture_that_is_not_finite_is_an_error(engine: Engine):
    asked = request(1)
    asked.sketch[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        engine.submit(asked).result(30)
    assert engine.submit(request(2)).result(30).shape == (SIZE, SIZE, 3)


@pytest.mark.parametrize("settings", [{"steps": 0}, {"steps": 1001}, {"guidance_scale": -1.0}, {"sampler": "magic"}])
def test_settings_out_of_range_raise_value_error_at_submission(engine: Engine, settings: dict):
    with pytest.raises(ValueError, match="must be"):
        engine.submit(request(1, **settings))


def test_a_picture_of_another_size_raises_value_error(engine: Engine):
    with pytest.raises(ValueError, match="must be"):
        engine.submit(
            Request(sketch=torch.zeros(1, 8, 8), references=(torch.zeros(3, 8, 8),), options=SamplerOptions())
        )


def test_closing_finishes_present_requests_and_rejects_new_ones(bundle: Bundle):
    engine = Engine(bundle)
    future = engine.submit(request(1))
    engine.close()
    assert future.result(0).dtype == np.uint8
    with pytest.raises(BusyError):
        engine.submit(request(2))
