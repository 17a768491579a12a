"""From uploaded bytes to a job's arrays, and from the network's picture to the PNG that is sent back."""

from __future__ import annotations

from typing import Literal

from animediffusion.platform.errors import ImageError
from animediffusion.platform.images import decode_rgb, encode_png, letterbox
from animediffusion.serve.lines import Drawing, Pixels, looks_inverted, read_drawing
from animediffusion.serve.resolution import color_layer, to_picture, to_rgba

Output = Literal["image", "color_layer"]
Size = Literal["native", "model"]

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 25_000_000
MIN_SIDE_PX = 8
MAX_ASPECT = 16


def read_sketch(data: bytes, *, thing: str = "sketch") -> Drawing:
    """The drawing in an image file.

    Raises:
        ImageError: unreadable, too large, too small, too long and thin, or light lines on a dark ground.
    """
    pixels = read_picture(data, thing=thing)
    if looks_inverted(pixels):
        raise ImageError(thing, "is mostly black", "invert it: dark lines on light paper")
    return read_drawing(pixels)


def read_picture(data: bytes, *, thing: str = "reference") -> Pixels:
    """RGB pixels of an image file of a usable size; raises ImageError."""
    pixels = decode_rgb(data, thing=thing, max_pixels=MAX_PIXELS, formats=FORMATS)
    short, long = sorted(pixels.shape[:2])
    if short < MIN_SIDE_PX or long > MAX_ASPECT * short:
        allowed = f"sides of at least {MIN_SIDE_PX} px, at most {MAX_ASPECT} times as long as wide"
        raise ImageError(thing, f"is {pixels.shape[1]} x {pixels.shape[0]} pixels", allowed)
    return pixels


def render(painted: Pixels, drawing: Drawing, *, output: Output = "image", size: Size = "native") -> bytes:
    """PNG of the finished picture, or of its color layer.

    Args:
        painted: the network's picture [S, S, 3] of the letterboxed sketch.
        drawing: the sketch.
        output: `image`, or `color_layer`: RGBA without lines, whose multiplication with the sketch is `image`.
        size: `native` is the sketch's own; `model` is the network's square, `image` then being its picture as it is.
    """
    if size == "model":
        if output == "image":
            return encode_png(painted)
        drawing = read_drawing(letterbox(drawing.pixels, len(painted))[0])
    layer = to_rgba(color_layer(painted, drawing))
    return encode_png(layer if output == "color_layer" else to_picture(layer, drawing))


def render_both(painted: Pixels, drawing: Drawing, *, size: Size = "native") -> tuple[bytes, bytes]:
    """What `render` gives as picture and as color layer, the layer made once."""
    if size == "model":
        return encode_png(painted), render(painted, drawing, output="color_layer", size=size)
    layer = to_rgba(color_layer(painted, drawing))
    return encode_png(to_picture(layer, drawing)), encode_png(layer)
