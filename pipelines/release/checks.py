"""Checks of a bundle and of a version before it is registered or promoted.

pipelines/release/release.py moves the aliases.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from animediffusion.pipelines.release.stored_evaluation import StoredEvaluation
from animediffusion.platform.errors import BundleError, RegistryError
from animediffusion.platform.registry.client import Registry
from animediffusion.platform.registry.model_version import Version

if TYPE_CHECKING:
    from animediffusion.models.bundle import Bundle

PSNR_MARGIN = 0.2
"""Same-reference PSNR in dB that a new champion may lose: an invisible loss, about the noise of 100 images."""
CIEDE2000_MARGIN = 0.5
"""Increase of the cross-reference CIEDE2000 color difference that a new champion may have; 1 is just noticeable."""


def check_bundle(folder: Path | str, sha256: str | None = None) -> Bundle:
    """Load a bundle and color one sample with it.

    Args:
        folder: bundle folder.
        sha256: the identity that the bundle must have, if known.

    Raises:
        BundleError: the bundle is damaged, has another format or identity, or its sample is not finite.
    """
    from animediffusion.models.bundle import load_bundle, smoke_sample  # here, because torch takes seconds to import

    bundle = load_bundle(folder, sha256=sha256)
    smoke_sample(bundle)
    return bundle


def check_quality(candidate: Version, champion: Version | None) -> None:
    """Require that a candidate is not worse than the champion on any images that both were evaluated on.

    Args:
        candidate: the version to be promoted.
        champion: the present champion, or None. Without a champion the candidate must still have an evaluation, because
            the next candidate is compared with it.

    Raises:
        RegistryError: the candidate or the champion was not evaluated, they were evaluated on different data, or the
            candidate is worse.
    """
    name = f"version {candidate.version}"
    if not candidate.evaluations:
        raise RegistryError(name, "was not evaluated", f"run `{_evaluate(candidate, 'DATA')}`, or use --force")
    if champion is None or champion.version == candidate.version:
        return
    if not champion.evaluations:
        found = f"cannot be compared: the champion (version {champion.version}) was not evaluated"
        raise RegistryError(name, found, f"run `{_evaluate(champion, 'DATA')}`, or use --force")
    own = [StoredEvaluation.of(result) for result in candidate.evaluations]
    champions = [StoredEvaluation.of(result) for result in champion.evaluations]
    pairs = [(ours, theirs) for ours, theirs in ((_newest(own, one), one) for one in champions) if ours is not None]
    for ours, theirs in pairs:
        _check_not_worse(name, ours, theirs)
    if pairs:
        return
    theirs = champions[0]
    found = f"was evaluated on {own[0].images()}, the champion (version {champion.version}) on {theirs.images()}"
    command = _evaluate(candidate, theirs.data or "DATA", theirs.split or "val")
    raise RegistryError(name, found, f"run `{command}`, or use --force")


def _newest(results: list[StoredEvaluation], images: StoredEvaluation) -> StoredEvaluation | None:
    """Return the newest of the evaluations that used the same images as another one."""
    return next((result for result in reversed(results) if result.has_same_images(images)), None)


def _check_not_worse(name: str, ours: StoredEvaluation, theirs: StoredEvaluation) -> None:
    limits = {
        "same.psnr": (1, PSNR_MARGIN, "same-reference PSNR", "dB"),
        "cross.ciede2000": (-1, CIEDE2000_MARGIN, "cross-reference CIEDE2000", "units"),
    }
    for key, (sign, margin, label, unit) in limits.items():
        if key not in theirs.metrics:
            continue
        if key not in ours.metrics:
            raise RegistryError(name, f"has no {label}, but the champion has one", "evaluate it again, or use --force")
        # Round, so that a difference of exactly the margin passes in spite of floating-point errors.
        gain = round(sign * (ours.metrics[key] - theirs.metrics[key]), 6)
        if not gain >= -margin:
            found = f"{label} {ours.metrics[key]:.2f} against the champion's {theirs.metrics[key]:.2f} on {theirs.data}"
            raise RegistryError(name, found, f"at most {margin} {unit} may be lost; train longer, or use --force")


def _evaluate(version: Version, data: str, split: str = "val") -> str:
    option = "" if split == "val" else f" --split {split}"
    return f"animediffusion evaluate models:/{version.name}/{version.version} {data}{option}"


def check_stored(registry: Registry, version: Version) -> None:
    """Check the files of a version in the registry itself, not a locally cached copy.

    Raises:
        BundleError: the files are damaged or are not those that were registered.
    """
    with tempfile.TemporaryDirectory(prefix="animediffusion-") as folder:
        reference = f"models:/{version.name}/{version.version}"
        try:
            check_bundle(registry.fetch(reference, cache_dir=Path(folder)), version.sha256)
        except BundleError as error:
            raise BundleError(f"version {version.version}", error.found, "register it again") from error
