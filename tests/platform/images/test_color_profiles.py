"""Colors that a profile describes come out as LittleCMS converts them to sRGB."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms
from pngs import GRAY_ALPHA, LINEAR_GRAY, RGB, WIDE, chunk, deep, ink_profile, saved

from animediffusion.platform.images.codec import decode_gray, decode_rgb
from animediffusion.platform.images.color_profiles import to_srgb

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def colors() -> Image.Image:
    """Flat areas of many colors, which JPEG keeps."""
    areas = np.random.default_rng(3).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(areas.repeat(16, 0).repeat(16, 1))


def converted(image: Image.Image, profile: bytes) -> np.ndarray:
    source, target = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
    made = ImageCms.profileToProfile(image, source, target, renderingIntent=1, outputMode="RGB")
    return np.asarray(made, int)


@pytest.mark.parametrize(
    "options",
    [{"kind": "PNG"}, {"kind": "JPEG", "quality": 95}, {"kind": "WEBP", "lossless": True}, {"kind": "TIFF"}],
    ids=lambda options: options["kind"],
)
def test_a_wide_profile_is_converted_in_every_format(options: dict) -> None:
    data = saved(colors(), icc_profile=WIDE, **options)
    plain = Image.open(io.BytesIO(data)).convert("RGB")

    assert np.abs(decode_rgb(data) - converted(plain, WIDE)).max() <= 2
    assert np.abs(decode_rgb(data).astype(int) - np.asarray(plain)).max() > 40


def test_a_turned_picture_is_converted_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6

    turned = decode_rgb(saved(colors(), "PNG", exif=exif, icc_profile=WIDE))

    assert np.abs(turned - converted(colors().transpose(Image.Transpose.ROTATE_270), WIDE)).max() <= 2


def test_colors_are_converted_before_they_lie_over_white() -> None:
    image = colors()
    image.putalpha(128)
    half = (converted(colors(), WIDE) * 128 + 255 * 127) / 255

    assert np.abs(decode_rgb(saved(image, icc_profile=WIDE)) - half).max() <= 2


def test_a_palette_is_converted_by_the_profile_of_its_colors() -> None:
    image = colors().quantize(48)

    assert np.abs(decode_rgb(saved(image, icc_profile=WIDE)) - converted(image.convert("RGB"), WIDE)).max() <= 2


def test_gray_of_8_and_16_bits_is_converted_by_a_gray_profile() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    wanted = converted(Image.fromarray(ramp), LINEAR_GRAY)[..., 0]
    stored = Image.fromarray(ramp.astype(np.uint16) * 257)

    assert np.abs(decode_gray(saved(Image.fromarray(ramp), icc_profile=LINEAR_GRAY)) - wanted).max() <= 2
    assert np.abs(decode_gray(saved(stored, icc_profile=LINEAR_GRAY)) - wanted).max() <= 2
    assert wanted[4, 0] > 120  # 64 of 255 in linear light


def test_16_bit_color_and_gray_with_alpha_are_converted() -> None:
    embedded = chunk(b"iCCP", b"p\0\0" + zlib.compress(WIDE)), chunk(b"iCCP", b"p\0\0" + zlib.compress(LINEAR_GRAY))
    pixels = np.asarray(colors()).astype(np.uint16) * 257
    half = np.stack([np.full((4, 4), 64 * 257), np.full((4, 4), 65535)], -1)

    assert np.abs(decode_rgb(deep(pixels, RGB, embedded[0])) - converted(colors(), WIDE)).max() <= 2
    assert decode_gray(deep(half, GRAY_ALPHA, embedded[1]))[0, 0] > 120


@pytest.mark.parametrize(
    "foreign", [b"no profile at all" * 20, WIDE[:200], LINEAR_GRAY, b""], ids=["text", "cut", "gray", "none"]
)
def test_a_damaged_or_foreign_profile_changes_nothing(foreign: bytes) -> None:
    assert np.array_equal(decode_rgb(saved(colors(), icc_profile=foreign)), np.asarray(colors()))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_inks_are_converted_by_their_profile(kind: str) -> None:
    data = saved(
        colors().convert("CMYK"), kind, icc_profile=ink_profile(), **({"quality": 95} if kind == "JPEG" else {})
    )
    inks = Image.open(io.BytesIO(data))

    assert inks.mode == "CMYK"
    assert np.abs(decode_rgb(data) - converted(inks, ink_profile())).max() <= 2
    assert np.abs(decode_rgb(data).astype(int) - np.asarray(inks.convert("RGB"))).max() > 40


def test_cmyk_is_left_to_pillow_without_a_profile_of_its_own() -> None:
    cmyk = colors().convert("CMYK")

    assert np.array_equal(decode_rgb(saved(cmyk, "TIFF", icc_profile=WIDE)), np.asarray(cmyk.convert("RGB")))


def test_srgb_costs_nothing() -> None:
    image = colors()

    assert to_srgb(image, SRGB) is image
