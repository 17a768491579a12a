"""Decoding of uploaded images to arrays, and rendering of the network's picture to the PNG of the response."""

from __future__ import annotations

from typing import Literal

import numpy as np

from animediffusion.platform.errors import ImageError
from animediffusion.platform.images.codec import decode_alpha, decode_rgb, encode_png, letterbox
from animediffusion.serve.rendering.sketch import Drawing, Pixels, has_lines, looks_inverted, read_drawing
from animediffusion.serve.rendering.upsample import layer_of, to_picture

Output = Literal["image", "color_layer", "both"]
Size = Literal["native", "model"]

UPLOADED_FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 25_000_000
MIN_SIDE_PX = 8
MAX_ASPECT = 16
FAST_COMPRESSION = 3
"""PNG compression level of responses: low, because a client waits for them."""


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


def render(painted: Pixels, drawing: Drawing, *, output: Output = "image", size: Size = "native") -> dict[str, bytes]:
    """Return the requested PNGs by name: `image` is the finished picture, `color_layer` its colors without lines, RGBA.

    Args:
        painted: the network's picture [S, S, 3] of the letterboxed sketch.
        drawing: the sketch.
        output: the PNGs to return: one of the two, or both.
        size: size of the PNGs. `native` is the size of the sketch, and `image` is `color_layer` times the sketch.
            `model` is the square of the network, and `image` is the unchanged picture of the network with its lines.
    """
    if (output, size) == ("image", "model"):
        return {"image": encode_png(painted, FAST_COMPRESSION)}
    drawing = drawing if size == "native" else read_drawing(letterbox(drawing.pixels, len(painted))[0])
    layer = layer_of(painted, drawing)
    made: dict[str, bytes] = {}
    if output != "color_layer":
        made["image"] = encode_png(to_picture(layer, drawing) if size == "native" else painted, FAST_COMPRESSION)
    if output != "image":
        made["color_layer"] = encode_png(layer, FAST_COMPRESSION)
    return made
