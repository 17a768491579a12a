import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from animediffusion.pipelines.synthetic.dataset import make_row
from animediffusion.platform.images.codec import letterbox
from animediffusion.serve.rendering.coloring import color_regions
from animediffusion.serve.rendering.palette import Palette
from animediffusion.serve.rendering.regions import Regions, find_regions
from animediffusion.serve.rendering.sketch import read_drawing

RED, BLUE, DARK = (210, 60, 50), (60, 90, 220), (120, 20, 20)


def halves(shadow: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """A line drawing of two halves, and its colors; the left half optionally has a shadow without a line."""
    sketch = np.full((300, 400, 3), 255, np.uint8)
    sketch[:, 199:202] = 0
    colors = np.empty_like(sketch)
    colors[:, :200], colors[:, 200:] = RED, BLUE
    if shadow:
        colors[150:, :200] = DARK
    return sketch, colors


def colored(sketch: np.ndarray, colors: np.ndarray, off: tuple[int, int, int] = (0, 0, 0), **options):
    """The coloring by a network whose colors are off by that much."""
    drawing = read_drawing(sketch)
    painted = letterbox((sketch.astype(int) * np.clip(np.add(colors, off), 0, 255) // 255).astype(np.uint8), 64)[0]
    options = {"references": [colors], "background": "reference"} | options
    return color_regions(painted, drawing, find_regions(drawing), **options)


def test_colors_of_the_reference_are_exact():
    sketch, colors = halves()
    coloring = colored(sketch, colors, off=(-7, 6, 8))
    assert {region.color for region in coloring.regions} == {RED, BLUE}
    assert (coloring.flats == colors)[:, [*range(198), *range(203, 400)]].all()


def test_a_shadow_is_a_region_with_a_clean_border():
    sketch, colors = halves(shadow=True)
    coloring = colored(sketch, colors, off=(-7, 6, 8))
    assert sorted(region.color for region in coloring.regions) == sorted([RED, BLUE, DARK])
    border = (coloring.labels[:, :198] != coloring.labels[0, 0]).argmax(axis=0)
    assert np.abs(border - 150).max() <= 3
    assert np.abs(np.diff(border)).max() <= 1


@pytest.mark.parametrize(("blur", "count"), [(1, 4), (150, 2)])
def test_a_region_where_the_network_is_unsure_is_not_split(blur: int, count: int):
    drawing = read_drawing(halves()[0])
    sure = np.where(np.arange(300)[:, None, None] < 150, RED, (165, 45, 40)) * np.ones((300, 400, 1))
    painted = letterbox(ndimage.gaussian_filter1d(sure, blur, axis=0).astype(np.uint8), 64)[0]
    options = {"references": [sure.astype(np.uint8)], "background": "reference"}
    assert len(color_regions(painted, drawing, find_regions(drawing), **options).regions) == count


def test_regions_are_numbered_and_boxed():
    sketch, colors = halves()
    coloring = colored(sketch, colors)
    assert [region.id for region in coloring.regions] == [1, 2]
    assert set(np.unique(coloring.labels)) == {1, 2}
    assert sum(region.area for region in coloring.regions) == 300 * 400
    for region in coloring.regions:
        left, top, right, bottom = region.box
        rows, columns = np.nonzero(coloring.labels == region.id)
        assert (left, top, right, bottom) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_a_given_palette_is_all_there_is():
    sketch, colors = halves()
    palette = Palette(((200, 80, 60), (0, 0, 255), (0, 255, 0)), ("", "", ""))
    assert {region.color for region in colored(sketch, colors, palette=palette).regions} == {(200, 80, 60), (0, 0, 255)}


def test_without_a_palette_colors_are_the_networks():
    sketch, colors = halves()
    found = colored(sketch, colors, off=(-7, 6, 8), palette=None).regions
    assert np.abs(np.subtract(found[0].color, np.add(RED, (-7, 6, 8)))).max() <= 3


def test_a_color_that_is_far_from_the_reference_stays():
    sketch, colors = halves()
    green = np.broadcast_to((40, 200, 60), colors.shape).astype(np.uint8)
    found = colored(sketch, colors, references=[green]).regions
    assert np.abs(np.subtract(found[0].color, RED)).max() <= 6


def test_the_color_of_a_learned_hint_is_exact_although_no_reference_has_it():
    sketch, colors = halves()
    painted = np.where(colors == BLUE, (60, 200, 90), colors).astype(np.uint8)
    coloring = colored(sketch, painted, off=(-4, 3, 3), references=[colors], learned=[(60, 200, 90)])
    assert (60, 200, 90) in {region.color for region in coloring.regions}


def test_colors_of_all_references_are_exact():
    sketch, colors = halves()
    pictures = [np.broadcast_to(color, colors.shape).astype(np.uint8) for color in (RED, BLUE)]
    coloring = colored(sketch, colors, off=(-7, 6, 8), references=pictures)
    assert {region.color for region in coloring.regions} == {RED, BLUE}


@pytest.mark.parametrize("background", ["paper", "reference"])
def test_paper_stays_paper(background: str):
    sketch = np.full((300, 300, 3), 255, np.uint8)
    rows, columns = np.ogrid[:300, :300]
    radius = np.hypot(rows - 150, columns - 150)
    sketch[(radius > 97) & (radius < 101)] = 0
    colors = np.where((radius < 99)[..., None], RED, BLUE).astype(np.uint8)
    coloring = colored(sketch, colors, background=background)
    assert coloring.flats[150, 150].tolist() == list(RED)
    assert coloring.flats[5, 5].tolist() == [255, 255, 255] if background == "paper" else list(BLUE)


def figure(gap: int = 0, half: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """A figure from the upper to the lower side of a sheet, with gaps in its outline, and its colors."""
    picture = Image.new("RGB", (512, 512), (255, 255, 255))
    pen = ImageDraw.Draw(picture)
    for x in (256 - half, 256 + half):
        pen.line([(x, 0), (x - 30, 250), (x, 512)], fill=(0, 0, 0), width=3)
        if gap:
            pen.rectangle([x - 40, 120, x + 10, 119 + gap], fill=(255, 255, 255))
    colors = np.full((512, 512, 3), BLUE, np.uint8)
    rows, columns = np.ogrid[:512, :512]
    colors[np.abs(columns - 256 + np.interp(rows, (0, 250, 512), (0, 30, 0))) < half] = RED
    return np.asarray(picture), colors


@pytest.mark.parametrize("gap", [0, 3, 6, 12, 20])
def test_both_halves_of_a_sheet_stay_paper(gap: int):
    sketch, colors = figure(gap)
    flats = colored(sketch, colors, background="paper").flats
    assert {tuple(flats[y, x]) for y in (10, 130, 500) for x in (5, 100, 400, 506)} == {(255, 255, 255)}
    assert {tuple(flats[y, 230]) for y in (10, 130, 500)} == {RED}


def test_hair_that_fills_the_sides_of_a_portrait_is_no_sheet():
    sketch, colors = figure()
    sketch = sketch.copy()
    for x in [*range(12, 190, 14), *range(330, 505, 14)]:
        sketch[:480, x : x + 2] = 0
    flats = colored(sketch, colors, background="paper").flats
    assert tuple(flats[100, 60]) == tuple(flats[100, 440]) == BLUE


def test_slivers_of_a_figure_do_not_join_the_sheet():
    sketch, colors = np.full((64, 64, 3), 255, np.uint8), np.full((64, 64, 3), BLUE, np.uint8)
    sketch[20:44, [20, 24, 44]] = sketch[[20, 43], 20:45] = 0
    colors[20:44, 20:45] = RED
    flats = colored(sketch, colors, background="paper").flats
    assert tuple(flats[30, 22]) == tuple(flats[30, 34]) == RED
    assert tuple(flats[30, 10]) == (255, 255, 255)


def test_letters_on_the_sheet_are_not_colored():
    sketch = np.full((400, 400, 3), 255, np.uint8)
    pen = ImageDraw.Draw(picture := Image.fromarray(sketch))
    pen.ellipse([100, 100, 300, 390], outline=(0, 0, 0), width=3)
    pen.rectangle([20, 20, 32, 32], outline=(0, 0, 0), width=2)
    pen.rectangle([150, 150, 162, 162], outline=(0, 0, 0), width=2)
    flats = colored(np.asarray(picture), np.full_like(sketch, RED), background="paper").flats
    assert tuple(flats[26, 26]) == (255, 255, 255)
    assert tuple(flats[156, 156]) == tuple(flats[200, 200]) == RED


def test_a_large_sheet_does_not_take_the_shading_of_the_figure():
    row = make_row(3, 3, 256)
    drawing = read_drawing(np.repeat(row.sketch.reshape(256, 256, 1), 3, 2))
    painted, regions = letterbox(row.target, 64)[0], find_regions(drawing)
    paper, reference = (
        color_regions(painted, drawing, regions, references=[row.target], background=background, style="shaded")
        for background in ("paper", "reference")
    )
    assert paper.shading is not None
    assert reference.shading is not None
    figure = (paper.flats != 255).any(axis=2)
    assert figure.mean() < 0.7
    change = [np.abs(coloring.shading - 1)[figure].mean() for coloring in (paper, reference)]
    assert change[0] > 0.7 * change[1]


def test_shading_is_one_where_colors_are_flat():
    sketch, colors = halves()
    coloring = colored(sketch, colors, style="shaded")
    assert coloring.shading is not None
    assert coloring.shading.shape == (300, 400, 3)
    assert np.abs(coloring.shading[:, 20:180] - 1).max() < 0.05


def test_regions_too_small_to_vote_get_a_color():
    sketch = np.full((2000, 1600, 3), 255, np.uint8)
    sketch[:, 799:802] = 0
    colors = np.broadcast_to(RED, sketch.shape).astype(np.uint8)
    labels = np.ones((2000, 1600), np.int32)
    labels[:, 800:] = 2
    for number in range(40):  # most of these fall between the pixels that vote
        labels[101 + 3 * number, 101 + 2 * (number % 5)] = 3 + number
    drawing = read_drawing(sketch)
    painted = letterbox((sketch.astype(int) * colors // 255).astype(np.uint8), 64)[0]
    coloring = color_regions(
        painted, drawing, Regions(labels, 42), references=[colors], background="reference", style="shaded"
    )
    assert len(coloring.regions) == 42
    assert {region.color for region in coloring.regions} == {RED}
