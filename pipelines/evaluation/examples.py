"""Example rows that show the results of a model, from a dataset or from drawn faces, and contact sheets of them.

The drawn faces are the same for every model, so the samples of two versions are comparable.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from animediffusion.models.augmentation.augment import fixed_batch
from animediffusion.models.bundle import Bundle
from animediffusion.models.colorize import colorize
from animediffusion.models.tensors import to_tensor, to_uint8
from animediffusion.pipelines.data.stream import read_split
from animediffusion.pipelines.evaluation.metrics import Images
from animediffusion.platform.images.codec import contact_sheet

SEED = 7
"""Seed of the drawn faces; demo and tests train on faces with other seeds."""
NUM_EXAMPLES = 4
MIN_SIZE_PX = 64


@dataclass(frozen=True)
class Examples:
    """Rows of the cross-reference track in [-1, 1], all with the same size S."""

    sketch: Tensor
    """[B, 1, S, S]"""
    reference: Tensor
    """[B, 3, S, S]"""
    target: Tensor
    """[B, 3, S, S], the truth."""


@functools.lru_cache(maxsize=2)
def drawn_examples(size: int, count: int = NUM_EXAMPLES) -> Examples:
    """Draw example faces; the reference is another drawing of the same character. Do not write to the tensors."""
    # Here, because most commands that import this file draw nothing, and scikit-image takes long to import.
    from animediffusion.pipelines.synthetic.dataset import make_row

    rows = [make_row(SEED, index, size) for index in range(count)]
    columns = [[row.sketch for row in rows], [row.cross_reference for row in rows], [row.target for row in rows]]
    return Examples(*(to_tensor(torch.from_numpy(np.stack(column))) for column in columns))


def dataset_examples(uri: str, count: int = NUM_EXAMPLES, split: str = "val") -> Examples:
    """Return the first rows of a split, prepared as on the cross track of `evaluate`.

    Raises:
        DataError: if the dataset or the split is missing.
    """
    rows = {key: torch.from_numpy(value) for key, value in read_split(uri, split, count).items() if key != "id"}
    batch = fixed_batch(rows, "cross", torch.Generator().manual_seed(SEED))
    return Examples(batch.sketch, batch.reference, batch.target)


def color_examples(bundle: Bundle, examples: Examples) -> Images:
    """Color the examples with a model; returns uint8 [B, s, s, 3] at the model's size s. Row i has noise seed i."""
    size = bundle.config.image_size
    sketch, reference = _resized(examples.sketch, size), _resized(examples.reference, size)
    result = colorize(bundle, sketch, reference, seeds=range(len(sketch)))
    return to_uint8(result).cpu().numpy()


def sheet(examples: Examples, results: Mapping[str, Images]) -> Images:
    """Draw a contact sheet with sketch | reference | a column for each result | truth."""
    sketch = to_uint8(examples.sketch.expand(-1, 3, -1, -1)).cpu().numpy()
    reference, target = (to_uint8(images).cpu().numpy() for images in (examples.reference, examples.target))
    columns = {"sketch": sketch, "reference": reference, **results, "truth": target}
    cell = max(128, examples.target.shape[-1])
    lines = [list(line) for line in zip(*columns.values(), strict=True)]
    return contact_sheet(lines, list(columns), cell=cell)


def sample_sheet(bundle: Bundle) -> Images:
    """Draw a contact sheet of the drawn examples, colored by one model."""
    examples = drawn_examples(max(MIN_SIZE_PX, bundle.config.image_size))
    return sheet(examples, {"result": color_examples(bundle, examples)})


def _resized(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False).clamp(-1, 1)
