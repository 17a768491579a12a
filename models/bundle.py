"""A bundle is the folder that holds a trained model; training writes it, and it is registered, served and exported.

It contains config.json, model.safetensors, metrics.json, card.md and checksums.json, and no pickle. Its identity is the
sha256 over the hashes of config.json and model.safetensors. It may also contain averages.safetensors, which colorizing
does not need (models/training/ema.py).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from animediffusion.models.diffusion.denoiser import Denoiser, Prediction
from animediffusion.models.diffusion.path import PathConfig
from animediffusion.models.diffusion.sampler import SAMPLERS, build_sampler, sample, sample_times
from animediffusion.models.network.unet import UNetConfig
from animediffusion.models.sampler_options import ALLOWED, MAX_GUIDANCE_SCALE, MAX_STEPS
from animediffusion.platform.errors import BundleError

FORMAT = 1
IDENTITY_FILES = ("config.json", "model.safetensors")
FILES = (*IDENTITY_FILES, "metrics.json", "card.md")
AVERAGES = "averages.safetensors"
"""Optional file, listed in checksums.json when present; a copy for colorizing alone may leave it out."""

EvaluationJson = dict[str, Any]
"""metrics.json: the JSON object that `evaluate` prints; empty if the model was not evaluated. The registry, which does
not import this folder, calls it by the same name (platform/registry/model_version.py)."""

_LFS_POINTER = b"version https://git-lfs"
"""Start of the text that a clone without Git LFS holds in place of a large file."""


@dataclass(frozen=True, kw_only=True)
class SamplerDefaults:
    """Recommended sampler settings of a model, used for everything that a request does not set."""

    name: str = "euler"
    steps: int = 4
    guidance_scale: float = 1.0
    shift: float = 1.0
    """Spacing of the sampling times, see sample_times()."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Guidance applies only at times in this interval (Kynkaanniemi et al. 2024); at other times an evaluation costs
    one row, not two."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "guidance_interval", tuple(self.guidance_interval))  # JSON returns a list
        if self.name not in SAMPLERS:
            raise ValueError(f"sampler name must be one of {', '.join(SAMPLERS)}, got {self.name!r}")
        if not 1 <= self.steps <= MAX_STEPS:
            raise ValueError(f"sampler steps must be {ALLOWED['steps']}, got {self.steps}")
        if not 0 <= self.guidance_scale <= MAX_GUIDANCE_SCALE:
            raise ValueError(f"guidance_scale must be {ALLOWED['guidance_scale']}, got {self.guidance_scale}")
        if self.shift <= 0:
            raise ValueError(f"sampler shift must be above 0, got {self.shift}")
        interval = self.guidance_interval
        if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(f"guidance_interval must be two rising times in 0..1, got {interval}")

    def describe(self) -> str:
        """Return the settings as text, for example: euler, 4 steps, guidance 1.5 at times 0.2 to 0.8, shift 2."""
        steps = f"{self.steps} step{'s' * (self.steps > 1)}"
        text = f"{self.name}, {steps}, guidance {self.guidance_scale:g}"
        if self.guidance_scale != 1 and self.guidance_interval != (0.0, 1.0):
            text += " at times {:g} to {:g}".format(*self.guidance_interval)
        return text if self.shift == 1 else f"{text}, shift {self.shift:g}"


