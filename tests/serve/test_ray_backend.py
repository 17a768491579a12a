"""The engines as the HTTP side sees them, through a handle with prepared answers."""

import asyncio
import pickle

import numpy as np
import pytest
from ray.exceptions import RayActorError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from animediffusion.models.bundle import identity
from animediffusion.models.sampler_options import SamplerOptions
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import BusyError, DeadlineError, NoModelError, UnavailableError
from animediffusion.serve.protocol import Answer, ColorizeJob, EngineStatus, ModelsStatus, Preview, ReplicaStatus
from animediffusion.serve.ray_backend import RayBackend
from animediffusion.serve.replica.model_source import ModelSource

JOB = ColorizeJob(
    lines=np.zeros((8, 8), np.uint8), references=(np.zeros((8, 8, 3), np.uint8),), options=SamplerOptions()
)
ANSWER = Answer(picture=np.zeros((8, 8, 3), np.uint8), model_version="1")
NO_ENGINE = DeploymentUnavailableError(DeploymentID("engine", "app"))


class Response:
    """What a call of a handle returns."""

    def __init__(self, outcome) -> None:
        self.outcome = outcome

    def __await__(self):
        return self.results_async(0).__await__()

    async def __aiter__(self):
        """Previews, and at last an answer or an error."""
        for item in self.outcome:
            await asyncio.sleep(0)
            if isinstance(item, Exception):
                raise item
            yield item

    async def results_async(self, timeout_s):  # noqa: ARG002
        await asyncio.sleep(0)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


class Handle:
    """A DeploymentHandle whose calls end as listed, one after the other."""

    def __init__(self, *outcomes) -> None:
        self.outcomes = list(outcomes)
        self.colorize = self

    def remote(self, job) -> Response:  # noqa: ARG002
        return Response(self.outcomes.pop(0))

    def options(self, *, stream: bool) -> "Handle":
        assert stream
        return self

    @property
    def stream(self) -> "Handle":
        return self

    def broadcast(self, name: str) -> Response:
        assert name == "describe"
        return Response(self.outcomes.pop(0))


def failed(cause: Exception) -> RayTaskError:
    return RayTaskError("colorize", "", cause)


@pytest.fixture
def backend(tmp_path, bundle_folder):
    """A function that makes a backend over a handle with these outcomes."""
    source = ModelSource(Settings(workspace=tmp_path), str(bundle_folder))
    return lambda *outcomes, may_sleep=False: RayBackend(Handle(*outcomes), source, may_sleep=may_sleep)


def engine(version: str, state: str = "ready", age_s: float = 1.0, desired: str = "1") -> EngineStatus:
    return EngineStatus(
        replica=ReplicaStatus(
            id=version,
            versions=[version],
            state=state,
            device="cpu",
            attention="torch",
            running=0,
            queued=0,
            error=None,
        ),
        shares={version: 1.0} if state == "ready" else {},
        desired={"champion": desired, "challenger": None},
        age_s=age_s,
    )


@pytest.mark.parametrize("fault", [RayActorError(), failed(NoModelError("loading"))])
def test_a_picture_is_made_elsewhere_when_an_engine_dies_or_has_no_model(backend, fault):
    assert asyncio.run(backend(fault, fault, ANSWER).colorize(JOB)) is ANSWER
    with pytest.raises(NoModelError):
        asyncio.run(backend(fault, fault, fault, ANSWER).colorize(JOB))


def test_a_picture_is_made_elsewhere_when_an_engine_lost_its_device_or_has_no_memory(backend):
    fault = failed(UnavailableError("the device of this engine failed"))
    assert asyncio.run(backend(fault, ANSWER).colorize(JOB)) is ANSWER
    with pytest.raises(UnavailableError, match="the device"):
        asyncio.run(backend(fault, fault, fault, ANSWER).colorize(JOB))


async def received(stream) -> list[Preview | Answer]:
    return [item async for item in stream]


def previews(*steps: int) -> list[Preview]:
    return [Preview(step=step, total=4, picture=np.zeros((8, 8, 3), np.uint8)) for step in steps]


