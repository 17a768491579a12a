"""From uploaded bytes to a job's arrays, and from the network's picture to the PNG that is sent back."""

from __future__ import annotations

from typing import Literal

import numpy as np

from animediffusion.platform.errors import ImageError
from animediffusion.platform.images.codec import decode_alpha, decode_rgb, encode_png, letterbox
from animediffusion.serve.rendering.sketch import Drawing, Pixels, has_lines, looks_inverted, read_drawing
from animediffusion.serve.rendering.upsample import layer_of, to_picture

Output = Literal["image", "color_layer", "both"]
Size = Literal["native", "model"]

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 25_000_000
MIN_SIDE_PX = 8
MAX_ASPECT = 16
QUICK = 3
"""Compression of answers: somebody waits for them."""


def read_sketch(data: bytes, *, thing: str = "sketch") -> Drawing:
    """The drawing in an image file.

    Raises:
        ImageError: unreadable, too large, too small, too long and thin, without lines, or light lines on a dark ground.
    """
    pixels = read_picture(data, thing=thing)
    if looks_inverted(pixels):
        found = "is mostly black or has light lines on a dark ground"
        raise ImageError(thing, found, "invert it: dark lines on light paper")
    drawing = read_drawing(pixels)
    if not has_lines(drawing):
        alpha = decode_alpha(data, thing=thing, max_pixels=MAX_PIXELS, formats=FORMATS)
        hint = "light lines on transparency: make them dark" if np.ptp(alpha) else "give dark lines on light paper"
        raise ImageError(thing, "has no lines", hint)
    return drawing


def read_picture(data: bytes, *, thing: str = "reference") -> Pixels:
    """RGB pixels of an image file of a usable size; raises ImageError."""
    pixels = decode_rgb(data, thing=thing, max_pixels=MAX_PIXELS, formats=FORMATS)
    short, long = sorted(pixels.shape[:2])
    if short < MIN_SIDE_PX or long > MAX_ASPECT * short:
        allowed = f"sides of at least {MIN_SIDE_PX} px, at most {MAX_ASPECT} times as long as wide"
        raise ImageError(thing, f"is {pixels.shape[1]} x {pixels.shape[0]} pixels", allowed)
    return pixels


def render(painted: Pixels, drawing: Drawing, *, output: Output = "image", size: Size = "native") -> dict[str, bytes]:
    """PNGs of what was asked for: `image` is the finished picture, `color_layer` the same without lines, RGBA.

    Args:
        painted: the network's picture [S, S, 3] of the letterboxed sketch.
        drawing: the sketch.
        output: one of them, or both.
        size: `native` is the sketch's own, and color_layer times the sketch is image; `model` is the network's square,
            and image its picture as it is, lines included.
    """
    if (output, size) == ("image", "model"):
        return {"image": encode_png(painted, QUICK)}
    drawing = drawing if size == "native" else read_drawing(letterbox(drawing.pixels, len(painted))[0])
    layer = layer_of(painted, drawing)
    made: dict[str, bytes] = {}
    if output != "color_layer":
        made["image"] = encode_png(to_picture(layer, drawing) if size == "native" else painted, QUICK)
    if output != "image":
        made["color_layer"] = encode_png(layer, QUICK)
    return made
