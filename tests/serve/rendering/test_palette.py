import struct

import numpy as np
import pytest

from animediffusion.platform.errors import ConfigError
from animediffusion.serve.rendering.palette import MAX_COLORS, dominant_colors, read_palette

GIMP = "GIMP Palette\nName: Sheet\nColumns: 2\n# skin\n255 224 189\tskin\n 10  20  30 dark hair\n0 0 0 Untitled\n"


def ase(*colors: tuple[str, bytes, tuple[float, ...]]) -> bytes:
    """An Adobe Swatch Exchange file of these colors (name, model, values), all in one group."""
    blocks = [struct.pack(">HIHH", 0xC001, 4, 1, 0)]
    for name, model, values in colors:
        content = struct.pack(">H", len(name) + 1) + (name + "\0").encode("utf-16-be") + model
        content += struct.pack(f">{len(values)}f", *values) + struct.pack(">H", 2)
        blocks.append(struct.pack(">HI", 1, len(content)) + content)
    blocks.append(struct.pack(">HI", 0xC002, 0))
    return b"ASEF" + struct.pack(">HHI", 1, 0, len(blocks)) + b"".join(blocks)


def test_hex_colors_keep_their_order():
    assert read_palette("#FFE0BD,#0a141e").colors == ((255, 224, 189), (10, 20, 30))
    assert read_palette(b"#FFE0BD\n#0A141E\n#FFE0BD").colors == ((255, 224, 189), (10, 20, 30))


def test_gimp_palettes_have_names():
    palette = read_palette(GIMP.encode())
    assert palette.colors == ((255, 224, 189), (10, 20, 30), (0, 0, 0))
    assert palette.names == ("skin", "dark hair", "")


def test_a_palette_is_parsed_once():
    for data in (GIMP.encode(), "#0b151f,#C96533"):
        assert read_palette(data) is read_palette(data, thing="palette")


def test_adobe_swatches_of_every_model():
    data = ase(
        ("skin", b"RGB ", (1, 224 / 255, 189 / 255)),
        ("ink", b"Gray", (0.2,)),
        ("cyan", b"CMYK", (1, 0, 0, 0.5)),
        ("white", b"LAB ", (1, 0, 0)),
        ("red", b"LAB ", (0.5429, 80.8, 69.9)),  # sRGB's red, relative to D50
    )
    palette = read_palette(data)
    assert palette.names == ("skin", "ink", "cyan", "white", "red")
    assert palette.colors[:4] == ((255, 224, 189), (51, 51, 51), (0, 128, 128), (255, 255, 255))
    assert np.abs(np.subtract(palette.colors[4], (255, 0, 0))).max() <= 2


@pytest.mark.parametrize(
    ("data", "found"),
    [
        ("", "has no color"),
        ("GIMP Palette\nName: empty\n", "has no color"),
        (ase(), "has no color"),
        ("#12345", "'#12345' is not a color"),
        ("red", "'red' is not a color"),
        ("GIMP Palette\n255 300 0\n", "line 2 is '255 300 0'"),
        (",".join(f"#0000{i % 256:02x},#00{i // 256 + 1:02x}{i % 256:02x}" for i in range(300)), "colors"),
        (ase(("a", b"RGB ", (1, 1, 1)))[:-20], "is a truncated .ase file"),
        (b"ASEF\0\1", "is a truncated .ase file"),
        (ase(("a", b"HSB ", (1, 1, 1))), "has a color of the model 'HSB '"),
        (ase(("a", b"Gray", (float("nan"),))), "has a color that is not a number"),
        (b"\x89PNG\r\n\x1a\n", "is not a palette"),
    ],
)
def test_bad_palettes_are_one_line(data: str | bytes, found: str):
    with pytest.raises(ConfigError) as caught:
        read_palette(data, thing="palette")
    assert found in str(caught.value)
    assert "\n" not in str(caught.value)


def test_most_colors_of_a_palette():
    assert len(read_palette(",".join(f"#0000{i:02x}" for i in range(MAX_COLORS))).colors) == MAX_COLORS


def model_sheet() -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """Flat areas with black lines between them, and their colors by area."""
    colors = [(250, 224, 200), (120, 60, 40), (235, 205, 180), (30, 90, 200)]
    sheet = np.zeros((300, 400, 3), np.uint8)
    sheet[:, 2:198], sheet[:, 202:298], sheet[:, 302:360], sheet[:, 364:] = colors
    return sheet, colors


def test_flats_of_a_model_sheet_are_exact():
    sheet, colors = model_sheet()
    assert dominant_colors(sheet).colors[:4].tolist() == [list(color) for color in colors]


def test_noise_does_not_split_a_color():
    sheet, colors = model_sheet()
    noise = np.rint(np.random.default_rng(0).normal(0, 2, sheet.shape))
    found = dominant_colors(np.clip(sheet + noise, 0, 255).astype(np.uint8)).colors[:4]
    assert np.abs(np.subtract(found, colors)).max() <= 3
