"""A version that is loaded in this process, with its engine."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import torch

from animediffusion.models.bundle import Bundle, load_bundle, smoke_sample
from animediffusion.models.compile import compiled
from animediffusion.models.diffusion.sampler import build_sampler
from animediffusion.serve.engine.engine import Engine, EngineStep, Progress, Request
from animediffusion.serve.network_inputs import network_inputs
from animediffusion.serve.protocol import ColorizeJob
from animediffusion.serve.rendering.sketch import Pixels

STUCK_S = 300.0
"""An engine counts as hanging if one engine step takes longer. The first one on a GPU may take a minute."""

log = logging.getLogger(__name__)


class LoadedModel:
    """A loaded version and its engine.

    Args:
        version: name of the version, as in X-Model-Version.
        folder: folder of the bundle.
        device: device of the model.
        dtype: data type of the network's weights.
        compile: whether to compile the network with torch.compile into larger kernels; loading then takes minutes. If
            no compiler works, the network runs uncompiled, and a warning is logged.
        max_batch: see Engine.
        max_queue: see Engine.
        sha256: expected hash of the bundle, if known.
        on_step: see Engine.

    Raises:
        BundleError: the bundle is damaged or is not the registered one, or a test picture is not finite.
    """

    def __init__(
        self,
        version: str,
        folder: Path,
        *,
        device: str,
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
        max_batch: int,
        max_queue: int,
        sha256: str | None = None,
        on_step: Callable[[EngineStep], None] | None = None,
    ) -> None:
        bundle = load_bundle(folder, device, dtype, sha256=sha256 or None)
        smoke_sample(bundle)
        is_compiled = compile and _compile(bundle)
        self.version = version
        self.engine = Engine(bundle, max_batch=max_batch, max_queue=max_queue, on_step=on_step, warms_up=is_compiled)
        self._seen = (0, time.monotonic())
        """(number of engine steps, time) at the latest check that found the engine idle or a further step finished."""

    def submit(self, job: ColorizeJob, on_progress: Progress | None, doubts: list[Pixels]) -> Future[Pixels]:
        """Submit a job and return the future of its picture, see Engine.submit; its doubt is added to `doubts`."""
        made = network_inputs(job.lines, job.references, job.hints, self.engine.bundle.config.image_size)
        request = Request(
            sketch=made.sketch[0],
            references=tuple(reference[0] for reference in made.references),
            options=job.options,
            hints=None if made.hints is None else made.hints[0],
            deadline=time.monotonic() + job.timeout_s,
            key=job.key,
            on_progress=on_progress,
            on_doubt=doubts.append if job.wants_doubt else None,
        )
        return self.engine.submit(request)

    @property
    def sees_hints(self) -> bool:
        """Whether the network was trained with hints."""
        return self.engine.bundle.config.network.hints

    @property
    def pending_pictures(self) -> float:
        """Pending work in pictures with the model's default steps: a half-finished picture is 0.5, a guided one 2."""
        defaults = self.engine.bundle.config.sampler
        sampler = build_sampler(defaults.name, self.engine.bundle.denoiser.path)
        return self.engine.work_left / sampler.num_evaluations(defaults.steps)

    def check(self) -> None:
        """Raise RuntimeError if the engine no longer works or hangs in an engine step."""
        if not self.engine.is_alive:
            raise RuntimeError(f"the engine of version {self.version} has ended")
        steps, since = self._seen
        if self.engine.num_steps != steps or not self.engine.num_running:
            self._seen = (self.engine.num_steps, time.monotonic())
        elif time.monotonic() - since > STUCK_S:
            raise RuntimeError(f"the engine of version {self.version} has been in one engine step for {STUCK_S:.0f} s")


def _compile(bundle: Bundle) -> bool:
    """Compile a bundle's network for any number of rows; return False if no compiler works."""
    try:
        compiled(bundle.denoiser, dynamic=None)
    except ValueError as error:
        log.warning("%s", error)
        return False
    return True
