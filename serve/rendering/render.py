"""Decoding of uploaded images to arrays, and rendering of the network's picture to the files of the response."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from animediffusion.platform.errors import ConfigError, ImageError
from animediffusion.platform.images.codec import decode_alpha, decode_rgb, encode_png, letterbox
from animediffusion.serve.rendering.coloring import Background, Coloring, Region, Style, color_regions
from animediffusion.serve.rendering.formats.openraster import write_openraster
from animediffusion.serve.rendering.formats.psd import write_psd
from animediffusion.serve.rendering.hints import Hint, apply_hints, check_hints, read_hints, wholes_of
from animediffusion.serve.rendering.layers import (
    Shades,
    colors_of,
    hex_of,
    layers_of,
    picture_of,
    shades_of,
    shading_from,
)
from animediffusion.serve.rendering.palette import Color, Palette, read_palette
from animediffusion.serve.rendering.parts.naming import name_regions
from animediffusion.serve.rendering.regions import Regions, find_regions
from animediffusion.serve.rendering.sketch import (
    Drawing,
    Pixels,
    has_lines,
    looks_inverted,
    read_drawing,
    with_white_paper,
)
from animediffusion.serve.rendering.upsample import layer_of, over_white, to_picture

Output = Literal["image", "color_layer", "both", "flat", "ora", "psd", "layers", "doubt"]
"""What a request can ask for. render() makes all of them but `doubt`, which is not made of the picture (doubt.py)."""
Size = Literal["native", "model"]

UPLOADED_FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 25_000_000
MIN_SIDE_PX = 8
MAX_ASPECT = 16
MAX_PALETTE_BYTES = 2**20
MAX_HINTS_BYTES = 64 * 2**20
MAX_IDS = 65_535
"""Largest id of a region in a PNG of 16 bits."""
FAST_COMPRESSION = 3
"""PNG compression level of responses: low, because a client waits for them."""
ALLOWED = {
    "style": "flat, shaded or painted",
    "background": "paper, white or reference",
    "palette": "reference, none, #RRGGBB,#RRGGBB,..., or a .gpl or .ase file",
    "size": "native or model",
}
"""The allowed values of each field of RenderOptions, as error messages state them."""
_CHOICES = {"size": get_args(Size), "style": (None, *get_args(Style)), "background": (None, *get_args(Background))}


@dataclass(frozen=True, kw_only=True)
class RenderOptions:
    """Settings of the finished picture. They change neither the network's work nor its result."""

    size: Size = "native"
    """`native` is the size of the sketch; `model` is the square of the network."""
    style: Style | None = None
    """`flat` is one color in each region; `shaded` adds soft shading; `painted` is the network's own colors. None is
    `flat`, or `painted` if the size is `model` or the lines enclose nothing."""
    background: Background | None = None
    """What is outside of the figure: `paper` keeps the color of the paper and is the default of flat and shaded;
    `white` makes the paper white with any style; `reference` colors it, and is the default of painted."""
    palette: str | bytes = "reference"
    """The colors that regions may have: `reference`, `none` (any color), a list of #RRGGBB, or the bytes of a file."""
    hints: str | bytes | None = None
    """Exact colors of regions, JSON or the bytes of a file; see hints.py. A region keeps its shading, with `painted`
    what the network painted in it."""

    @property
    def has_own_palette(self) -> bool:
        """Whether the palette is a list or a file."""
        return self.palette not in ("reference", "none")

    @property
    def usual_style(self) -> Style:
        """The style of a drawing whose lines enclose regions."""
        return self.style or ("painted" if self.size == "model" else "flat")

    def check(self, output: Output = "image", prefix: str = "") -> None:
        """Raise a ConfigError if a setting is wrong, or would change nothing; `prefix` comes before its name."""
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{prefix}{name}", repr(getattr(self, name))[:80], ALLOWED[name])
        if self.has_own_palette:
            if len(self.palette) > MAX_PALETTE_BYTES:
                raise ConfigError(f"{prefix}palette", "is larger than 1 MiB", ALLOWED["palette"])
            read_palette(self.palette, thing=f"{prefix}palette")
        if self.hints is not None:
            if self.size == "model":
                raise ConfigError(f"{prefix}hints", "given with size model", "choose size native")
            check_hints(self.hints, thing=f"{prefix}hints")
        if self.usual_style != "painted":
            return
        for name, found in (("background", self.background), ("palette", self.palette)):
            is_today = found in (None, "reference") or (name == "background" and found == "white")
            if not is_today and (name == "background" or output in _PAINTED):
                shown = repr(found) if isinstance(found, str) else "a file"
                raise ConfigError(f"{prefix}{name}", f"{shown[:80]} with style painted", "choose style flat or shaded")

    def read_hints(self, drawing: Drawing, thing: str = "hints") -> tuple[Hint, ...]:
        """Return the hints for a drawing; raise a ConfigError or ImageError if they do not fit it."""
        height, width = drawing.darkness.shape
        return () if self.hints is None else read_hints(self.hints, width=width, height=height, thing=thing)


DEFAULTS = RenderOptions()


