"""A device that fails for good, one that runs out of memory, and a network that fails: what an engine makes of each."""

import copy
import gc
import logging
import threading
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from animediffusion.models.bundle import Bundle
from animediffusion.models.colorize import colorize
from animediffusion.models.out_of_memory import is_out_of_memory
from animediffusion.models.sampler_options import SamplerOptions
from animediffusion.models.tensors import to_uint8
from animediffusion.platform.errors import UnavailableError
from animediffusion.serve.engine.batch import RunningBatch
from animediffusion.serve.engine.engine import Engine, Request
from animediffusion.serve.engine.faults import for_log, for_request, is_device_lost
from animediffusion.serve.engine.memory_limit import STEPS_UNTIL_RETRY, MemoryLimit
from animediffusion.serve.engine.network_runner import NetworkRunner

SIZE = 32
LOST = "CUDA error: device-side assert triggered"
CALLS = ("encode_reference", "combine", "denoise")


def request(number: int, *, on_progress=None, **settings) -> Request:
    generator = torch.Generator().manual_seed(number)
    sketch, reference = (torch.rand(c, SIZE, SIZE, generator=generator) * 2 - 1 for c in (1, 3))
    options = SamplerOptions(seed=number, **settings)
    return Request(sketch=sketch, references=(reference,), options=options, on_progress=on_progress)


def raising(error: Exception):
    """A method that raises an error."""

    def method(*_):
        raise error

    return method


def is_right(picture: np.ndarray, bundle: Bundle, asked: Request) -> bool:
    """Whether an engine's picture is the one that the request gets alone, but for rounding."""
    settings, seeds = asked.options.apply_to(bundle.config.sampler), [asked.options.seed]
    alone = colorize(bundle, asked.sketch[None], asked.references[0][None], seeds=seeds, sampler=settings)
    return int(np.abs(picture.astype(int) - to_uint8(alone)[0].numpy().astype(int)).max()) <= 1


class Device:
    """Stands between a denoiser's network and its callers: calls fail as `fault(rows)` says, from when it is set."""

    def __init__(self, bundle: Bundle) -> None:
        denoiser = copy.deepcopy(bundle.denoiser)
        self.fault = lambda _rows: None
        self.calls: list[tuple[str, int]] = []
        for name in CALLS:
            setattr(denoiser.network, name, self._checked(name, getattr(denoiser.network, name)))
        self.bundle = replace(bundle, denoiser=denoiser)

    def _checked(self, name, method):
        def call(x, *rest):
            self.calls.append((name, len(x)))
            if (error := self.fault(len(x))) is not None:
                held = torch.zeros(3)  # as an activation that the failed call had made
                self.held = weakref.ref(held)
                raise error
            return method(x, *rest)

        return call


@pytest.fixture
def device(bundle: Bundle) -> Device:
    return Device(bundle)


def lost(_rows: int) -> Exception:
    return torch.AcceleratorError(f"{LOST}\nCUDA kernel errors might be asynchronously reported")


def too_large(most: int):
    """Memory for calls of so many rows."""
    return lambda rows: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB") if rows > most else None


def drive(engine: Engine) -> None:
    while engine.step():
        pass


@pytest.mark.parametrize(
    ("error", "out_of_memory", "is_fatal"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True, False),
        (torch.AcceleratorError("CUDA error: out of memory"), True, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True, False),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
            True,
            False,
        ),
        (MemoryError(), True, False),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False, True),
        (
            torch.AcceleratorError("CUDA error: unspecified launch failure\nCompile with TORCH_USE_CUDA_DSA"),
            False,
            True,
        ),
        (RuntimeError("shapes do not fit"), False, False),
        (ValueError("out of memory"), False, False),
    ],
)
def test_errors_of_a_device_are_classified(error, out_of_memory, is_fatal):
    assert (is_out_of_memory(error), is_device_lost(error)) == (out_of_memory, is_fatal)
    assert isinstance(for_request(error), UnavailableError) == (out_of_memory or is_fatal)
    if out_of_memory or is_fatal:
        assert "\n" not in for_log(error)


