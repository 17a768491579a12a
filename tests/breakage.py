"""Broken bundles that look valid, made from a valid bundle."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from animediffusion.models.bundle import FILES, file_sha256


def changed_byte(folder: Path) -> None:
    """Change one bit of the weights without updating the checksums."""
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))


def wrong_shape(folder: Path) -> None:
    """Give one tensor a shape that does not match config.json, and update the checksums."""
    weights = load_file(folder / "model.safetensors")
    name = next(iter(weights))
    _seal(folder, {**weights, name: torch.zeros(7, 7)})


def not_finite(folder: Path) -> None:
    """Set all weights to NaN, and update the checksums."""
    weights = load_file(folder / "model.safetensors")
    _seal(folder, {name: torch.full_like(tensor, float("nan")) for name, tensor in weights.items()})


def broken_copy(source: Path, destination: Path, breakage) -> Path:
    """Copy a bundle and apply `breakage` to the copy."""
    shutil.copytree(source, destination)
    breakage(destination)
    return destination


def _seal(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file(weights, folder / "model.safetensors")
    (folder / "checksums.json").write_text(json.dumps({name: file_sha256(folder / name) for name in FILES}))