class Inputs(NamedTuple):
    """The decoded inputs of one picture."""

    drawing: Drawing
    references: tuple[Pixels, ...]
    """Each [H, W, 3]."""
    hints: tuple[Hint, ...]


@dataclass(frozen=True)
class Rendered:
    """The files of one picture."""

    files: dict[str, bytes]
    """By name: that of the output; of both, `image` and `color_layer`; of layers, `image`, `lines`, `flats`, `labels`,
    and `shading` and `highlights` where they change anything."""
    regions: tuple[Region, ...] | None = None
    """None if no regions were needed."""
    wholes: NDArray[np.int32] | None = None
    """The region of the drawing of which each region is a piece, [N + 1], by id; see hints.wholes_of()."""
    style: Style = "painted"

    def as_json(self) -> dict[str, Any]:
        """Return the layers as an object for JSON: files in base64, and the regions."""
        files = {name: base64.b64encode(data).decode() for name, data in self.files.items()}
        regions: list[dict[str, Any]] = [
            {"id": one.id, "name": one.name, "color": hex_of(one.color), "area": one.area, "box": list(one.box)}
            for one in self.regions or ()
        ]
        if self.wholes is not None:
            for region in regions:
                region["whole"] = int(self.wholes[region["id"]])
        return {"shading": None, "highlights": None, **files, "regions": regions}


_PAINTED = ("image", "color_layer", "both")
"""Outputs that need no regions with the style `painted`."""
_NAMED = ("ora", "psd", "layers")
"""Outputs that name the parts of the character."""


def read_sketch(data: bytes, *, thing: str = "sketch") -> Drawing:
    """Return the drawing in an image file.

    Raises:
        ImageError: the image is unreadable, too large, too small, too elongated, without lines, mostly black, or has
            light lines on a dark ground.
    """
    pixels = read_picture(data, thing=thing)
    if looks_inverted(pixels):
        found = "is mostly black or has light lines on a dark ground"
        raise ImageError(thing, found, "invert it: dark lines on light paper")
    drawing = read_drawing(pixels)
    if not has_lines(drawing):
        alpha = decode_alpha(data, thing=thing, max_pixels=MAX_PIXELS, formats=UPLOADED_FORMATS)
        hint = "light lines on transparency: make them dark" if np.ptp(alpha) else "give dark lines on light paper"
        raise ImageError(thing, "has no lines", hint)
    return drawing


def read_picture(data: bytes, *, thing: str = "reference") -> Pixels:
    """Return the RGB pixels of an image file; raise ImageError if it is unreadable or its size is not usable."""
    pixels = decode_rgb(data, thing=thing, max_pixels=MAX_PIXELS, formats=UPLOADED_FORMATS)
    short, long = sorted(pixels.shape[:2])
    if short < MIN_SIDE_PX or long > MAX_ASPECT * short:
        allowed = f"sides of at least {MIN_SIDE_PX} px, at most {MAX_ASPECT} times as long as wide"
        raise ImageError(thing, f"is {pixels.shape[1]} x {pixels.shape[0]} pixels", allowed)
    return pixels


def palette_argument(text: str) -> str | bytes:
    """Return the palette that an argument of a command line means: itself, or the bytes of the file that it names.

    Raises:
        ConfigError: there is no such file, or it is too large.
    """
    if text in ("reference", "none") or text.lstrip().startswith("#"):
        return text
    return file_argument("--palette", text, MAX_PALETTE_BYTES, ALLOWED["palette"])


def file_argument(name: str, text: str, max_bytes: int, allowed: str) -> bytes:
    """Return the bytes of the file that the argument `name` of a command line names, at most max_bytes + 1."""
    try:
        with open(text, "rb") as file:
            return file.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        found = f"{text!r}: {getattr(error, 'strerror', None) or 'is not a file name'}"
        raise ConfigError(name, found, allowed) from error


def hints_argument(text: str) -> bytes:
    """Return the bytes of the file that --hints names; raise ConfigError if it cannot be read."""
    return file_argument("--hints", text, MAX_HINTS_BYTES, "give a .json file of points or a .png file of strokes")


