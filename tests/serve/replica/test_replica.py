import asyncio
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from animediffusion.models import compile
from animediffusion.models.bundle import load_bundle, save_bundle
from animediffusion.models.sampler_options import SamplerOptions
from animediffusion.platform.errors import BundleError, BusyError, NoModelError, UnavailableError
from animediffusion.serve.api.problems import from_error
from animediffusion.serve.protocol import Answer, ColorizeJob, Preview
from animediffusion.serve.replica.replica import Replica


def job(sketch: np.ndarray, reference: np.ndarray, *, seed=1, timeout_s=60.0, **settings) -> ColorizeJob:
    options = SamplerOptions(seed=seed, **settings)
    return ColorizeJob(lines=sketch[..., 0], references=(reference,), options=options, timeout_s=timeout_s)


def wait_for(condition, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


async def taken(replica: Replica, *tasks: asyncio.Task) -> None:
    """Return when every one of these jobs waits, runs or is done."""
    while (found := replica.describe()).running + found.queued + sum(map(asyncio.Task.done, tasks)) < len(tasks):
        await asyncio.sleep(0.001)


@pytest.fixture
def replica():
    replica = Replica(max_batch=2, max_queue=2)
    yield replica
    replica.close()


def test_without_a_version_a_job_gets_an_error(replica, sketch, reference):
    with pytest.raises(NoModelError):
        asyncio.run(replica.colorize(job(sketch, reference)))


def test_a_new_version_answers_and_the_old_one_leaves(replica, bundle_folder, sketch, reference):
    assert replica.load("1", bundle_folder)
    assert replica.load("2", bundle_folder)
    assert asyncio.run(replica.colorize(job(sketch, reference))).model_version == "2"
    assert wait_for(lambda: replica.describe().versions == ["2"])


def test_jobs_that_run_during_a_promotion_are_finished_by_the_old_version(replica, bundle_folder, sketch, reference):
    async def promote_meanwhile() -> list[Answer]:
        replica.load("1", bundle_folder)
        early = [asyncio.create_task(replica.colorize(job(sketch, reference, steps=60))) for _ in range(3)]
        await taken(replica, *early)
        await asyncio.to_thread(replica.load, "2", bundle_folder)
        late = asyncio.create_task(replica.colorize(job(sketch, reference)))
        return await asyncio.gather(*early, late)

    assert [answer.model_version for answer in asyncio.run(promote_meanwhile())] == ["1", "1", "1", "2"]


def test_a_version_that_does_not_load_changes_nothing_but_the_error(
    replica, bundle_folder, tmp_path, sketch, reference
):
    replica.load("1", bundle_folder)
    assert not replica.load("2", tmp_path / "nothing")
    assert asyncio.run(replica.colorize(job(sketch, reference))).model_version == "1"
    description = replica.describe()
    assert description.state == "ready"
    assert "version 2" in description.error


def test_an_answer_says_where_the_model_doubts_and_whether_it_saw_the_hints(
    replica, bundle_folder, tmp_path, sketch, reference
):
    asked = replace(job(sketch, reference), wants_doubt=True, hints=((3, 4, (255, 0, 0)),))
    bundle = load_bundle(bundle_folder)
    config = replace(bundle.config, network=replace(bundle.config.network, hints=True))
    denoiser = config.build()
    denoiser.start_from(bundle.denoiser.state_dict())
    denoiser.network.hint_input.weight.data.normal_()
    save_bundle(tmp_path / "hinted", denoiser, config)
    pictures = []
    for version, folder in (("plain", bundle_folder), ("hinted", tmp_path / "hinted")):
        replica.load(version, folder)
        answers = [asyncio.run(replica.colorize(each)) for each in (job(sketch, reference), asked)]
        assert [answer.saw_hints for answer in answers] == [False, version == "hinted"]
        assert answers[0].doubt is None
        assert answers[1].doubt.shape == answers[1].picture.shape[:2]
        pictures += [answer.picture for answer in answers]
    plain, spread, other, learned = pictures
    assert np.array_equal(plain, other)
    assert not np.array_equal(plain, spread)
    assert not np.array_equal(spread, learned)


def test_a_full_replica_is_busy(replica, bundle_folder, sketch, reference):
    async def too_many() -> list[Answer | BaseException]:
        replica.load("1", bundle_folder)
        jobs = [replica.colorize(job(sketch, reference, steps=50)) for _ in range(8)]
        return await asyncio.gather(*jobs, return_exceptions=True)

    answers = asyncio.run(too_many())
    assert sum(isinstance(answer, BusyError) for answer in answers) == 4
    assert sum(isinstance(answer, Answer) for answer in answers) == 4


def test_a_stream_that_is_no_longer_read_frees_its_slot(replica, bundle_folder, sketch, reference):
    async def read_one() -> Preview | Answer:
        replica.load("1", bundle_folder)
        stream = replica.stream(job(sketch, reference, steps=1000))
        first = await anext(stream)
        await stream.aclose()
        for _ in range(500):
            if not replica.describe().running:
                break
            await asyncio.sleep(0.01)
        return first

    first = asyncio.run(read_one())
    assert isinstance(first, Preview)
    assert first.total == 1000
    assert replica.describe().running == 0


def test_a_canary_gets_its_share_and_the_same_request_the_same_version(replica, bundle_folder, sketch, reference):
    async def color(seeds) -> list[str]:
        return [(await replica.colorize(job(sketch, reference, seed=seed, steps=1))).model_version for seed in seeds]

    replica.add("1", bundle_folder)
    replica.add("2", bundle_folder)
    replica.route({"2": 0.25, "1": 0.75})
    first = asyncio.run(color(range(60)))
    assert 5 <= first.count("2") <= 25  # 15 expected; four standard deviations are 13
    assert asyncio.run(color(range(60))) == first
    replica.route({"2": 0.6, "1": 0.4})
    more = asyncio.run(color(range(60)))
    assert {two for one, two in zip(first, more, strict=True) if one == "2"} == {"2"}
    assert more.count("2") > first.count("2")
    assert replica.describe().versions == ["1", "2"]


def test_a_version_that_comes_back_while_it_drains_answers_again(replica, bundle_folder, sketch, reference):
    async def back_and_forth() -> list[str]:
        replica.load("1", bundle_folder)
        slow = asyncio.create_task(replica.colorize(job(sketch, reference, steps=200, guidance_scale=1.0)))
        await taken(replica, slow)
        await asyncio.to_thread(replica.load, "2", bundle_folder)
        assert replica.describe().versions == ["2", "1"]
        await asyncio.to_thread(replica.load, "1", bundle_folder)
        fast = await replica.colorize(job(sketch, reference))
        return [fast.model_version, (await slow).model_version]

    assert asyncio.run(back_and_forth()) == ["1", "1"]
    assert wait_for(lambda: [one.version for one in replica.stats()] == ["1"])
    assert replica.describe().versions == ["1"]


def test_traffic_goes_to_loaded_versions_only(replica, bundle_folder):
    replica.load("1", bundle_folder)
    with pytest.raises(ValueError, match="version 2 is not loaded"):
        replica.route({"1": 0.5, "2": 0.5})
    assert replica.shares == {"1": 1.0}


def test_another_bundle_than_the_registered_one_raises_bundle_error(replica, bundle_folder):
    with pytest.raises(BundleError, match="not the registered 000000000000"):
        replica.add("1", bundle_folder, sha256="0" * 64)
    assert replica.versions == []


def test_everything_is_counted_by_version_and_outcome(replica, bundle_folder, tmp_path, sketch, reference):
    async def use() -> None:
        replica.load("1", bundle_folder)
        replica.load("2", tmp_path / "nothing")
        await replica.colorize(job(sketch, reference))
        await replica.colorize(job(sketch, reference, seed=2))
        late = replica.colorize(job(sketch, reference, steps=1000, timeout_s=0.05))
        left = asyncio.create_task(replica.colorize(job(sketch, reference, steps=1000)))
        await asyncio.gather(late, return_exceptions=True)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        await asyncio.to_thread(replica.load, "3", bundle_folder)
        await replica.colorize(job(sketch, reference))

    asyncio.run(use())
    assert wait_for(lambda: [one.version for one in replica.stats()] == ["3"])
    totals = replica.counters.totals()
    assert totals["requests"] == {("1", "ok"): 2, ("1", "late"): 1, ("1", "cancelled"): 1, ("3", "ok"): 1}
    assert totals["swaps"] == {("1", "ok"): 1, ("2", "failed"): 1, ("3", "ok"): 1}
    assert totals["steps"]["1",] >= 6
    assert totals["rows"]["1",] >= 12  # the default is guided: two rows a picture
    assert totals["cache"]["1", "hit"] >= 1
    assert totals["cache"]["3", "miss"] >= 1
    taken = replica.counters.take_step_seconds()
    assert len(taken) == sum(totals["steps"].values())
    assert {version for version, _ in taken} == {"1", "3"}
    assert replica.counters.take_step_seconds() == []


def test_pending_work_is_counted_in_pictures_of_the_default_steps(replica, bundle_folder, sketch, reference):
    async def measure() -> tuple[float, float]:
        replica.load("1", bundle_folder)
        long = asyncio.create_task(replica.colorize(job(sketch, reference, steps=300, guidance_scale=1.0)))
        while not replica.describe().running:
            await asyncio.sleep(0.001)
        there = replica.pending_pictures()
        long.cancel()
        await asyncio.gather(long, return_exceptions=True)
        await asyncio.to_thread(wait_for, lambda: not replica.describe().running)
        return there, replica.pending_pictures()

    there, after = asyncio.run(measure())
    assert 0 < there <= 100  # the default is 3 steps
    assert after == 0


def test_an_engine_that_hangs_is_unhealthy(replica, bundle_folder, sketch, reference, monkeypatch):
    async def look_while_it_runs() -> None:
        replica.load("1", bundle_folder)
        running = asyncio.create_task(replica.colorize(job(sketch, reference, steps=300)))
        while not replica.describe().running:
            await asyncio.sleep(0.001)
        replica.check()
        loaded = replica.loaded["1"]
        monkeypatch.setattr(type(loaded.engine), "num_steps", loaded.engine.num_steps)  # the step that never ends
        replica.check()
        monkeypatch.setattr("animediffusion.serve.replica.loaded_model.STUCK_S", -1.0)
        with pytest.raises(RuntimeError, match="version 1 has been in one engine step"):
            replica.check()
        running.cancel()

    asyncio.run(look_while_it_runs())


def test_an_engine_that_has_ended_is_unhealthy(replica, bundle_folder):
    replica.load("1", bundle_folder)
    replica.check()
    replica.loaded["1"].engine.close()
    with pytest.raises(RuntimeError, match="the engine of version 1 has ended"):
        replica.check()


def test_a_busy_replica_says_when_to_come_back(replica, bundle_folder, sketch, reference):
    async def too_many() -> list[Answer | BaseException]:
        replica.load("1", bundle_folder)
        jobs = [replica.colorize(job(sketch, reference, steps=50)) for _ in range(8)]
        return await asyncio.gather(*jobs, return_exceptions=True)

    refused = [answer for answer in asyncio.run(too_many()) if isinstance(answer, BusyError)]
    assert refused
    assert all(1 <= int(from_error(error).headers["Retry-After"]) <= 60 for error in refused)


def failing(error: Exception):
    def fail(*_: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "is_device_lost"),
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
    ],
)
def test_what_the_device_did_to_a_job_can_be_tried_elsewhere(
    replica, bundle_folder, sketch, reference, monkeypatch, error, is_device_lost
):
    replica.load("1", bundle_folder)
    engine = replica.loaded["1"].engine
    monkeypatch.setattr(engine.bundle.denoiser.network, "denoise", failing(error))
    for _ in range(2):  # the second one is refused by an engine that has failed
        with pytest.raises(UnavailableError, match="CUDA"):
            asyncio.run(replica.colorize(job(sketch, reference)))
    assert asyncio.run(replica.is_ready()) is not is_device_lost
    description = replica.describe()
    assert description.state == ("failed" if is_device_lost else "ready")
    if is_device_lost:
        assert "illegal memory access" in description.error
        with pytest.raises(RuntimeError, match="illegal memory access"):
            replica.check()
    else:
        replica.check()