@pytest.mark.parametrize("moment", ["join", "step", "cached condition", "wait"])
def test_a_lost_device_ends_the_engine_and_all_requests_immediately(device, monkeypatch, caplog, moment):
    engine = Engine(device.bundle, own_thread=False, max_batch=2)
    if moment in ("cached condition", "step"):
        engine.submit(request(0, steps=1))
        drive(engine)
    futures = [engine.submit(request(0 if moment == "cached condition" else number)) for number in range(4)]
    if moment == "step":
        engine.step()
    if moment == "wait":  # a kernel's failure shows when the host waits for it
        monkeypatch.setattr(NetworkRunner, "wait", raising(lost(0)))
    else:
        device.fault = lost
    device.calls.clear()
    assert engine.step()
    assert len(device.calls) <= (1 if moment != "wait" else 10)  # no halves of what cannot work
    for future in futures:
        assert type(future.exception(0)) is UnavailableError
        assert LOST in str(future.exception(0))
    assert not engine.is_alive
    assert LOST in engine.lost
    assert (engine.num_running, engine.num_waiting, engine.step()) == (0, 0, False)
    with pytest.raises(UnavailableError, match="device-side assert"):
        engine.submit(request(5))
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "\n" not in caplog.records[0].getMessage()


def test_a_lost_device_ends_the_engines_thread(device):
    others = set(threading.enumerate())
    engine = Engine(device.bundle, max_batch=2)
    [thread] = set(threading.enumerate()) - others
    device.fault = lost
    futures = []
    end = time.monotonic() + 30
    while engine.is_alive and time.monotonic() < end:
        try:
            futures.append(engine.submit(request(len(futures))))
        except UnavailableError:
            break
    thread.join(30)
    assert not thread.is_alive()
    assert futures
    assert all(isinstance(future.exception(10), UnavailableError) for future in futures)
    engine.close()


def test_a_picture_that_was_finished_before_the_device_failed_is_delivered(device, monkeypatch):
    engine = Engine(device.bundle, own_thread=False)
    done, other = engine.submit(request(1, steps=1, sampler="euler")), engine.submit(request(2, steps=9))
    monkeypatch.setattr(NetworkRunner, "wait", raising(lost(0)))
    engine.step()
    assert done.result(0).shape == (SIZE, SIZE, 3)
    assert isinstance(other.exception(0), UnavailableError)


@pytest.mark.parametrize("call", CALLS)
def test_a_network_that_fails_for_every_request_is_noticed_wherever_it_fails(device, call):
    engine = Engine(device.bundle, own_thread=False)
    device.fault = lambda _rows: RuntimeError("no kernel") if device.calls[-1][0] == call else None
    for number in range(3):
        assert engine.is_alive
        future = engine.submit(request(number))
        engine.step()
        assert str(future.exception(0)) == "no kernel"
    assert not engine.is_alive
    device.fault = lambda _rows: None
    engine.submit(request(7, steps=1, sampler="euler"))
    engine.step()
    assert engine.is_alive  # nothing was lost


def test_an_error_in_the_engine_itself_is_counted_and_leaves_nobody_waiting(device, monkeypatch):
    engine = Engine(device.bundle, own_thread=False)
    monkeypatch.setattr(RunningBatch, "leave", raising(ZeroDivisionError()))
    for number in range(3):
        assert engine.is_alive
        future = engine.submit(request(number))
        engine.step()
        assert isinstance(future.exception(0), ZeroDivisionError)
    assert not engine.is_alive