def render(
    painted: Pixels,
    drawing: Drawing,
    references: Sequence[Pixels],
    hints: Sequence[Hint] = (),
    *,
    output: Output = "image",
    options: RenderOptions = DEFAULTS,
) -> Rendered:
    """Return the requested files.

    `image` is the finished picture and `color_layer` its colors without lines, RGBA; both are PNGs. `flat` is a PNG of
    the flat colors. `ora` and `psd` are files with layers, and `layers` are the same layers as PNGs.

    Args:
        painted: the network's picture [S, S, 3] of the letterboxed sketch.
        drawing: the sketch.
        references: the references, each [H, W, 3].
        hints: from options.read_hints().
        output: the files to return; `both` are `image` and `color_layer`.
        options: size, style, background and palette, which options.check() accepts. If the size is `native`, `image` is
            `color_layer` times `drawing.pixels`. If it is `model`, the image of the style `painted` is the unchanged
            picture of the network with its lines.
    """
    style = options.usual_style
    sized = drawing if options.size == "native" else read_drawing(letterbox(drawing.pixels, len(painted))[0])
    if options.background == "white":
        sized = with_white_paper(sized)
    is_plain = output in _PAINTED and not hints
    if style == "painted" and is_plain:
        return Rendered(_painted(painted, sized, output, options.size))
    drawing, regions = sized, find_regions(sized)
    if options.style is None and regions.count == 1:
        style = "painted"
        if is_plain:
            return Rendered(_painted(painted, drawing, output, options.size))
    learned = [hint.color for hint in hints if hint.learned]
    coloring = _color(painted, drawing, regions, references, options, style, learned)
    wholes, picture = wholes_of(coloring, regions.labels), None
    if style == "painted":
        layer = layer_of(painted, drawing)
        coloring = replace(coloring, shading=shading_from(over_white(layer), coloring.flats))
        picture = None if hints else to_picture(layer, drawing)
    # The layers of shading are those without hints, so that a color can be replaced under them.
    shades = None if output == "flat" else shades_of(coloring)
    if output in _NAMED:
        coloring = name_regions(coloring)
    coloring = apply_hints(coloring, hints, wholes)
    return Rendered(_files(coloring, shades, picture, output), coloring.regions, wholes, style)


def style_of(drawing: Drawing, options: RenderOptions = DEFAULTS) -> Style:
    """Return the style that render() chooses for a drawing."""
    style = options.usual_style
    is_open = options.style is None and style != "painted" and find_regions(drawing).count == 1
    return "painted" if is_open else style


def _painted(painted: Pixels, drawing: Drawing, output: Output, size: Size) -> dict[str, bytes]:
    """Return the files of the style `painted`; the drawing has the size of the result."""
    if (output, size) == ("image", "model"):
        return {"image": encode_png(painted, FAST_COMPRESSION)}
    layer = layer_of(painted, drawing)
    made: dict[str, bytes] = {}
    if output != "color_layer":
        made["image"] = encode_png(to_picture(layer, drawing) if size == "native" else painted, FAST_COMPRESSION)
    if output != "image":
        made["color_layer"] = encode_png(layer, FAST_COMPRESSION)
    return made


def _color(
    painted: Pixels,
    drawing: Drawing,
    regions: Regions,
    references: Sequence[Pixels],
    options: RenderOptions,
    style: Style,
    learned: Sequence[Color],
) -> Coloring:
    palette: Palette | Literal["reference"] | None = None
    if options.has_own_palette:
        palette = read_palette(options.palette)
    elif options.palette == "reference":
        palette = "reference"
    return color_regions(
        painted,
        drawing,
        regions,
        references=references,
        palette=palette,
        # What is painted outside of the figure must not become the shading of white paper: it would darken hints there.
        background="reference" if style == "painted" else options.background or "paper",
        style="shaded" if style == "shaded" else "flat",
        learned=learned,
    )


def _files(coloring: Coloring, shades: Shades | None, picture: Pixels | None, output: Output) -> dict[str, bytes]:
    """Return the files of a coloring with these layers of shading; `picture` is the finished picture if it exists."""
    if output == "flat":
        return {"flat": encode_png(coloring.flats, FAST_COMPRESSION)}
    if output == "color_layer":
        return {"color_layer": _color_layer(colors_of(coloring, shades))}
    picture = picture_of(coloring, shades) if picture is None else picture
    if output in ("ora", "psd"):
        write = write_openraster if output == "ora" else write_psd
        return {output: write(picture, layers_of(coloring, shades))}
    made = {"image": encode_png(picture, FAST_COMPRESSION)}
    if output == "both":
        made["color_layer"] = _color_layer(colors_of(coloring, shades))
    if output == "layers":
        made["flats"] = encode_png(coloring.flats, FAST_COMPRESSION)
        made["lines"] = encode_png(coloring.drawing.pixels, FAST_COMPRESSION)
        made["labels"] = _labels(coloring)
        if shades is not None:
            made["shading"] = encode_png(shades.shading, FAST_COMPRESSION)
            if shades.highlights is not None:
                made["highlights"] = encode_png(shades.highlights, FAST_COMPRESSION)
    return made


def _color_layer(colors: Pixels) -> bytes:
    """Return colors as RGBA; white is transparent."""
    opacity = np.where((colors < 255).any(axis=2, keepdims=True), np.uint8(255), np.uint8(0))
    return encode_png(np.concatenate([colors, opacity], axis=2), FAST_COMPRESSION)


def _labels(coloring: Coloring) -> bytes:
    """Return the ids of the regions as a gray PNG of 16 bits; raise an ImageError if there are too many for 16 bits."""
    if len(coloring.regions) > MAX_IDS:
        found = f"has {len(coloring.regions)} regions"
        raise ImageError("sketch", found, f"at most {MAX_IDS} with output=layers; use output=ora, psd or flat")
    buffer = io.BytesIO()
    Image.fromarray(coloring.labels.astype(np.uint16)).save(buffer, "PNG", compress_level=FAST_COMPRESSION)
    return buffer.getvalue()