@pytest.mark.parametrize("fault", [RayActorError(), failed(UnavailableError("lost")), failed(NoModelError("loading"))])
def test_a_stream_continues_elsewhere_after_the_previews_that_were_sent(backend, fault):
    first, again = [*previews(1, 2), fault], [*previews(1, 2, 3), ANSWER]
    found = asyncio.run(received(backend([fault], first, again).stream(JOB)))
    assert [item.step for item in found[:-1]] == [1, 2, 3]
    assert found[-1] is ANSWER
    with pytest.raises(UnavailableError):
        asyncio.run(received(backend([fault], first, first, again).stream(JOB)))


def test_a_stream_that_fails_for_its_own_reason_is_not_tried_again(backend):
    with pytest.raises(DeadlineError):
        asyncio.run(received(backend([*previews(1), failed(DeadlineError("late"))], [ANSWER]).stream(JOB)))


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (BackPressureError(num_queued_requests=9, max_queued_requests=8), BusyError),
        (failed(DeadlineError("too late")), DeadlineError),
        (NO_ENGINE, NoModelError),
        (TimeoutError(), DeadlineError),
    ],
)
def test_what_ray_says_becomes_what_we_say_and_is_not_tried_again(backend, fault, expected):
    with pytest.raises(expected):
        asyncio.run(backend(fault, ANSWER).colorize(JOB))


def test_a_rejected_client_learns_when_to_retry(backend):
    async def refuse() -> BusyError:
        full = BackPressureError(num_queued_requests=9, max_queued_requests=8)
        over = backend(ANSWER, ANSWER, ANSWER, full)
        for _ in range(3):
            await over.colorize(JOB)
        with pytest.raises(BusyError) as refused:
            await over.colorize(JOB)
        return refused.value

    assert asyncio.run(refuse()).retry_after_s == 1


def test_models_are_those_of_the_engine_that_polled_last(backend):
    status = asyncio.run(backend([engine("1", age_s=2.5), engine("2", age_s=0.1, desired="2")]).models())
    assert status.desired == {"champion": "2", "challenger": None}
    assert status.traffic == {"1": 0.5, "2": 0.5}
    assert len(status.replicas) == 2


def test_without_an_engine_the_registry_is_asked(backend, bundle_folder):
    status = asyncio.run(backend(NO_ENGINE).models())
    version = f"sha256:{identity(bundle_folder)[:12]}"
    assert status == ModelsStatus(desired={"champion": version, "challenger": None}, traffic={}, replicas=[])


def test_engines_that_are_too_busy_to_answer_have_said_it_before(backend):
    async def ask_twice() -> tuple[ModelsStatus, ModelsStatus]:
        asked = backend([engine("1")], TimeoutError(), NO_ENGINE)
        assert await asked.is_ready()
        return await asked.models(), await asked.models()

    busy, gone = asyncio.run(ask_twice())
    assert busy.traffic == {"1": 1.0}
    assert gone.traffic == {}


@pytest.mark.parametrize(
    ("outcome", "may_sleep", "ready"),
    [
        ([engine("1")], False, True),
        ([engine("1", state="failed")], False, False),
        ([engine("1", state="failed")], True, False),
        (NO_ENGINE, False, False),
        (NO_ENGINE, True, True),
    ],
)
def test_ready_means_that_a_request_would_be_answered(backend, outcome, may_sleep, ready):
    assert asyncio.run(backend(outcome, may_sleep=may_sleep).is_ready()) is ready


def test_a_refusal_is_counted_once_by_the_process_that_refuses(backend, monkeypatch):
    class Counter:
        def inc(self, tags):
            counted.append(tags)

    counted = []
    monkeypatch.setattr("animediffusion.serve.ray_backend.requests_counter", Counter)
    full = BackPressureError(num_queued_requests=9, max_queued_requests=8)
    for refusal in (full, failed(BusyError("the engine counts this one"))):
        with pytest.raises(BusyError):
            asyncio.run(backend(refusal).colorize(JOB))
    assert counted == [{"version": "", "outcome": "busy"}]


@pytest.mark.parametrize(
    "error",
    [BusyError("full", 2.5), BusyError("full"), DeadlineError("late"), UnavailableError("x"), NoModelError("y")],
)
def test_an_error_is_the_same_after_it_crosses_to_another_process(error):
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), copy.args, str(copy)) == (type(error), error.args, error.args[0])
    assert getattr(copy, "retry_after_s", None) == getattr(error, "retry_after_s", None)
