"""The command `models import`: convert a checkpoint of the authors' code to a bundle.

models/authors/weights.py has the names and shapes of the authors' weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from animediffusion.models.authors.weights import from_authors
from animediffusion.models.bundle import save_bundle, verify
from animediffusion.pipelines.training.model_card import model_card
from animediffusion.platform.errors import BundleError, ConfigError, StorageError


@dataclass(frozen=True)
class ImportedBundle:
    """A bundle made from the authors' weights, as `models import --json` prints it."""

    bundle: str
    sha256: str
    num_parameters: int
    image_size: int


def import_weights(file: Path, folder: Path) -> ImportedBundle:
    """Write `file` as a bundle to `folder`.

    Only tensors are loaded from the file (weights_only), so code in it cannot run.

    Raises:
        StorageError: the file does not exist or cannot be read.
        BundleError: the file is not a checkpoint of the authors' model; the message says how it differs.
        ConfigError: the folder holds something other than a bundle.
    """
    _require_room(folder)
    checkpoint = _read(file)
    try:
        config, weights = from_authors(checkpoint)
    except ValueError as error:
        raise BundleError(
            str(file), str(error), "give a model checkpoint (.pth) that the authors' code wrote"
        ) from error
    config = replace(config, provenance={**config.provenance, "file": file.name})
    denoiser = config.build()
    denoiser.load_state_dict(weights)
    count = sum(parameter.numel() for parameter in denoiser.parameters())
    folder.parent.mkdir(parents=True, exist_ok=True)
    sha256 = save_bundle(folder, denoiser, config, {}, model_card(config, count))
    return ImportedBundle(str(folder), sha256, count, config.image_size)


def _read(file: Path) -> object:
    try:
        checkpoint: object = torch.load(file, map_location="cpu", weights_only=True)
        return checkpoint
    except OSError as error:
        raise StorageError(str(file), error.strerror or "cannot be read", "give an existing .pth file") from error
    except Exception as error:  # the exception class depends on the bytes of the file
        raise BundleError(str(file), "is not a PyTorch checkpoint", "give a model checkpoint (.pth)") from error


def _require_room(folder: Path) -> None:
    """Raise ConfigError unless the folder is new, is empty or holds a bundle: only a bundle may be overwritten."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        verify(folder)
    except BundleError as error:
        raise ConfigError(str(folder), "exists and is not a bundle", "give a new folder") from error
