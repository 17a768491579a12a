"""Decode image files to uint8 arrays and encode them again; damaged files raise an ImageError.

    array = decode_rgb(path.read_bytes(), thing=str(path))      # [H, W, 3], upright, on white
    stored = encode_lossless(fit_square(array, 64))

Arrays are uint8: RGB [H, W, 3], RGBA [H, W, 4] or gray [H, W].
Not here: tensors, see models/tensors.py.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageDraw, ImageFont

from animediffusion.platform.errors import ImageError
from animediffusion.platform.images import png
from animediffusion.platform.images.color_profiles import to_srgb
from animediffusion.platform.images.formats import broken, ends_in_zeros, format_of, not_an_image

Array = NDArray[np.uint8]
Value = TypeVar("Value")

DECODED_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""Formats that are read. Pillow's other parsers never get untrusted bytes, because some of them start programs."""
MAX_PIXELS = 64_000_000
"""Largest width x height of a picture unless the caller sets another limit."""

_WHITE = (255, 255, 255)
_PAPER, _INK = (246, 244, 240), (92, 86, 82)
_WIDE_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
"""Pillow's modes for gray of more than 8 bits."""
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that makes a picture of each EXIF orientation upright."""


class Box(NamedTuple):
    """Position and size of a letterboxed picture in its square, and its original size, in pixels."""

    left: int
    top: int
    width: int
    height: int
    source_width: int
    source_height: int


def decode_rgb(
    data: bytes, *, thing: str = "image", max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = DECODED_FORMATS
) -> Array:
    """Decode an image to RGB pixels [H, W, 3]: sRGB, 8 bits, upright by EXIF, transparent parts on white.

    Args:
        data: the bytes of one file, whose content decides the format. Only an animation's first frame is decoded.
        thing: the name of the image in error messages.
        max_pixels: largest width x height allowed; the header is checked before the pixels are decoded.
        formats: Pillow's names of the allowed formats.

    Raises:
        ImageError: with `reason` empty, not_an_image, truncated, too_large or unreadable.
    """
    return np.array(_open(data, thing, max_pixels, formats))


def decode_gray(
    data: bytes, *, thing: str = "image", max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = DECODED_FORMATS
) -> Array:
    """Decode an image to luma (ITU-R 601) [H, W]; arguments and errors are those of decode_rgb()."""
    return np.array(_open(data, thing, max_pixels, formats).convert("L"))


def decode_alpha(
    data: bytes, *, thing: str = "image", max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = DECODED_FORMATS
) -> Array:
    """Decode the opacity [H, W] of an image, 255 if it has no alpha; arguments and errors are those of decode_rgb()."""
    return np.array(_open(data, thing, max_pixels, formats, _opacity))


def decode_rgba(
    data: bytes, *, thing: str = "image", max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = DECODED_FORMATS
) -> Array:
    """Decode an image to sRGB with opacity [H, W, 4]; arguments and errors are those of decode_rgb()."""
    return np.array(_open(data, thing, max_pixels, formats, _to_rgba))


def encode_png(array: Array, compress_level: int = 6) -> bytes:
    """Encode a gray, RGB or RGBA array as PNG.

    For a painting, level 3 takes half the time of level 6 and produces 2 % more bytes.
    """
    return _save(array, "PNG", compress_level=compress_level)


def encode_lossless(array: Array) -> bytes:
    """Encode an array losslessly for a shard: smaller than PNG, fast to write and to read.

    The format is WebP. PNG is used for gray arrays, which WebP would store as three planes, and for arrays with a side
    of more than 16,383 pixels, WebP's limit.
    """
    if array.ndim == 2 or max(array.shape) > 16_383:
        return _save(array, "PNG", compress_level=6)
    return _save(array, "WEBP", lossless=True, quality=20, method=0, exact=True)


def fit_square(array: Array, size: int, *, fill: int = 255, crop: bool = True) -> Array:
    """Resize a picture to a size x size square, antialiased.

    With `crop`, the short side fills the square and the center is kept. Without `crop`, the whole picture is centered
    on a background of gray level `fill`.
    """
    if not crop:
        return letterbox(array, size, fill=fill)[0]
    height, width = array.shape[:2]
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    return _resize(array, size, size, (left, top, left + side, top + side))


def letterbox(array: Array, size: int, *, fill: int = 255) -> tuple[Array, Box]:
    """Center the whole picture in a size x size square; also return the Box that unletterbox() needs."""
    height, width = array.shape[:2]
    box = place_in_square(height, width, size)
    square = np.full((size, size, *array.shape[2:]), fill, np.uint8)
    square[box.top : box.top + box.height, box.left : box.left + box.width] = _resize(array, box.width, box.height)
    return square, box


def place_in_square(height: int, width: int, size: int) -> Box:
    """Return the box inside a square of side `size` into which letterbox() puts a picture of height x width."""
    scale = size / max(height, width)
    inner_height, inner_width = max(1, round(height * scale)), max(1, round(width * scale))
    return Box((size - inner_width) // 2, (size - inner_height) // 2, inner_width, inner_height, width, height)


def letterbox_points(
    points: Iterable[tuple[int, int, Value]], height: int, width: int, size: int
) -> list[tuple[int, int, Value]]:
    """Move points (x, y, value) of a height x width picture to their places in the square that letterbox() makes."""
    box, scale = place_in_square(height, width, size), size / max(height, width)
    return [(box.left + int((x + 0.5) * scale), box.top + int((y + 0.5) * scale), value) for x, y, value in points]


def unletterbox(array: Array, box: Box) -> Array:
    """Cut the inner picture out of a letterboxed square and resize it to its source size.

    The square may be larger or smaller than letterbox() made it; the box is scaled accordingly.
    """
    scale = array.shape[0] / max(box.width, box.height)
    left, top = box.left * scale, box.top * scale
    inside = (left, top, left + box.width * scale, top + box.height * scale)
    return _resize(array, box.source_width, box.source_height, inside)


def contact_sheet(
    rows: Sequence[Sequence[Array | None]],
    labels: Sequence[str],
    *,
    names: Sequence[str] = (),
    cell: int | None = None,
) -> Array:
    """Arrange rows of pictures as one RGB picture, with a label above each column, on a light background.

    Args:
        rows: pictures of any size, gray or RGB; None leaves a cell empty. A row may be shorter than `labels`.
        labels: one label per column.
        names: one name per row, drawn to its left.
        cell: side of a cell in pixels; by default a multiple of the first picture's longer side, at least 128, and 256
            if that side is longer than 256.
    """
    side = cell or _cell_side(rows)
    gap, margin, head = side // 12, side // 5, side // 4
    pitch, count = side + gap, max(len(labels), *(len(row) for row in rows), 1)
    font = ImageFont.load_default(max(11, side // 9))
    left = margin + (round(max(font.getlength(name) for name in names)) + gap if names else 0)
    size = (left + margin + count * pitch - gap, 2 * margin + head + len(rows) * pitch - gap)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(labels):
        draw.text((left + column * pitch + side // 2, margin + head // 3), label, fill=_INK, font=font, anchor="mm")
    for line, name in enumerate(names):
        draw.text((margin, margin + head + line * pitch + side // 2), name, fill=_INK, font=font, anchor="lm")
    mask = _rounded(side)
    for line, row in enumerate(rows):
        for column, array in enumerate(row):
            if array is not None:
                place = (left + column * pitch, margin + head + line * pitch)
                sheet.paste(Image.fromarray(letterbox(array, side)[0]).convert("RGB"), place, mask)
    return np.array(sheet)


def _cell_side(rows: Sequence[Sequence[Array | None]]) -> int:
    side = next((max(array.shape[:2]) for row in rows for array in row if array is not None), 128)
    return side * max(1, -(-128 // side)) if side <= 256 else 256


def _rounded(side: int) -> Image.Image:
    """Return an antialiased square mask with slightly rounded corners."""
    large = Image.new("L", (4 * side, 4 * side))
    ImageDraw.Draw(large).rounded_rectangle((0, 0, 4 * side - 1, 4 * side - 1), radius=side // 5, fill=255)
    return large.resize((side, side), Image.Resampling.BOX)


def _resize(array: Array, width: int, height: int, box: tuple[float, float, float, float] | None = None) -> Array:
    if array.shape[:2] == (height, width) and (box is None or box == (0, 0, width, height)):
        return array.copy()
    image = Image.fromarray(array)
    # LANCZOS rings around lines; BICUBIC keeps flat areas flat. Both are antialiased in Pillow.
    return np.array(image.resize((width, height), Image.Resampling.BICUBIC, box=box))


def _save(array: Array, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def _open(
    data: bytes,
    thing: str,
    max_pixels: int,
    formats: tuple[str, ...],
    finish: Callable[[Image.Image, bytes], Image.Image] | None = None,
) -> Image.Image:
    """Decode an image and make it upright; convert it with `finish(image, color profile)`, by default to RGB."""
    if not data:
        raise ImageError(thing, "is empty", "give an image file", reason="empty")
    kind = format_of(data)
    if kind not in formats:
        raise not_an_image(thing, data, formats)
    pixels, profile = png.without_metadata(data, thing=thing) if data.startswith(png.SIGNATURE) else (data, b"")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about size and metadata; we have our own limits
        try:
            image: Image.Image = Image.open(io.BytesIO(pixels), formats=(kind,))
            _check_size(image, thing, max_pixels)
            if kind == "WEBP" and ends_in_zeros(data):
                raise ImageError(thing, "ends in zero bytes", "copy or download it again", reason="truncated")
            image.load()
            profile = profile or image.info.get("icc_profile") or b""
            if kind == "PNG" and image.mode == "RGBA" and pixels[25] == png.GRAY_ALPHA:
                # Pillow opens 16-bit gray with alpha as color, but the color profile is for gray.
                image = image.convert("LA")
            return (finish or _to_rgb)(_upright(image), profile)
        except ImageError:
            raise
        except Image.DecompressionBombError as error:
            raise _too_large(thing, "has far too many pixels", max_pixels) from error
        except Exception as error:  # Pillow does not document what its parsers raise for damaged files
            raise broken(thing, data, error) from error


def _check_size(image: Image.Image, thing: str, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise _too_large(thing, f"is {image.width:,} x {image.height:,} pixels", max_pixels)


def _too_large(thing: str, found: str, max_pixels: int) -> ImageError:
    return ImageError(thing, found, f"at most {max_pixels:,} pixels are allowed", reason="too_large")


def _upright(image: Image.Image) -> Image.Image:
    try:
        transposition = _TRANSPOSITIONS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # pixels can be good although the EXIF data is damaged
        return image
    return image if transposition is None else image.transpose(transposition)


def _to_rgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert to RGB on white; colors are converted to sRGB before they are blended with white."""
    if image.mode in _WIDE_MODES:
        image = _to_eight_bits(image)
    gray = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        layer = _to_rgba(image, profile)
        ground = Image.new("RGBA", image.size, (*_WHITE, 255))
        return Image.alpha_composite(ground, layer).convert("RGB")
    if profile and image.mode != "CMYK":
        image = image.convert("L" if gray else "RGB")
    return to_srgb(image, profile).convert("RGB")


def _to_rgba(image: Image.Image, profile: bytes) -> Image.Image:
    image = _to_eight_bits(image) if image.mode in _WIDE_MODES else image
    gray = image.mode in ("1", "L", "LA", "La")
    return to_srgb(image.convert("LA" if gray else "RGBA"), profile).convert("RGBA")


def _opacity(image: Image.Image, _: bytes) -> Image.Image:
    image = _to_eight_bits(image) if image.mode in _WIDE_MODES else image
    if not image.has_transparency_data:
        return Image.new("L", image.size, 255)
    return image.convert("RGBA").getchannel("A")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Convert gray of 16 or 32 bits to 8 bits, with an alpha channel if one level is marked as transparent.

    The range of 16-bit integers is 0..65535. For 32-bit integers and floats it is the smallest usual range that
    contains all values.
    """
    values = np.nan_to_num(np.asarray(image, np.float64))
    most = values.max(initial=0)
    usual = {"F": (1, 255, 65_535), "I": (255, 65_535)}.get(image.mode, (65_535,))
    full_range = next((full for full in usual if most <= full), most)
    gray = Image.fromarray(np.clip(np.rint(values * (255 / full_range)), 0, 255).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        gray.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return gray
