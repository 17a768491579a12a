"""Origin, contents and quality of a registered version.

`kept_files` and `described` gather the files and tags with which a version is registered; `dossier` reads them back.
"""

from __future__ import annotations

from typing import Any

import yaml

from animediffusion.models.bundle import Bundle, file_sha256
from animediffusion.pipelines.evaluation.examples import sample_sheet
from animediffusion.platform.errors import RegistryError
from animediffusion.platform.images.codec import encode_png
from animediffusion.platform.registry.client import Registry
from animediffusion.platform.registry.model_version import Version, headline

SAMPLES = "samples.png"
RECIPE = "recipe.yaml"
"""The resolved configuration of the training run."""
_MADE = {"denoising": "phase 1", "reconstruction": "phase 2"}


def kept_files(bundle: Bundle) -> dict[str, bytes]:
    """Return files to register with a bundle: samples that it colored, and its run's config if that is next to it."""
    files = {SAMPLES: encode_png(sample_sheet(bundle))}
    config = bundle.folder.parent / "config.yaml"
    if config.is_file() and (bundle.folder.parent / "run.json").is_file():
        files[RECIPE] = config.read_bytes()
    return files


def described(bundle: Bundle) -> dict[str, str]:
    """Return tags that describe a version without its files: network, sampler, data and origin of the weights."""
    return {
        "image_size": str(bundle.config.image_size),
        "path": bundle.config.path.name,
        "prediction": bundle.config.prediction,
        "sampler": bundle.config.sampler.describe(),
        "num_parameters": str(sum(parameter.numel() for parameter in bundle.denoiser.parameters())),
        "weights_sha256": file_sha256(bundle.folder / "model.safetensors"),
        **{
            "parent_sha256" if key == "parent" else key: str(value)
            for key, value in bundle.config.provenance.items()
            if value not in (None, "")
        },
    }


def dossier(registry: Registry, version: Version) -> dict[str, Any]:
    """Return the details that `models show` adds to a version's summary.

    Returns:
        `training {run, recipe, steps, batch_size, attention, source}`, `dataset {uri, hash}`, `lineage` (this version
        first, then its parent and so on), `config` (of the training run; None if unknown), `samples` (URI of the sample
        image, or None).
    """
    tags = version.tags
    training = {key: tags.get(key) for key in ("run", "recipe", "steps", "batch_size", "attention", "source")}
    ancestors = lineage(registry, version)
    has_samples = SAMPLES in registry.file_names(version.version)
    return {
        "training": {key: value for key, value in training.items() if value},
        "dataset": {"uri": tags.get("data"), "hash": tags.get("data_hash")},
        "lineage": ancestors,
        "config": _config(registry, ancestors),
        "samples": f"{registry.location(version.version).rstrip('/')}/{SAMPLES}" if has_samples else None,
    }


def _config(registry: Registry, ancestors: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the config of the run that trained the weights; a tuned version has the weights of its parent's run."""
    for one in ancestors:
        recipe = registry.read_file(one["version"], RECIPE)
        if recipe is not None or one["made"] != "tuned":
            return dict(yaml.safe_load(recipe)) if recipe else None
    return None


def samples(registry: Registry, version: Version) -> bytes:
    """Return the PNG of drawings that a version colored when it was registered.

    Raises:
        RegistryError: the version has no such file.
    """
    content = registry.read_file(version.version, SAMPLES)
    if content is None:
        raise RegistryError(f"version {version.version}", f"has no {SAMPLES}", "leave out --out")
    return content


def lineage(registry: Registry, version: Version) -> list[dict[str, Any]]:
    """Return `{version, made, run, sampler, metrics}` of the version, its parent, the parent's parent and so on."""
    by_number = {known.version: known for known in registry.versions()}
    chain: list[dict[str, Any]] = []
    present: Version | None = version
    seen: set[int] = set()
    while present is not None and present.version not in seen:
        seen.add(present.version)
        parent = by_number.get(present.parent) if present.parent is not None else None
        chain.append(
            {
                "version": present.version,
                "made": made(present, parent),
                "run": present.tags.get("run"),
                "sampler": present.tags.get("sampler"),
                "metrics": headline(present.metrics),
            }
        )
        present = parent
    return chain


def made(version: Version, parent: Version | None) -> str:
    """Return how a version was made: tuned, phase 1, phase 2, imported or unknown."""
    # A tuned version has its parent's weights, or another average of the same run's weights.
    if parent is not None and any(
        version.tags.get(tag) and version.tags[tag] == parent.tags.get(tag) for tag in ("weights_sha256", "run")
    ):
        return "tuned"
    if version.tags.get("source"):
        return "imported"
    return _MADE.get(version.tags.get("objective", ""), "unknown")