@dataclass(frozen=True, kw_only=True)
class BundleConfig:
    """Everything that is needed to build the model and to prepare its inputs."""

    network: UNetConfig = field(default_factory=UNetConfig)
    path: PathConfig = field(default_factory=PathConfig)
    prediction: Prediction = "x0"
    clamp: bool = False
    image_size: int = 64
    """Side in pixels of the square images that the model was trained on."""
    sampler: SamplerDefaults = field(default_factory=SamplerDefaults)
    provenance: dict[str, str | int | float | None] = field(default_factory=dict)
    """Origin of the weights: recipe, steps, attention, data hash."""

    def build(self) -> Denoiser:
        """Build the model with newly initialized weights."""
        return Denoiser(self.network, self.path, self.prediction, clamp=self.clamp)


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle."""

    config: BundleConfig
    denoiser: Denoiser
    metrics: EvaluationJson
    sha256: str
    folder: Path


def save_bundle(
    folder: Path,
    denoiser: Denoiser,
    config: BundleConfig,
    metrics: EvaluationJson | None = None,
    card: str = "",
    *,
    averages: dict[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """Write the bundle atomically (temporary directory, then rename) and return its identity (sha256).

    Args:
        folder: the new bundle; an existing one is replaced.
        denoiser: the model.
        config: configuration of the model.
        metrics: content of metrics.json.
        card: content of card.md.
        averages: tensors of the averages file; without them, no such file is written.
        dtype: type of the weights in the file, their own by default; load_bundle() converts them.
    """
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in denoiser.state_dict().items()}
    save_file(weights, temporary / "model.safetensors")
    if averages:
        save_file(averages, temporary / AVERAGES)
    _write_json(temporary / "config.json", config_values(config))
    _write_json(temporary / "metrics.json", metrics or {})
    (temporary / "card.md").write_text(card)
    return _seal(temporary, folder)


def with_sampler(
    source: Path, destination: Path, sampler: SamplerDefaults, metrics: EvaluationJson | None = None
) -> str:
    """Write a copy of a bundle with other sampler defaults and return its identity (sha256)."""
    config = _read_config(source, str(source))
    temporary = destination.with_name(destination.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    _write_json(temporary / "config.json", {**config_values(config), "sampler": asdict(sampler)})
    if metrics is not None:
        _write_json(temporary / "metrics.json", metrics)
    return _seal(temporary, destination)


def with_metrics(folder: Path, metrics: EvaluationJson) -> None:
    """Replace the metrics of a bundle; its identity does not change."""
    _write_json(folder / "metrics.json", metrics)
    _write_checksums(folder)


def load_bundle(
    folder: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    name: str | None = None,
    sha256: str | None = None,
) -> Bundle:
    """Verify every hash, then build the model in eval mode with its weights in `dtype`.

    Args:
        folder: the bundle.
        device: device of the model.
        dtype: type of the weights.
        name: how errors call the bundle; the folder if None.
        sha256: the identity that the bundle must have, if known.

    Raises:
        BundleError: if a file is missing or was changed, the format is unknown, the weights do not fit the config, or
            the bundle has another identity.
    """
    folder, name = Path(folder), name or str(folder)
    found = verify(folder, name)
    if sha256 is not None and found != sha256:
        raise unusable(name, f"sha256 is {found[:12]}, not the registered {sha256[:12]}")
    config = _read_config(folder, name)
    denoiser = config.build()
    try:
        denoiser.load_state_dict(load_file(folder / "model.safetensors"))
    except (RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise unusable(name, f"model.safetensors does not fit config.json ({reason})") from error
    metrics = json.loads((folder / "metrics.json").read_text())
    return Bundle(config, denoiser.to(device, dtype).eval().requires_grad_(False), metrics, found, folder)


def bundle_files(folder: Path) -> dict[str, bytes]:
    """Return the files of a bundle by name, for load_bundle_files() in another process."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def load_bundle_files(
    files: Mapping[str, bytes], device: torch.device | str = "cpu", *, name: str | None = None
) -> Bundle:
    """Return the bundle with these files, as another process read them; errors are those of load_bundle()."""
    with tempfile.TemporaryDirectory(prefix="bundle-") as folder:
        for file, data in files.items():
            Path(folder, file).write_bytes(data)
        return load_bundle(folder, device, name=name)