def test_a_batch_without_room_is_made_in_parts_and_then_in_smaller_ones(device, bundle, caplog):
    engine = Engine(device.bundle, own_thread=False, max_batch=8)
    asked = [request(number, steps=6, sampler="euler", guidance_scale=1.0) for number in range(8)]
    futures = [engine.submit(one) for one in asked]
    engine.step()
    device.fault, made = too_large(3), []
    for _ in range(5):
        device.calls.clear()
        engine.step()
        made.append([rows for _, rows in device.calls])
    # Two steps find out that 8 and 4 are too many; then no such call is tried.
    assert made == [[8, 4, 2, 2, 4, 2, 2]] * 2 + [[2, 2, 2, 2]] * 3
    for one, future in zip(asked, futures, strict=True):
        assert is_right(future.result(0), bundle, one)
    assert engine.is_alive
    assert len(caplog.records) == 2
    assert "an evaluation of 8 requests ran out of memory; lower max_batch" in caplog.records[0].getMessage()


def test_without_room_for_one_request_the_engine_continues(device, bundle, caplog):
    engine = Engine(device.bundle, own_thread=False, max_batch=4)
    device.fault = too_large(0)
    for number in range(5):
        future = engine.submit(request(number))
        drive(engine)
        with pytest.raises(UnavailableError, match="out of memory"):
            future.result(0)
    assert engine.is_alive
    assert all("\n" not in record.getMessage() for record in caplog.records)
    device.fault = lambda _rows: None
    future = engine.submit(request(9))
    drive(engine)
    assert is_right(future.result(0), bundle, request(9))


def test_a_lack_of_memory_outside_the_network_costs_only_that_batch(device, monkeypatch):
    engine = Engine(device.bundle, own_thread=False)
    first = engine.submit(request(1))
    with monkeypatch.context() as patch:
        patch.setattr(RunningBatch, "copy_pictures", raising(too_large(0)(1)))
        engine.step()
    assert isinstance(first.exception(0), UnavailableError)
    assert len(engine.conditions) == 0
    second = engine.submit(request(2))
    drive(engine)
    assert engine.is_alive
    assert second.result(0).shape == (SIZE, SIZE, 3)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("fault", [too_large(0), lost, lambda _rows: RuntimeError("no kernel")])
def test_a_failed_call_keeps_no_memory(device, call, fault, caplog):
    caplog.set_level(logging.DEBUG)  # whose handler keeps the records
    engine = Engine(device.bundle, own_thread=False, max_batch=4)
    device.fault = lambda rows: fault(rows) if device.calls[-1][0] == call else None
    futures = [engine.submit(request(number)) for number in range(3)]
    gc.disable()
    try:
        drive(engine)
        assert all(future.exception(0) is not None for future in futures)
        assert device.held() is None
    finally:
        gc.enable()


def test_conditions_are_dropped_when_memory_is_short(device):
    engine = Engine(device.bundle, own_thread=False)
    engine.submit(request(1))
    drive(engine)
    assert len(engine.conditions) == 4, "with and without the reference, and of both their references"
    device.fault = too_large(0)
    engine.submit(request(1))
    drive(engine)
    assert len(engine.conditions) == 0


def test_one_lack_of_memory_limits_nothing_and_a_limit_is_lifted_after_a_while():
    room = MemoryLimit()
    room.add_failure(8)
    room.end_step()
    assert room.allows(8)
    room.end_step()
    for _ in range(2):
        room.add_failure(8)
        room.add_failure(4)
        room.end_step()
    assert [room.allows(count) for count in (1, 2, 3)] == [True, True, False]
    for _ in range(STEPS_UNTIL_RETRY):
        assert not room.allows(3)
        room.end_step()
    assert room.allows(8)
    room.add_failure(8)
    room.end_step()
    assert (room.allows(8), room.allows(4)) == (False, True)


def test_pictures_of_a_limited_engine_mix_samplers_and_guidance(device, bundle):
    engine = Engine(device.bundle, own_thread=False, max_batch=8)
    names = ("euler", "heun", "dpmpp_2m")
    asked = [request(n, steps=4, sampler=names[n % 3], guidance_scale=(1.0, 2.0)[n % 2]) for n in range(5)]
    futures = [engine.submit(one) for one in asked]
    device.fault = too_large(3)
    drive(engine)
    for one, future in zip(asked, futures, strict=True):
        assert is_right(future.result(0), bundle, one)
