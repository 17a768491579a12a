"""A protocol.Backend that calls the engines through their Ray Serve handle."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from animediffusion.platform.errors import (
    AnimeDiffusionError,
    BusyError,
    DeadlineError,
    NoModelError,
    ServeError,
    UnavailableError,
)
from animediffusion.platform.registry.client import ALIASES
from animediffusion.serve.protocol import Answer, ColorizeJob, EngineStatus, ModelsStatus, Preview
from animediffusion.serve.replica.model_source import ModelSource
from animediffusion.serve.replica.prometheus import requests_counter
from animediffusion.serve.retry_after import CompletionRate

STATUS_TIMEOUT_S = 5.0
MAX_ATTEMPTS = 3
"""Attempts for one picture. An engine may die (for example with its node), lose its GPU, or have no model; the same
request makes the same picture on another engine."""

log = logging.getLogger(__name__)


class RayBackend:
    """A protocol.Backend that calls the engines through their Ray Serve handle.

    Args:
        engine: handle of the engine deployment.
        source: provides the desired versions while no engine runs.
        may_sleep: whether engines scale to zero; if so, the backend is ready also without a running engine.
    """

    def __init__(self, engine: DeploymentHandle, source: ModelSource, *, may_sleep: bool) -> None:
        self.engine = engine
        self.source = source
        self.may_sleep = may_sleep
        self._last_states: list[EngineStatus] = []
        self._rate = CompletionRate()
        self._requests = requests_counter()

    async def colorize(self, job: ColorizeJob) -> Answer:
        """See protocol.Backend."""
        with self._timed():
            for attempt in range(1, MAX_ATTEMPTS + 1):
                response = self.engine.colorize.remote(job)
                try:
                    answer: Answer = await response
                    return answer
                except asyncio.CancelledError:
                    response.cancel()
                    raise
                except Exception as error:
                    if attempt == MAX_ATTEMPTS or not _may_work_elsewhere(error):
                        raise self._to_serve_error(error) from error
        raise AssertionError("unreachable")

    async def stream(self, job: ColorizeJob) -> AsyncIterator[Preview | Answer]:
        """See protocol.Backend. After a retry on another engine, previews that were sent already are skipped."""
        with self._timed():
            sent = 0
            for attempt in range(1, MAX_ATTEMPTS + 1):
                response = self.engine.options(stream=True).stream.remote(job)
                try:
                    async for item in response:
                        if isinstance(item, Answer) or item.step > sent:
                            sent = item.step if isinstance(item, Preview) else sent
                            yield item
                    return
                except (asyncio.CancelledError, GeneratorExit):
                    response.cancel()
                    raise
                except Exception as error:
                    if attempt == MAX_ATTEMPTS or not _may_work_elsewhere(error):
                        raise self._to_serve_error(error) from error

    async def models(self) -> ModelsStatus:
        """See protocol.Backend."""
        states = await self._states()
        if not states:
            return ModelsStatus(desired=await asyncio.to_thread(self._desired), traffic={}, replicas=[])
        return ModelsStatus(
            desired=min(states, key=lambda state: state.age_s).desired,
            traffic=mean_shares([state.shares for state in states]),
            replicas=[state.replica for state in states],
        )

    async def is_ready(self) -> bool:
        """See protocol.Backend. A deployment that is scaled to zero is ready, because a request starts an engine."""
        states = await self._states()
        return any(state.replica.state == "ready" for state in states) or (self.may_sleep and not states)

    async def _states(self) -> list[EngineStatus]:
        """Return the state of every running engine; the previous states if an engine does not respond."""
        try:
            self._last_states = list(await self.engine.broadcast("describe").results_async(timeout_s=STATUS_TIMEOUT_S))
        except DeploymentUnavailableError:  # No engine runs, which is not an error of the request.
            self._last_states = []
        except Exception as error:
            log.warning("an engine did not report its state: %s", error)
        return self._last_states

    def _desired(self) -> dict[str, str | None]:
        try:
            return self.source.plan().desired
        except AnimeDiffusionError:  # None means that the version is unknown.
            return dict.fromkeys(ALIASES)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Record the start and the end of a request, from which Retry-After is estimated."""
        self._rate.started()
        finished = False
        try:
            yield
            finished = True
        finally:
            self._rate.ended(finished=finished)

    def _to_serve_error(self, error: Exception) -> Exception:
        """Return the ServeError for an error of Ray, or the one that Ray wraps; else the error itself."""
        if isinstance(error, RayTaskError):
            cause = error.cause
            return cause if isinstance(cause, ServeError) else error
        if isinstance(error, BackPressureError):
            # No engine has seen this request, so it is counted here; an engine counts the requests that it rejects.
            self._requests.inc(tags={"version": "", "outcome": "busy"})
            return BusyError("every engine's queue is full", self._rate.retry_after_s())
        if isinstance(error, DeploymentUnavailableError | RayActorError):
            return NoModelError("no engine is running")
        if isinstance(error, TimeoutError):
            return DeadlineError("no answer in time")
        return error


def _may_work_elsewhere(error: Exception) -> bool:
    return isinstance(error, RayActorError) or (
        isinstance(error, RayTaskError) and isinstance(error.cause, UnavailableError)
    )


def mean_shares(replicas: list[dict[str, float]]) -> dict[str, float]:
    """Return version -> mean share over all replicas with a version, which get equal numbers of requests."""
    answering = [shares for shares in replicas if shares]
    total: Counter[str] = Counter()
    for shares in answering:
        total.update(shares)
    return {version: round(share / len(answering), 6) for version, share in sorted(total.items()) if share > 0}
