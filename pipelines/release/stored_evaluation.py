"""An evaluation as a registered version keeps it: what was measured, and on which images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from animediffusion.platform.registry.model_version import headline


@dataclass(frozen=True)
class StoredEvaluation:
    """The facts of an evaluation that a promotion and a comparison need; None where an old evaluation lacks one."""

    data: str | None
    """URI of the dataset."""
    data_hash: str | None
    split: str | None
    num_images: int | None
    image_size: int | None
    sampler: dict[str, Any] | None
    metrics: dict[str, float]
    """Metrics by track and name, for example `same.psnr`."""

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Self:
        """Read the JSON object that `evaluate` prints."""
        keys = ("data", "data_hash", "split", "num_images", "image_size", "sampler")
        return cls(**{key: result.get(key) for key in keys}, metrics=headline(dict(result)))

    def has_same_images(self, other: StoredEvaluation) -> bool:
        """Return whether both evaluations used the same images; another number of images is a different set."""
        keys = ("data_hash", "split", "num_images", "image_size")
        return bool(self.data_hash) and all(getattr(self, key) == getattr(other, key) for key in keys)

    def images(self) -> str:
        """Describe the images in a few words."""
        return f"{self.num_images} images of {str(self.data_hash)[:12]} {self.split}"

    def to_json(self) -> dict[str, Any]:
        """Return one evaluation of `models show --json`: data, rows, sampler and the metrics."""
        facts = {"data": self.data, "data_hash": self.data_hash, "split": self.split, "num_images": self.num_images}
        return {**facts, "sampler": self.sampler, **self.metrics}