def test_a_device_that_fails_while_a_version_is_loaded_is_unhealthy(replica, bundle_folder, monkeypatch):
    error = torch.AcceleratorError("CUDA error: unspecified launch failure")
    with monkeypatch.context() as patch:
        patch.setattr("animediffusion.serve.replica.loaded_model.smoke_sample", failing(error))
        assert not replica.load("1", bundle_folder)
    assert replica.describe().state == "failed"
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        replica.check()


def test_a_version_without_room_leaves_a_replica_healthy(replica, bundle_folder, monkeypatch):
    replica.load("1", bundle_folder)
    monkeypatch.setattr(
        "animediffusion.serve.replica.loaded_model.smoke_sample", failing(torch.OutOfMemoryError("out of memory"))
    )
    assert not replica.load("2", bundle_folder)
    assert replica.describe().state == "ready"
    replica.check()


@pytest.mark.slow
def test_compiled_networks_make_the_same_pictures_and_compile_before_the_first_request(
    bundle_folder, sketch, reference, monkeypatch
):
    graphs = []

    def backend(module, _inputs):
        graphs.append(module)
        return module

    compiled = partial(compile.compiled, backend=backend)
    monkeypatch.setattr("animediffusion.serve.replica.loaded_model.compiled", compiled)
    plain, faster = Replica(max_batch=2), Replica(max_batch=2, compile=True)
    try:
        plain.load("1", bundle_folder)
        faster.load("1", bundle_folder)
        made = len(graphs)
        assert made

        async def color(replica: Replica) -> list[Answer]:
            jobs = [replica.colorize(job(sketch, reference, seed=seed)) for seed in range(5)]
            return await asyncio.gather(*jobs)

        for one, other in zip(asyncio.run(color(plain)), asyncio.run(color(faster)), strict=True):
            assert np.abs(one.picture.astype(int) - other.picture.astype(int)).max() <= 1
        assert len(graphs) == made
    finally:
        plain.close()
        faster.close()


def test_without_a_compiler_the_network_runs_as_it_is(bundle_folder, sketch, reference, monkeypatch, caplog):
    def no_compiler(_module, _inputs):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(
        "animediffusion.serve.replica.loaded_model.compiled", partial(compile.compiled, backend=no_compiler)
    )
    replica = Replica(compile=True)
    try:
        assert replica.load("1", bundle_folder)
        assert asyncio.run(replica.colorize(job(sketch, reference))).model_version == "1"
    finally:
        replica.close()
    [line] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "no compiler works here" in line
    assert "\n" not in line
