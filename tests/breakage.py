"""Bundles that look right and do not work, made from one that does."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from animediffusion.models.bundle import FILES, file_sha256


def changed_byte(folder: Path) -> None:
    """One bit of the weights, behind the checksums' back."""
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))


def wrong_shape(folder: Path) -> None:
    """A tensor that config.json knows nothing of, sealed again."""
    weights = load_file(folder / "model.safetensors")
    name = next(iter(weights))
    _seal(folder, {**weights, name: torch.zeros(7, 7)})


def not_finite(folder: Path) -> None:
    """Weights that are no numbers, sealed again."""
    weights = load_file(folder / "model.safetensors")
    _seal(folder, {name: torch.full_like(tensor, float("nan")) for name, tensor in weights.items()})


def broken_copy(source: Path, destination: Path, breakage) -> Path:
    """A copy of a bundle in which `breakage` did its work."""
    shutil.copytree(source, destination)
    breakage(destination)
    return destination


def _seal(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file(weights, folder / "model.safetensors")
    (folder / "checksums.json").write_text(json.dumps({name: file_sha256(folder / name) for name in FILES}))
