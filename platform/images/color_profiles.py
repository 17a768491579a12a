"""Convert a picture from the colors of its ICC profile to sRGB.

    image = to_srgb(image, image.info.get("icc_profile", b""))

A profile is ignored if it is damaged or if its color space does not fit the picture. Most profiles are sRGB itself;
the result of that check is cached, so such a profile costs nothing after its first use.
"""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image, ImageCms

_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}
_ALPHA = {"RGBA": "RGB", "LA": "L"}
_SAME_LEVELS = 1
"""A profile that changes no color by more than this many levels counts as sRGB."""


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert a picture to sRGB and keep its alpha; return the same picture if no conversion is needed.

    Args:
        image: a picture of any mode; modes other than L, LA, RGB, RGBA and CMYK are returned unchanged.
        profile: ICC profile of its colors, empty if it has none.
    """
    mode = _ALPHA.get(image.mode, image.mode)
    transform = _transform(profile, mode) if profile and mode in _SPACES else None
    if transform is None:
        return image
    colors = transform.apply(image if mode == image.mode else image.convert(mode))
    if mode != image.mode:
        colors.putalpha(image.getchannel("A"))
    return colors


@functools.lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the relative colorimetric transform to sRGB; None if the profile does not fit or changes nothing."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != _SPACES[mode]:
            return None
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", intent)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    return None if _changes_nothing(transform, mode) else transform


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    if mode == "CMYK":
        return False
    levels = np.append(np.arange(0, 255, 15), 255).astype(np.uint8)
    grid = np.arange(256, dtype=np.uint8)[None] if mode == "L" else np.stack(np.meshgrid(levels, levels, levels), -1)
    image = Image.fromarray(grid if mode == "L" else grid.reshape(len(levels), -1, 3))
    before, after = (np.asarray(one, np.int16) for one in (image.convert("RGB"), transform.apply(image)))
    return bool(np.abs(after - before).max() <= _SAME_LEVELS)
