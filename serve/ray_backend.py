"""A protocol.Backend that calls the engines through their Ray Serve handle."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

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
from animediffusion.serve.protocol import Answer, ColorizeJob, Preview
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
        self._told: list[dict[str, Any]] = []
        self._pace = CompletionRate()
        self._requests = requests_counter()

    async def colorize(self, job: ColorizeJob) -> Answer:
        """See protocol.Backend."""
        with self._counted():
            for attempt in range(1, MAX_ATTEMPTS + 1):
                response = self.engine.colorize.remote(job)
                try:
                    answer: Answer = await response
                    return answer
                except asyncio.CancelledError:
                    response.cancel()
                    raise
                except Exception as error:
                    if attempt == MAX_ATTEMPTS or not _is_the_engines_fault(error):
                        raise self._translated(error) from error
        raise AssertionError("unreachable")

    async def stream(self, job: ColorizeJob) -> AsyncIterator[Preview | Answer]:
        """See protocol.Backend. After a retry on another engine, previews that were sent already are skipped."""
        with self._counted():
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
                    if attempt == MAX_ATTEMPTS or not _is_the_engines_fault(error):
                        raise self._translated(error) from error

    async def models(self) -> dict[str, Any]:
        """See protocol.Backend."""
        found = await self._describe()
        if not found:
            return {"desired": await asyncio.to_thread(self._desired), "traffic": {}, "replicas": []}
        freshest = min(found, key=lambda one: float(one["age_s"]))
        return {
            "desired": freshest["desired"],
            "traffic": mean_shares([one["shares"] for one in found]),
            "replicas": [one["replica"] for one in found],
        }

    async def is_ready(self) -> bool:
        """See protocol.Backend. A deployment that is scaled to zero is ready, because a request starts an engine."""
        found = await self._describe()
        return any(one["replica"]["state"] == "ready" for one in found) or (self.may_sleep and not found)

    async def _describe(self) -> list[dict[str, Any]]:
        """Return the state of every running engine; the previous states if an engine does not respond."""
        try:
            self._told = list(await self.engine.broadcast("describe").results_async(timeout_s=STATUS_TIMEOUT_S))
        except DeploymentUnavailableError:  # No engine runs, which is not an error of the request.
            self._told = []
        except Exception as error:
            log.warning("not every engine says how it is: %s", error)
        return self._told

    def _desired(self) -> dict[str, str | None]:
        try:
            return self.source.plan().desired
        except AnimeDiffusionError:  # None means that the version is unknown.
            return dict.fromkeys(ALIASES)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Record the start and the end of a request, from which Retry-After is estimated."""
        self._pace.started()
        finished = False
        try:
            yield
            finished = True
        except BusyError:
            self._requests.inc(tags={"version": "", "outcome": "busy"})
            raise
        finally:
            self._pace.ended(finished=finished)

    def _translated(self, error: Exception) -> Exception:
        """Convert an error of Ray, or one that Ray wraps, to a ServeError if there is one that fits."""
        if isinstance(error, RayTaskError):
            cause = error.cause
            return cause if isinstance(cause, ServeError) else error
        if isinstance(error, BackPressureError):
            return BusyError("every engine's queue is full", self._pace.retry_after_s())
        if isinstance(error, DeploymentUnavailableError | RayActorError):
            return NoModelError("no engine is running")
        if isinstance(error, TimeoutError):
            return DeadlineError("no answer in time")
        return error


def _is_the_engines_fault(error: Exception) -> bool:
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
