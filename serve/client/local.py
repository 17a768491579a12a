"""A Painter that colors drawings with a bundle in this process."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection

import torch

from animediffusion.models.bundle import Bundle, load_bundle
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import ConfigError
from animediffusion.serve.client.colorize_files import Options, Painting
from animediffusion.serve.engine.engine import settings_for
from animediffusion.serve.replica.model_source import ModelSource
from animediffusion.serve.standalone import paint


class LocalPainter:
    """A colorize_files.Painter with a bundle in this process.

    Args:
        settings: settings of the registry.
        model: bundle folder or URI, or a registered version or alias; None is the champion.
        device: device of the model; by default CUDA if it is available, else the CPU.

    Raises:
        AnimeDiffusionError: the model does not exist or is damaged.
    """

    def __init__(self, settings: Settings, model: str | None = None, device: str | None = None) -> None:
        self.num_at_once = min(4, os.cpu_count() or 1)
        self._turn = threading.Lock()
        source = ModelSource(settings, model)
        self.version = source.wanted()
        folder = source.fetch(self.version)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.bundle: Bundle = load_bundle(folder, device, name=model)

    def paint(self, sketch: bytes, reference: bytes, options: Options, *, thing: str) -> Painting:
        """See colorize_files.Painter. Only one thread at a time runs the network; other threads decode and render."""
        try:
            sampler = settings_for(
                self.bundle, sampler=options.sampler, steps=options.steps, guidance_scale=options.guidance_scale
            )
        except ValueError as error:
            raise ConfigError("--steps or --guidance-scale", str(error), "see colorize --help") from error
        picture, layer = paint(
            self.bundle,
            sketch,
            reference,
            seed=options.seed,
            sampler=sampler,
            size=options.size,
            thing=thing,
            turn=self._turn,
        )
        return Painting(picture, layer, self.version)

    def versions(self) -> Collection[str]:
        """See colorize_files.Painter."""
        return (self.version,)
