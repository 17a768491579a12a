"""Files with layers: what is in them, and that other programs flatten them to the finished picture."""

import io
import re
import zipfile
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from psd_tools import PSDImage
from psd_tools.constants import BlendMode

from animediffusion.platform.errors import ImageError
from animediffusion.serve.rendering import layers
from animediffusion.serve.rendering.coloring import Coloring, Region
from animediffusion.serve.rendering.formats.openraster import write_openraster
from animediffusion.serve.rendering.formats.psd import pack_rows, write_psd
from animediffusion.serve.rendering.layers import Layer, LayerGroup, layers_of, picture_of, shades_of
from animediffusion.serve.rendering.render import render
from animediffusion.serve.rendering.sketch import read_drawing

COMPOSITE_OPS = {"svg:src-over", "svg:multiply", "svg:screen"}
"""Those of the specification that our files use."""


def coloring_of(labels, colors, shading=None, names=None):
    """Return a coloring of a drawing with gray and blue lines on yellowish paper."""
    height, width = labels.shape
    pixels = np.full((height, width, 3), (252, 248, 236), np.uint8)
    pixels[:, width // 2] = (20, 20, 20)
    pixels[height // 3 : height // 3 + 2] = (90, 110, 160)
    regions = []
    for number, color in enumerate(colors, start=1):
        y, x = np.nonzero(labels == number)
        box = (int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1)
        regions.append(Region(number, names[number - 1] if names else "", color, len(y), box))
    return Coloring(read_drawing(pixels), labels, tuple(regions), shading)


@pytest.fixture(scope="module")
def coloring():
    """Four regions, of which two have a name and two have the same color; the shading also lightens."""
    y, x = np.mgrid[:70, :50]
    labels = 1 + (np.hypot(x - 25, y - 35) < 20) + (np.hypot(x - 25, y - 35) < 10) + 3 * (y > 60)
    labels = np.minimum(labels, 4).astype(np.int32)
    shading = 1 + 0.6 * np.sin(x / 5)[..., None] * np.cos(y / np.array([7, 9, 11])[:, None, None]).transpose(1, 2, 0)
    colors = [(255, 255, 255), (201, 30, 90), (250, 210, 3), (255, 255, 255)]
    return coloring_of(labels, colors, shading.astype(np.float32), ["region 1", "hair", "skin", ""])


@pytest.fixture(scope="module")
def picture(coloring):
    return picture_of(coloring, shades_of(coloring))


@pytest.fixture(scope="module")
def ora(coloring, picture):
    return opened(write_openraster(picture, layers_of(coloring, shades_of(coloring))))


@pytest.fixture(scope="module")
def psd(coloring, picture):
    return PSDImage.open(io.BytesIO(write_psd(picture, layers_of(coloring, shades_of(coloring)))))


def opened(data):
    return zipfile.ZipFile(io.BytesIO(data))


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def blended(below, above, operation):
    """Composite RGBA floats over RGBA floats as the W3C's Compositing and Blending Level 1 says."""
    cb, ab, cs, alpha = below[..., :3], below[..., 3:], above[..., :3], above[..., 3:]
    mixed = {"svg:src-over": cs, "svg:multiply": cb * cs, "svg:screen": cb + cs - cb * cs}[operation]
    out = alpha + ab * (1 - alpha)
    color = alpha * ((1 - ab) * cs + ab * mixed) + (1 - alpha) * ab * cb
    return np.concatenate([color / np.maximum(out, 1e-9), out], axis=2)


def flattened(archive, stack, size):
    """Composite a stack of an OpenRaster file, [H, W, 4] in [0, 1]."""
    canvas = np.zeros((*size, 4))
    for entry in reversed(stack):
        if entry.get("visibility") == "hidden":
            continue
        if entry.tag == "stack":
            layer = flattened(archive, entry, size)
        else:
            part = np.asarray(Image.open(archive.open(entry.get("src"))).convert("RGBA")) / 255
            left, top = int(entry.get("x", 0)), int(entry.get("y", 0))
            layer = np.zeros((*size, 4))
            layer[top : top + len(part), left : left + part.shape[1]] = part
        canvas = blended(canvas, layer, entry.get("composite-op", "svg:src-over"))
    return canvas


def test_the_picture_is_the_flats_with_shading_and_lines(coloring, picture):
    exact = np.clip(coloring.flats * coloring.shading, 0, 255) * (coloring.drawing.pixels / 255)
    assert np.abs(exact - picture).max() <= 1.5


def test_without_shading_a_region_has_exactly_its_color(coloring):
    flat = replace(coloring, shading=None)
    picture = picture_of(flat, shades_of(flat))
    white = replace(flat, drawing=read_drawing(np.full_like(flat.drawing.pixels, 255)))
    assert (picture_of(white, None) == flat.flats).all()
    assert (picture <= flat.flats).all()
    assert [layer.name for layer in layers_of(flat, None)] == ["Line art", "Flats", "Region ids"]


def test_an_openraster_file_has_the_files_of_the_specification(ora, picture):
    assert ora.testzip() is None
    first, *rest = ora.infolist()
    assert (first.filename, first.compress_type, first.extra) == ("mimetype", zipfile.ZIP_STORED, b"")
    assert ora.read("mimetype") == b"image/openraster"
    names = {info.filename for info in rest}
    assert names >= {"stack.xml", "mergedimage.png", "Thumbnails/thumbnail.png"}
    assert all(info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for info in rest)
    sources = [layer.get("src") for layer in ElementTree.fromstring(ora.read("stack.xml")).iter("layer")]
    assert {name for name in names if name.startswith("data/")} == set(sources)
    assert len(sources) == len(set(sources))
    assert (pixels(ora.read("mergedimage.png")) == picture).all()
    thumbnail = Image.open(ora.open("Thumbnails/thumbnail.png"))
    assert (thumbnail.format, thumbnail.mode, thumbnail.size) == ("PNG", "RGB", (50, 70))


def test_a_thumbnail_is_at_most_256_pixels_large():
    big = np.full((300, 600, 3), 200, np.uint8)
    data = write_openraster(big, [Layer("one", (0, 0, 600, 300), lambda: big)])
    assert pixels(opened(data).read("Thumbnails/thumbnail.png")).shape == (128, 256, 3)


def test_a_stack_follows_the_specification(ora):
    """The published RELAX NG contradicts the text and the example next to it, so this tests what the text requires."""
    assert ora.read("stack.xml").startswith(b"<?xml version='1.0' encoding='UTF-8'?>")
    root = ElementTree.fromstring(ora.read("stack.xml"))
    assert root.tag == "image"
    assert (root.attrib["w"], root.attrib["h"]) == ("50", "70")
    assert re.fullmatch(r"0\.0\.[4-9]", root.attrib["version"])
    assert set(root.attrib) <= {"version", "w", "h", "xres", "yres", "name"}
    [stack] = root
    assert (stack.tag, stack.attrib) == ("stack", {})
    for entry in stack.iter():
        if entry is stack:
            continue
        common = {"name", "opacity", "visibility", "composite-op"}
        if entry.tag == "stack":
            assert set(entry.attrib) <= common | {"isolation"}
            assert entry.get("isolation", "isolate") in ("isolate", "auto")
            assert len(entry) > 0
        else:
            assert entry.tag == "layer"
            assert set(entry.attrib) <= common | {"x", "y", "src"}
            assert len(entry) == 0
            assert int(entry.get("x", 0)) >= 0 <= int(entry.get("y", 0))
        assert entry.get("visibility", "visible") in ("visible", "hidden")
        assert entry.get("composite-op", "svg:src-over") in COMPOSITE_OPS


def test_the_layers_of_both_files_have_the_same_names_modes_and_order(ora, psd):
    expected = [
        ("Line art", "svg:multiply", True),
        ("Highlights", "svg:screen", True),
        ("Shading", "svg:multiply", True),
        ("Flats", "svg:src-over", True),
        ("Region ids", "svg:src-over", False),
    ]
    [stack] = ElementTree.fromstring(ora.read("stack.xml"))
    found = [
        (one.get("name"), one.get("composite-op", "svg:src-over"), one.get("visibility") != "hidden") for one in stack
    ]
    assert found == expected
    names = {BlendMode.MULTIPLY: "svg:multiply", BlendMode.SCREEN: "svg:screen", BlendMode.NORMAL: "svg:src-over"}
    assert [(one.name, names[one.blend_mode], one.visible) for one in reversed(psd)] == expected
    parts = ["skin", "hair", "#ffffff"]  # The smallest is the uppermost.
    assert [one.get("name") for one in stack.find("stack")] == parts
    [group] = [one for one in psd if one.is_group()]
    assert [one.name for one in reversed(group)] == parts


def test_flattened_files_are_the_picture(ora, psd, picture):
    [stack] = ElementTree.fromstring(ora.read("stack.xml"))
    merged = flattened(ora, stack, picture.shape[:2])
    assert (merged[..., 3] == 1).all()
    assert np.abs(255 * merged[..., :3] - picture).max() <= 2
    assert (np.asarray(psd.topil().convert("RGB")) == picture).all()
    composite = np.asarray(psd.composite(force=True).convert("RGB")).astype(int)
    assert np.abs(composite - picture).max() <= 2


def test_the_layers_of_a_photoshop_document_are_those_of_the_openraster_file(ora, psd):
    from_psd = {one.name: one for one in psd.descendants() if not one.is_group()}
    for entry in ElementTree.fromstring(ora.read("stack.xml")).iter("layer"):
        layer = from_psd.pop(entry.get("name"))
        assert (layer.left, layer.top) == (int(entry.get("x")), int(entry.get("y")))
        image = Image.open(ora.open(entry.get("src"))).convert("RGBA")
        assert (np.asarray(image) == np.asarray(layer.topil().convert("RGBA"))).all(), layer.name
    assert from_psd == {}


def test_the_hidden_layer_gives_the_id_of_each_region(psd, coloring):
    [ids] = [one for one in psd if one.name == "Region ids"]
    red, green, blue = np.moveaxis(np.asarray(ids.topil().convert("RGB")).astype(np.int64), 2, 0)
    inverse = pow(layers.ID_STEP, -1, 1 << 24)
    assert ((red * 65536 + green * 256 + blue) * inverse % (1 << 24) == coloring.labels).all()


def test_sixteen_thousand_regions_are_one_layer_of_flats():
    labels = 1 + np.arange(16_384, dtype=np.int32).reshape(128, 128)
    colors = [(number % 256, number // 256, 7) for number in range(16_384)]
    regions = tuple(
        Region(n + 1, "", color, 1, (n % 128, n // 128, n % 128 + 1, n // 128 + 1)) for n, color in enumerate(colors)
    )
    drawing = read_drawing(np.full((128, 128, 3), 255, np.uint8))
    many = Coloring(drawing, labels, regions, None)
    found = layers_of(many, None)
    assert [type(one) for one in found] == [Layer] * 3
    assert len(np.unique(found[2].draw().reshape(-1, 3), axis=0)) == 16_384
    psd = PSDImage.open(io.BytesIO(write_psd(picture_of(many, None), found)))
    assert (np.asarray(psd[1].topil().convert("RGB")) == many.flats).all()


def test_more_regions_than_ids_raise_image_error_only_where_ids_are_16_bits(monkeypatch):
    monkeypatch.setattr("animediffusion.serve.rendering.render.MAX_IDS", 1)
    pixels = np.full((64, 64, 3), 255, np.uint8)
    pixels[:, 30:33] = 0
    painted = np.full((64, 64, 3), 90, np.uint8)
    with pytest.raises(ImageError, match=r"^sketch: has 2 regions; at most 1 with output=layers; use output=ora"):
        render(painted, read_drawing(pixels), [painted], output="layers")
    assert render(painted, read_drawing(pixels), [painted], output="flat").regions is not None


def test_a_few_colors_are_a_layer_each_and_one_region_is_no_special_case():
    one = coloring_of(np.ones((9, 8), np.int32), [(1, 2, 3)])
    [_, group, _] = layers_of(one, None)
    assert isinstance(group, LayerGroup)
    assert [(layer.name, layer.box) for layer in group.layers] == [("#010203", (0, 0, 8, 9))]
    psd = PSDImage.open(io.BytesIO(write_psd(picture_of(one, None), layers_of(one, None))))
    composite = np.asarray(psd.composite(force=True).convert("RGB")).astype(int)
    assert np.abs(composite - picture_of(one, None)).max() <= 2


@pytest.mark.parametrize("name", ["Haar & Haut <1>", "\N{HIRAGANA LETTER KA}" * 40, "x" * 300, ""])
def test_a_layer_may_have_any_name(name):
    page = np.full((4, 6, 3), 50, np.uint8)
    found = [LayerGroup(name, (Layer(name, (0, 0, 6, 4), lambda: page),))]
    psd = PSDImage.open(io.BytesIO(write_psd(page, found)))
    assert (psd[0].name, psd[0][0].name) == (name, name)
    [stack] = ElementTree.fromstring(opened(write_openraster(page, found)).read("stack.xml"))
    assert [one.get("name") for one in stack.iter() if one is not stack] == [name, name]


def test_equal_layers_give_equal_files(coloring, picture):
    for write in (write_openraster, write_psd):
        first, second = (write(picture, layers_of(coloring, shades_of(coloring))) for _ in range(2))
        assert first == second


def unpacked(data, count):
    """Decode PackBits as Apple's Technical Note TN1023 says."""
    out, place = bytearray(), 0
    while place < len(data):
        head = data[place]
        assert head != 128
        if head < 128:
            out += data[place + 1 : place + head + 2]
            place += head + 2
        else:
            out += data[place + 1 : place + 2] * (257 - head)
            place += 2
    assert len(out) == count
    return bytes(out)


@pytest.mark.parametrize("kind", ["noise", "two levels", "constant", "runs"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 128), (4, 129), (40, 300), (3, 1000)])
def test_packed_rows_are_unpacked_to_the_same(kind, shape, monkeypatch):
    monkeypatch.setattr("animediffusion.serve.rendering.formats.psd.BLOCK_PIXELS", 700)
    random = np.random.default_rng(0)
    plane = {
        "noise": random.integers(0, 256, shape),
        "two levels": 255 * random.integers(0, 2, shape),
        "constant": np.full(shape, 7),
        "runs": np.repeat(random.integers(0, 256, shape), 5, axis=1)[:, : shape[1]],
    }[kind].astype(np.uint8)
    sizes, data = pack_rows(plane)
    ends = np.cumsum(sizes)
    assert ends[-1] == len(data)
    for row, end, size in zip(plane, ends, sizes, strict=True):
        assert unpacked(data[end - size : end], shape[1]) == row.tobytes()
        assert size <= shape[1] + -(-shape[1] // 128)


def test_a_part_of_several_colors_is_a_group_with_a_layer_for_each():
    labels = np.repeat(np.arange(1, 5, dtype=np.int32), 12)[:, None].repeat(30, axis=1)
    colors = [(200, 40, 90), (120, 20, 60), (250, 220, 200), (10, 60, 90)]
    coloring = coloring_of(labels, colors, names=["hair", "hair", "skin", "region 4"])
    picture, stack = picture_of(coloring, None), layers_of(coloring, None)
    archive = opened(write_openraster(picture, stack))
    document = PSDImage.open(io.BytesIO(write_psd(picture, stack)))
    flats = next(layer for layer in document if layer.name == "Flats")
    hair = next(layer for layer in flats if layer.name == "hair")
    assert {layer.name for layer in flats} == {"hair", "skin", "#0a3c5a"}
    assert {layer.name for layer in hair} == {"#c8285a", "#78143c"}
    [root] = ElementTree.fromstring(archive.read("stack.xml"))
    assert {layer.get("name") for layer in root.find("stack/stack[@name='hair']")} == {"#c8285a", "#78143c"}
    shown = flattened(archive, root, labels.shape)[..., :3] * 255
    assert np.abs(shown - picture).max() <= 2
    composed = np.asarray(document.composite(force=True).convert("RGB")).astype(int)
    assert np.abs(composed - picture).max() <= 2
