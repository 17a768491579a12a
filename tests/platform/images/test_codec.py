"""Image bytes to pixels and back, every bad input included."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from animediffusion.platform.errors import ImageError
from animediffusion.platform.images.codec import (
    contact_sheet,
    decode_gray,
    decode_rgb,
    encode_lossless,
    encode_png,
    fit_square,
    letterbox,
    letterbox_points,
    unletterbox,
)


def picture(height=24, width=32):
    rng = np.random.default_rng(0)
    return np.array(Image.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8)).resize((width, height)))


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width, height):
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def reason_of(data, **options):
    with pytest.raises(ImageError) as caught:
        decode_rgb(data, thing="a.png", **options)
    assert str(caught.value).startswith("a.png: ")
    assert "\n" not in str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize("encode", [encode_png, encode_lossless])
@pytest.mark.parametrize("size", [(1, 1), (24, 32), (64, 64)])
def test_lossless_bytes_give_the_same_pixels_back(encode, size):
    rgb = picture(*size)
    assert np.array_equal(decode_rgb(encode(rgb)), rgb)
    assert np.array_equal(decode_gray(encode(rgb[..., 0])), rgb[..., 0])


def test_no_bytes_are_empty():
    assert reason_of(b"") == "empty"


def test_text_named_png_is_not_an_image():
    assert reason_of(b"this is a shopping list, not a picture\n" * 9) == "not_an_image"
    assert reason_of(b"RIFF\x10\x00\x00\x00WAVEfmt ") == "not_an_image"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "tiff_lzw"])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.95])
def test_a_file_cut_off_anywhere_is_truncated(kind, part):
    options = {"compression": kind} if kind.islower() else {}
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (99, 99, 3), np.uint8))
    data = saved(image, "TIFF" if options else kind, **options)
    assert reason_of(data[: max(12, int(len(data) * part))]) == "truncated"


def test_a_webp_that_ends_in_zeros_is_truncated():
    noise = np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)
    frames = {"save_all": True, "append_images": [Image.fromarray(noise[::-1])]}
    for data in (saved(Image.fromarray(noise), "WEBP"), saved(Image.fromarray(noise), "WEBP", **frames)):
        size = struct.unpack("<I", data[data.index(b"VP8 ") + 4 :][:4])[0]
        end = data.index(b"VP8 ") + 8 + size
        for part in (0.3, 0.5, 0.8):
            start = end - round((1 - part) * size)
            with pytest.raises(ImageError) as caught:
                decode_rgb(data[:start] + bytes(end - start) + data[end:])
            assert str(caught.value) == "image: ends in zero bytes; copy or download it again"
            assert caught.value.reason == "truncated"


@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_webp_of_one_color_may_end_in_some_zeros(level):
    flat = np.full((2000, 2000, 3), level, np.uint8)
    flat[:8] = np.random.default_rng(0).integers(0, 255, (8, 2000, 3))
    for quality in (0, 80, 100):
        assert decode_rgb(saved(Image.fromarray(flat), "WEBP", quality=quality)).shape == flat.shape


def test_a_png_with_damaged_pixels_is_unreadable():
    data = bytearray(encode_png(np.random.default_rng(1).integers(0, 255, (64, 64, 3), np.uint8)))
    data[200:260] = b"\xff" * 60
    assert reason_of(bytes(data)) == "unreadable"


def test_a_header_of_40000_by_40000_raises_image_error_before_decoding():
    assert reason_of(png_header(40_000, 40_000)) == "too_large"


def test_more_pixels_than_allowed_raise_image_error_before_decoding():
    assert reason_of(png_header(9_000, 9_000)) == "too_large"
    assert reason_of(encode_png(picture(24, 32)), max_pixels=24 * 32 - 1) == "too_large"
    assert decode_rgb(encode_png(picture(24, 32)), max_pixels=24 * 32).shape == (24, 32, 3)


def test_a_format_that_is_not_allowed_is_not_an_image():
    data = saved(Image.new("RGB", (8, 8)), "BMP")
    assert decode_rgb(data).shape == (8, 8, 3)
    assert reason_of(data, formats=("PNG", "JPEG", "WEBP")) == "not_an_image"


def test_cmyk_becomes_rgb():
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    pixel = decode_rgb(saved(red, "JPEG", quality=95))[8, 8].astype(int)
    assert pixel[0] > 200
    assert max(pixel[1:]) < 60


def test_16_bit_gray_keeps_its_levels():
    values = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    data = saved(Image.fromarray(values))
    assert np.array_equal(decode_gray(data).ravel(), np.arange(256))
    assert np.array_equal(decode_rgb(data)[..., 2].ravel(), np.arange(256))


def test_16_bit_rgb_is_read():
    raw = b"".join(b"\0" + b"\xff\xff\x80\x80\x00\x00" * 4 for _ in range(4))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    body = (struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks)
    assert decode_rgb(b"\x89PNG\r\n\x1a\n" + b"".join(body))[2, 2].tolist() == [255, 128, 0]


def test_float_tiff_is_read():
    data = saved(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF")
    assert decode_gray(data)[0, 0] in (127, 128)


def test_palette_and_its_transparency_are_read():
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 255, 200, 0, 0])
    image.putdata([0, 1])
    assert decode_rgb(saved(image)).tolist() == [[[0, 0, 255], [200, 0, 0]]]
    assert decode_rgb(saved(image, transparency=0)).tolist() == [[[255, 255, 255], [200, 0, 0]]]


def test_transparency_lies_over_white():
    image = Image.new("RGBA", (3, 1))
    image.putdata([(0, 0, 0, 0), (0, 0, 0, 128), (9, 8, 7, 255)])
    assert decode_rgb(saved(image)).tolist() == [[[255] * 3, [127] * 3, [9, 8, 7]]]
    assert decode_gray(saved(image.convert("LA")))[0, 0] == 255


def test_one_bit_and_gray_images_are_read():
    assert decode_rgb(saved(Image.new("1", (4, 4), 1)))[0, 0].tolist() == [255] * 3
    assert decode_rgb(saved(Image.new("L", (4, 4), 77)))[0, 0].tolist() == [77] * 3


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    image = Image.new("RGB", (40, 20), (255, 255, 255))
    image.paste((255, 0, 0), (0, 0, 20, 20))
    turned = decode_rgb(saved(image, "JPEG", exif=exif, quality=95))
    assert turned.shape == (40, 20, 3)
    assert turned[5, 10, 1] < 30
    assert turned[35, 10, 1] > 220


def test_pixels_with_damaged_exif_are_accepted():
    data = saved(Image.new("RGB", (8, 8), (1, 2, 3)), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode_rgb(data).shape == (8, 8, 3)


@pytest.mark.parametrize("shape", [(30, 90, 3), (90, 30, 3), (64, 64, 3), (90, 31)])
def test_fit_square_keeps_the_middle(shape):
    array = np.zeros(shape, np.uint8)
    array[shape[0] // 3 : -(shape[0] // 3), shape[1] // 3 : -(shape[1] // 3)] = 200
    square = fit_square(array, 16)
    assert square.shape == (16, 16, *shape[2:])
    assert (square[8, 8] > 150).all()


def test_fit_square_without_crop_shows_everything():
    square = fit_square(np.zeros((10, 40, 3), np.uint8), 20, crop=False)
    assert square[0, 0].tolist() == [255] * 3
    assert square[10, 0].tolist() == square[10, 19].tolist() == [0, 0, 0]


@pytest.mark.parametrize("shape", [(50, 200, 3), (200, 50, 3), (64, 64), (333, 217, 3), (1, 900, 3)])
def test_a_letterboxed_picture_comes_back_at_its_size(shape):
    gradient = np.linspace(0, 255, shape[1]).astype(np.uint8)[None, :]
    gradient = gradient if len(shape) == 2 else gradient[..., None]
    array = np.broadcast_to(gradient, shape).copy()
    square, box = letterbox(array, 64)
    assert square.shape == (64, 64, *shape[2:])
    back = unletterbox(square, box)
    assert back.shape == array.shape
    assert np.abs(back.astype(int) - array).mean() < 6


def test_a_box_also_fits_a_larger_square():
    square, box = letterbox(picture(30, 60), 32)
    assert unletterbox(fit_square(square, 128), box).shape == (30, 60, 3)


def test_a_contact_sheet_holds_gray_and_color_rows_of_any_length():
    row = [picture(64, 64), picture(64, 64)[..., 0], picture(20, 64)]
    sheet = contact_sheet([row, row[:2]], ["target", "sketch", "reference"])
    assert sheet.dtype == np.uint8
    assert sheet.shape[1] > 3 * 128
    assert sheet.shape[0] > 2 * 128
    assert contact_sheet([], ["target"]).ndim == 3


def test_a_contact_sheet_names_its_rows_on_the_left_and_leaves_gaps_empty():
    row = [picture(64, 64), picture(64, 64)]
    plain = contact_sheet([row, row], ["sketch", "result"])
    named = contact_sheet([row, [None, row[1]]], ["sketch", "result"], names=["first", "second"])
    added = named.shape[1] - plain.shape[1]
    assert named.shape[0] == plain.shape[0]
    assert added > 0
    first, gap, paper = 30, plain.shape[1] // 2, plain[0, 0]
    lower = np.s_[plain.shape[0] // 2 + 40 :]
    assert np.array_equal(named[:, added + gap :], plain[:, gap:])
    assert (named[lower, added + first : added + gap] == paper).all()
    assert (named[lower, :added] != paper).any()


def test_points_move_with_a_letterboxed_picture():
    picture = np.full((30, 60, 3), 255, np.uint8)
    spots = [(0, 0, "a"), (59, 29, "b"), (31, 4, "c")]
    for x, y, _ in spots:
        picture[y, x] = 0
    square, _ = letterbox(picture, 60)
    moved = letterbox_points(spots, 30, 60, 60)
    assert [value for *_, value in moved] == ["a", "b", "c"]
    assert all(not square[y, x].any() for x, y, _ in moved)
    assert [(x, y) for x, y, _ in letterbox_points(spots, 30, 60, 16)] == [(0, 4), (15, 11), (8, 5)]