def verify(folder: Path, name: str | None = None) -> str:
    """Check that all files of a bundle are as they were written, and return its identity (sha256).

    Args:
        folder: the bundle.
        name: how errors call the bundle; the folder if None.

    Raises:
        BundleError: if a file is missing or was changed; the message names the file.
    """
    name = name or str(folder)
    if not folder.is_dir():
        raise unusable(name, "is not a directory")
    missing = [file for file in (*FILES, "checksums.json") if not (folder / file).is_file()]
    if missing:
        raise unusable(name, f"is not a bundle: missing {', '.join(missing)}")
    try:
        expected = json.loads((folder / "checksums.json").read_text())
    except ValueError as error:
        raise unusable(name, f"checksums.json is damaged ({error})") from error
    for file in _present(folder):
        if not isinstance(expected, dict) or expected.get(file) != file_sha256(folder / file):
            if (folder / file).stat().st_size < 1024 and (folder / file).read_bytes().startswith(_LFS_POINTER):
                raise BundleError(name, f"{file} is a Git LFS pointer, not the file", "fetch it with `git lfs pull`")
            raise unusable(name, f"{file} was changed after it was written (sha256 differs)")
    return identity(folder)


def unusable(name: str, found: str) -> BundleError:
    """Return the error for a bundle that cannot be used: `found` says what is wrong with the bundle `name`."""
    return BundleError(name, found, "give a bundle as training wrote it")


def identity(folder: Path) -> str:
    """Return the sha256 over the hashes of config and weights, 64 hex digits."""
    digest = hashlib.sha256()
    for name in IDENTITY_FILES:
        digest.update(file_sha256(folder / name).encode())
    return digest.hexdigest()


@torch.no_grad()
def smoke_sample(bundle: Bundle) -> None:
    """Sample once with the bundle's own sampler in at most two steps, with and without a reference.

    Raises:
        BundleError: if the result has the wrong shape or is not finite.
    """
    device = next(bundle.denoiser.parameters()).device
    size, defaults = bundle.config.image_size, bundle.config.sampler
    sketch, reference = torch.ones(2, 1, size, size, device=device), torch.zeros(2, 3, size, size, device=device)
    noise = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    # The second row checks the null reference, which guidance uses, even if the defaults have no guidance.
    condition = bundle.denoiser.encode(sketch, reference, torch.tensor([True, False], device=device))
    times = sample_times(bundle.denoiser.path, min(defaults.steps, 2), shift=defaults.shift).to(device)
    sampler = build_sampler(defaults.name, bundle.denoiser.path)
    image = sample(sampler, lambda x, t: bundle.denoiser(x, t, condition), noise, times)
    if image.shape != noise.shape or not bool(torch.isfinite(image).all()):
        raise unusable(str(bundle.folder), f"the smoke sample is not a finite {size}x{size} image")


def config_values(config: BundleConfig) -> dict[str, Any]:
    """Return the content of config.json. It names hints only if there are some, so that version 0.1 can read it."""
    values = {"format": FORMAT, **asdict(config)}
    if not config.network.hints:
        del values["network"]["hints"]
    return values


def _read_config(folder: Path, name: str) -> BundleConfig:
    try:
        values = json.loads((folder / "config.json").read_text())
        if values.pop("format", None) != FORMAT:
            raise ValueError(f"format is not {FORMAT}")
        unknown = set(values) - {f.name for f in fields(BundleConfig)}
        if unknown:
            raise ValueError(f"unknown keys {', '.join(sorted(unknown))}")
        network: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.pop("network").items()}
        return BundleConfig(
            network=UNetConfig(**network),
            path=PathConfig(**values.pop("path")),
            sampler=SamplerDefaults(**values.pop("sampler")),
            **values,
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise unusable(name, f"config.json is not the one of a bundle ({error})") from error


def _seal(temporary: Path, folder: Path) -> str:
    _write_checksums(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return identity(folder)


def _write_checksums(folder: Path) -> None:
    _write_json(folder / "checksums.json", {name: file_sha256(folder / name) for name in _present(folder)})


def _present(folder: Path) -> list[str]:
    return [*FILES, *([AVERAGES] if (folder / AVERAGES).is_file() else [])]


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
