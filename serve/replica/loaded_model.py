"""A version that is loaded in this process: how it is tried, asked, measured and watched."""

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
from animediffusion.models.tensors import from_pixels
from animediffusion.platform.images.codec import letterbox
from animediffusion.serve.engine.engine import Engine, Progress, Request, Turn
from animediffusion.serve.protocol import ColorizeJob
from animediffusion.serve.rendering.sketch import Pixels, for_network

STUCK_S = 300.0
"""An engine whose turn takes longer than this hangs; the first turn on a GPU may take a minute."""

log = logging.getLogger(__name__)


class Hosted:
    """One version and its engine.

    Args:
        version: as X-Model-Version names it.
        folder: of the bundle.
        device: where the model lives.
        dtype: of the network's weights.
        compile: whether torch.compile makes larger kernels of the network, which takes minutes while it loads. Where
            no compiler works, a line in the log says so and the network runs as it is.
        max_batch: as Engine's.
        max_queue: as Engine's.
        sha256: the identity it must have, if known.
        on_turn: as Engine's.

    Raises:
        ValueError: damaged, not the one registered, or its sample is not finite.
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
        on_turn: Callable[[Turn], None] | None = None,
    ) -> None:
        bundle = load_bundle(folder, device, dtype)
        if sha256 and bundle.sha256 != sha256:
            raise ValueError(f"sha256 is {bundle.sha256[:12]}, not the registered {sha256[:12]}")
        smoke_sample(bundle)
        is_compiled = compile and _compile(bundle)
        self.version = version
        self.engine = Engine(bundle, max_batch=max_batch, max_queue=max_queue, on_turn=on_turn, warms_up=is_compiled)
        self._seen = (0, time.monotonic())
        """Turns at the last look, and when they last grew or none was to be done."""

    def submit(self, job: ColorizeJob, on_progress: Progress | None) -> Future[Pixels]:
        """The picture to come; see Engine.submit."""
        size = self.engine.bundle.config.image_size
        request = Request(
            sketch=from_pixels(for_network(job.lines, size))[0],
            reference=from_pixels(letterbox(job.reference, size)[0])[0],
            seed=job.seed,
            steps=job.steps,
            guidance_scale=job.guidance_scale,
            sampler=job.sampler,
            deadline=time.monotonic() + job.timeout_s,
            key=job.key,
            on_progress=on_progress,
        )
        return self.engine.submit(request)

    @property
    def pending_pictures(self) -> float:
        """The work that is here, in pictures of the model's default steps: one half done counts 0.5, a guided one 2."""
        defaults = self.engine.bundle.config.sampler
        sampler = build_sampler(defaults.name, self.engine.bundle.denoiser.path)
        return self.engine.work_left / sampler.num_evaluations(defaults.steps)

    def check(self) -> None:
        """Raise RuntimeError if the engine's thread has ended, or hangs in a turn."""
        if not self.engine.is_alive:
            raise RuntimeError(f"the engine of version {self.version} has ended")
        turns, since = self._seen
        if self.engine.num_turns != turns or not self.engine.num_running:
            self._seen = (self.engine.num_turns, time.monotonic())
        elif time.monotonic() - since > STUCK_S:
            raise RuntimeError(f"the engine of version {self.version} has been in one turn for {STUCK_S:.0f} s")


def _compile(bundle: Bundle) -> bool:
    """Compile a bundle's network for any number of rows; False if no compiler works here."""
    try:
        compiled(bundle.denoiser, dynamic=None)
    except ValueError as error:
        log.warning("%s", error)
        return False
    return True
