"""All that is known of a version in one place: where it comes from, what it is made of, how good it is.

What a version is registered with is gathered by `kept_files` and `described`; `dossier` reads it back.
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
    """Files to register beside a bundle: drawings it colored, and its run's configuration where that lies beside it."""
    files = {SAMPLES: encode_png(sample_sheet(bundle))}
    config = bundle.folder.parent / "config.yaml"
    if config.is_file() and (bundle.folder.parent / "run.json").is_file():
        files[RECIPE] = config.read_bytes()
    return files


def described(bundle: Bundle) -> dict[str, str]:
    """Tags that describe a version without its files: network, sampler, data and where the weights come from."""
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
    """What `models show` adds to a version's summary.

    Returns:
        `training {run, recipe, steps, batch_size, attention}`, `dataset {uri, hash}`, `lineage` (this version
        first, then its parent and so on), `config` (of the training run; None where it is not known), `samples`
        (URI of a picture, None where there is none).
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
    """Of the run that trained the weights: a tuned version has those of its parent."""
    for one in ancestors:
        recipe = registry.read_file(one["version"], RECIPE)
        if recipe is not None or one["made"] != "tuned":
            return dict(yaml.safe_load(recipe)) if recipe else None
    return None


def samples(registry: Registry, version: Version) -> bytes:
    """The PNG of drawings that a version colored when it was registered; raises RegistryError where there is none."""
    content = registry.read_file(version.version, SAMPLES)
    if content is None:
        raise RegistryError(f"version {version.version}", f"has no {SAMPLES}", "leave out --out")
    return content


def lineage(registry: Registry, version: Version) -> list[dict[str, Any]]:
    """The version, its parent, the parent's parent and so on: `{version, made, run, sampler, metrics}`."""
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
    """How a version came about, in a word or two: tuned, phase 1, phase 2, imported."""
    # The same weights, or another average of the same run's.
    if parent is not None and any(
        version.tags.get(tag) and version.tags[tag] == parent.tags.get(tag) for tag in ("weights_sha256", "run")
    ):
        return "tuned"
    if version.tags.get("source"):
        return "imported"
    return _MADE.get(version.tags.get("objective", ""), "unknown")
