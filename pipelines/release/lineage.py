"""Origin, contents and quality of a registered version.

`kept_files` and `described` gather the files and tags with which a version is registered; `origin` reads them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import yaml

from animediffusion.platform.errors import RegistryError
from animediffusion.platform.images.codec import encode_png
from animediffusion.platform.registry.client import Registry
from animediffusion.platform.registry.model_version import Version, headline

if TYPE_CHECKING:
    from animediffusion.models.bundle import Bundle

SAMPLES = "samples.png"
RECIPE = "recipe.yaml"
"""The resolved configuration of the training run."""
_MADE = {"denoising": "phase 1", "reconstruction": "phase 2"}


def kept_files(bundle: Bundle) -> dict[str, bytes]:
    """Return files to register with a bundle: samples that it colored, and its run's config if that is next to it."""
    from animediffusion.pipelines.evaluation.examples import sample_sheet  # here, because it imports torch

    files = {SAMPLES: encode_png(sample_sheet(bundle))}
    config = bundle.folder.parent / "config.yaml"
    if config.is_file() and (bundle.folder.parent / "run.json").is_file():
        files[RECIPE] = config.read_bytes()
    return files


def described(bundle: Bundle) -> dict[str, str]:
    """Return tags that describe a version without its files: network, sampler, data and origin of the weights."""
    from animediffusion.models.bundle import file_sha256  # here, because it imports torch

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


@dataclass(frozen=True)
class Ancestor:
    """A version among the ancestors of another version."""

    version: int
    made: str
    """tuned, phase 1, phase 2, imported or unknown."""
    run: str | None
    sampler: str | None
    metrics: dict[str, float]


@dataclass(frozen=True)
class Origin:
    """The details that `models show` adds to a version's summary."""

    training: dict[str, str]
    """Known facts of the training run: run, recipe, steps, batch_size, attention, source."""
    data: str | None
    data_hash: str | None
    ancestors: list[Ancestor]
    """The version itself, its parent, the parent's parent and so on."""
    config: dict[str, Any] | None
    """Configuration of the training run; None if unknown."""
    samples: str | None
    """URI of the image of samples; None if the version has none."""

    def to_json(self) -> dict[str, Any]:
        """Return these details as `models show --json` prints them."""
        return {
            "training": self.training,
            "dataset": {"uri": self.data, "hash": self.data_hash},
            "lineage": [asdict(ancestor) for ancestor in self.ancestors],
            "config": self.config,
            "samples": self.samples,
        }


def origin(registry: Registry, version: Version) -> Origin:
    """Read the origin of a version from its tags, its files and its ancestors."""
    tags = version.tags
    chain = ancestors(registry, version)
    has_samples = SAMPLES in registry.file_names(version.version)
    facts = ("run", "recipe", "steps", "batch_size", "attention", "source")
    return Origin(
        training={key: tags[key] for key in facts if tags.get(key)},
        data=tags.get("data"),
        data_hash=tags.get("data_hash"),
        ancestors=chain,
        config=_config(registry, chain),
        samples=f"{registry.location(version.version).rstrip('/')}/{SAMPLES}" if has_samples else None,
    )


def _config(registry: Registry, chain: list[Ancestor]) -> dict[str, Any] | None:
    """Return the config of the run that trained the weights; a tuned version has the weights of its parent's run."""
    for ancestor in chain:
        recipe = registry.read_file(ancestor.version, RECIPE)
        if recipe is not None or ancestor.made != "tuned":
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


def ancestors(registry: Registry, version: Version) -> list[Ancestor]:
    """Return the version itself, its parent, the parent's parent and so on."""
    by_number = {known.version: known for known in registry.versions()}
    chain: list[Ancestor] = []
    present: Version | None = version
    seen: set[int] = set()
    while present is not None and present.version not in seen:
        seen.add(present.version)
        parent = by_number.get(present.parent) if present.parent is not None else None
        tags, metrics = present.tags, headline(present.metrics)
        chain.append(Ancestor(present.version, made(present, parent), tags.get("run"), tags.get("sampler"), metrics))
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
