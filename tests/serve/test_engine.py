import threading
import time
from itertools import cycle

import numpy as np
import pytest
import torch

from animediffusion.models.bundle import Bundle, SamplerDefaults
from animediffusion.models.colorize import colorize
from animediffusion.models.images import to_uint8
from animediffusion.serve.engine import DeadlineError, Engine, QueueFullError, Request

SIZE = 32


def request(number: int, **settings) -> Request:
    generator = torch.Generator().manual_seed(number)
    sketch = torch.rand(1, SIZE, SIZE, generator=generator) * 2 - 1
    reference = torch.rand(3, SIZE, SIZE, generator=generator) * 2 - 1
    return Request(sketch=sketch, reference=reference, seed=number, **settings)


def alone(bundle: Bundle, asked: Request) -> np.ndarray:
    defaults = bundle.config.sampler
    settings = SamplerDefaults(
        name=asked.sampler or defaults.name,
        steps=asked.steps or defaults.steps,
        guidance_scale=defaults.guidance_scale if asked.guidance_scale is None else asked.guidance_scale,
        shift=defaults.shift,
    )
    picture = colorize(bundle, asked.sketch[None], asked.reference[None], seeds=[asked.seed], sampler=settings)
    return to_uint8(picture)[0].numpy()


def levels_apart(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


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


def test_requests_share_turns(engine: Engine):
    futures = [engine.submit(request(number, steps=10, guidance_scale=1.0, sampler="euler")) for number in range(4)]
    for future in futures:
        future.result(60)
    assert engine.num_turns < 20


def test_the_second_picture_of_a_pair_needs_no_second_encoding(bundle: Bundle, engine: Engine, monkeypatch):
    calls = []
    encode = bundle.denoiser.encode
    monkeypatch.setattr(bundle.denoiser, "encode", lambda *a: calls.append(1) or encode(*a))
    first = request(1, guidance_scale=1.0)
    engine.submit(first).result(60)
    engine.submit(Request(sketch=first.sketch, reference=first.reference, seed=9, guidance_scale=1.0)).result(60)
    assert len(calls) == 1


def test_a_cancelled_request_leaves_at_the_next_turn(engine: Engine):
    started = threading.Event()
    long = engine.submit(request(0, steps=1000, on_progress=lambda *_: started.set()))
    assert started.wait(30)
    assert long.cancel()
    engine.submit(request(1)).result(30)
    assert engine.num_running == 0


def test_a_full_queue_refuses_at_once(bundle: Bundle):
    engine = Engine(bundle, max_batch=1, max_queue=1)
    futures = [engine.submit(request(number, steps=500)) for number in range(2)]
    with pytest.raises(QueueFullError):
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
    engine = Engine(bundle, max_batch=2)
    order: list[str] = []
    greedy = [engine.submit(request(number, steps=30, key="greedy")) for number in range(8)]
    modest = engine.submit(request(9, steps=30, key="modest"))
    for name, future in [*(("greedy", one) for one in greedy), ("modest", modest)]:
        future.add_done_callback(lambda _, name=name: order.append(name))
    engine.close()
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
def test_settings_out_of_range_are_refused_at_submission(engine: Engine, settings: dict):
    with pytest.raises(ValueError, match="must be"):
        engine.submit(request(1, **settings))


def test_a_picture_of_another_size_is_refused(engine: Engine):
    with pytest.raises(ValueError, match="must be"):
        engine.submit(Request(sketch=torch.zeros(1, 8, 8), reference=torch.zeros(3, 8, 8), seed=0))


def test_closing_finishes_what_is_here_and_refuses_more(bundle: Bundle):
    engine = Engine(bundle)
    future = engine.submit(request(1))
    engine.close()
    assert future.result(0).dtype == np.uint8
    with pytest.raises(QueueFullError):
        engine.submit(request(2))
