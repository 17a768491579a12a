"""Regions of drawings whose regions are known: gaps, holes, slivers, faint lines, sizes, single pixels."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

from animediffusion.pipelines.synthetic.dataset import make_regions, make_row
from animediffusion.serve.rendering import regions
from animediffusion.serve.rendering.morphology import components, distances
from animediffusion.serve.rendering.regions import find_regions
from animediffusion.serve.rendering.sketch import Drawing, read_drawing


def blank(size: int = 300) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    picture = Image.new("L", (size, size), 255)
    return picture, ImageDraw.Draw(picture)


def to_drawing(picture: Image.Image | np.ndarray) -> Drawing:
    return read_drawing(np.repeat(np.asarray(picture)[..., None], 3, axis=2))


def agreement(one: np.ndarray, other: np.ndarray) -> float:
    """The share of the area that keeps its region, from one division to the other and back."""
    counts = np.zeros((one.max() + 1, other.max() + 1), int)
    np.add.at(counts, (one, other), 1)
    return min(counts.max(axis=0).sum(), counts.max(axis=1).sum()) / one.size


@pytest.mark.parametrize("color", [0, 120, 225])
@pytest.mark.parametrize("line", [1, 3, 8])
def test_a_line_of_any_thickness_and_darkness_divides(line: int, color: int):
    picture, pen = blank()
    pen.line([(0, 140), (300, 160)], fill=color, width=line)
    labels, count = find_regions(to_drawing(picture))
    assert count == 2
    assert labels.dtype == np.int32
    assert labels[0, 0] == labels[130, 150] == labels[130, 0] != labels[299, 299]
    assert labels[299, 299] == labels[170, 150]


def test_blank_paper_is_one_region():
    assert find_regions(to_drawing(blank()[0])).count == 1


def test_a_picture_without_paper_is_one_region():
    drawing = Drawing(np.zeros((20, 20, 3), np.uint8), np.ones((20, 20), np.float32), np.ones((1, 1, 3), np.float32))
    labels, count = find_regions(drawing)
    assert count == 1
    assert (labels == 1).all()


@pytest.mark.parametrize("gap", [1, 3, 6])
def test_gaps_are_closed(gap: int):
    picture, pen = blank()
    pen.ellipse([60, 60, 240, 240], outline=0, width=3)
    for x in (58, 236):
        pen.rectangle([x, 150, x + 8, 150 + gap - 1], fill=255)
    labels, count = find_regions(to_drawing(picture))
    assert count == 2
    assert (labels[150, :50] == labels[0, 0]).all()
    assert (labels[150, 70:230] == labels[150, 150]).all()


@pytest.mark.parametrize("gap", [3, 6, 12, 16, 20])
def test_gaps_that_are_short_compared_with_the_outline_are_closed(gap: int):
    picture, pen = blank(512)
    pen.ellipse([150, 60, 362, 300], outline=0, width=3)
    pen.line([(200, 280), (150, 500), (362, 500), (312, 280)], fill=0, width=3)
    for x, y in ((140, 180), (300, 50), (155, 400)):
        pen.rectangle([x, y, x + 20, y + gap - 1] if x < 300 else [x, y, x + gap - 1, y + 20], fill=255)
    labels = find_regions(to_drawing(picture)).labels
    assert len({labels[2, 2], labels[180, 256], labels[400, 256]}) == 3
    assert (labels[180, 170:340] == labels[180, 256]).all()
    assert (labels[400, 190:330] == labels[400, 256]).all()
    assert (labels[:, :130] == labels[2, 2]).all()


def test_a_gap_of_half_the_width_of_a_lock_of_hair_is_closed():
    picture, pen = blank(400)
    pen.arc([60, 60, 340, 340], 180, 360, fill=0, width=2)
    pen.arc([60, 68, 340, 332], 180, 360, fill=0, width=2)
    pen.rectangle([196, 58, 199, 64], fill=255)
    labels = find_regions(to_drawing(picture)).labels
    assert labels[2, 2] != labels[64, 200]


@pytest.mark.parametrize("opening", [8, 10, 12])
def test_a_small_shape_that_is_open_at_one_place_is_not_the_background(opening: int):
    """As small hands are, between their fingers."""
    picture, pen = blank(512)
    pen.ellipse([195, 200, 219, 224], outline=0, width=2)
    pen.rectangle([207 - opening // 2, 220, 207 + opening // 2, 226], fill=255)
    labels = find_regions(to_drawing(picture)).labels
    assert labels[212, 207] != labels[2, 2]


def test_an_opening_of_half_a_shape_is_not_closed():
    picture, pen = blank()
    pen.line([(80, 60), (80, 240), (220, 240), (220, 60)], fill=0, width=3)
    assert find_regions(to_drawing(picture)).count == 1


def test_a_narrow_place_of_one_shape_does_not_divide_it():
    picture, pen = blank()
    pen.polygon([(40, 100), (140, 141), (260, 100), (260, 200), (140, 159), (40, 200)], outline=0, width=3)
    assert find_regions(to_drawing(picture)).count == 2


def test_holes_and_rings_are_kept_apart():
    picture, pen = blank()
    pen.ellipse([30, 30, 270, 270], outline=0, width=3)
    pen.ellipse([90, 90, 210, 210], outline=0, width=3)
    labels, count = find_regions(to_drawing(picture))
    assert count == 3
    assert len({labels[2, 2], labels[60, 150], labels[150, 150]}) == 3
    assert labels[60, 150] == labels[240, 150] == labels[150, 60]


def test_the_sliver_between_double_lines_belongs_to_a_neighbor():
    picture, pen = blank()
    for x in (148, 152):
        pen.line([(x, 0), (x, 299)], fill=0, width=1)
    assert find_regions(to_drawing(picture)).count == 2


def test_hatching_does_not_divide():
    picture, pen = blank()
    pen.rectangle([50, 50, 250, 250], outline=0, width=3)
    for x in range(90, 170, 6):
        pen.line([(x, 100), (x + 30, 180)], fill=60, width=1)
    assert find_regions(to_drawing(picture)).count <= 4


def test_specks_do_not_divide():
    picture, pen = blank()
    rng = np.random.default_rng(0)
    for x, y in rng.integers(5, 295, (300, 2)):
        pen.rectangle([x, y, x + 1, y], fill=0)
    assert find_regions(to_drawing(picture)).count == 1


def test_grain_of_paper_does_not_divide():
    picture, pen = blank()
    pen.ellipse([60, 60, 240, 240], outline=60, width=3)
    grain = np.random.default_rng(0).normal(0, 10, (300, 300))
    noisy = np.clip(np.asarray(picture) * 0.9 + grain, 0, 255).astype(np.uint8)
    labels, count = find_regions(to_drawing(noisy))
    assert count == 2
    assert labels[2, 2] != labels[150, 150]


def test_a_soft_shadow_is_not_a_line():
    picture, pen = blank()
    pen.ellipse([-100, 100, 160, 400], fill=215)
    picture = picture.filter(ImageFilter.GaussianBlur(25))
    ImageDraw.Draw(picture).ellipse([120, 60, 260, 200], outline=0, width=3)
    darkness = 1 - np.asarray(picture, np.float32) / 255
    assert find_regions(to_drawing(picture)._replace(darkness=darkness)).count == 2


def test_a_black_area_is_a_region_of_its_own():
    picture, pen = blank()
    pen.ellipse([60, 60, 240, 240], outline=0, width=3)
    pen.polygon([(100, 150), (150, 90), (200, 150), (150, 200)], fill=0)
    labels, count = find_regions(to_drawing(picture))
    assert count == 3
    assert len({labels[2, 2], labels[80, 150], labels[150, 150]}) == 3
    assert (labels == labels[150, 150]).sum() == pytest.approx(100 * 110 / 2, rel=0.05)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 100), (100, 8), (33, 47), (64, 1024)])
def test_small_and_long_drawings_have_regions(height: int, width: int):
    pixels = np.full((height, width), 255, np.uint8)
    pixels[:, width // 2] = 0
    labels, count = find_regions(to_drawing(pixels))
    assert labels.shape == (height, width)
    assert count == 2
    assert labels[0, 0] != labels[-1, -1]


@pytest.mark.parametrize("line", [2, 7])
def test_a_large_drawing_is_divided_on_its_lines(monkeypatch: pytest.MonkeyPatch, line: int):
    monkeypatch.setattr(regions, "WORK_PIXELS", 40_000)
    picture, pen = blank(601)
    pen.ellipse([101, 101, 500, 500], outline=0, width=line)
    drawing = to_drawing(picture)
    labels, count = find_regions(drawing)
    assert count == 2
    paper = drawing.darkness < 0.5
    inside = labels == labels[300, 300]
    exact = ndimage.label(paper)[0]
    assert (inside[paper] == (exact == exact[300, 300])[paper]).mean() == 1


def test_twenty_thousand_regions():
    pixels = np.full((1430, 1430), 255, np.uint8)
    pixels[::10] = pixels[:, ::10] = 0
    labels, count = find_regions(to_drawing(pixels))
    assert count == 143 * 143
    assert set(np.unique(labels)) == set(range(1, count + 1))


def test_faint_lines_that_leave_no_plain_paper_divide():
    pixels = np.full((300, 300), 255, np.uint8)
    pixels[::10] = pixels[:, ::10] = 190
    assert find_regions(to_drawing(pixels)).count == 900
    pixels[::10] = pixels[:, ::10] = 225
    assert find_regions(to_drawing(pixels)).count == 900


def test_a_screen_of_dots_is_one_region():
    pixels = np.full((800, 800), 255, np.uint8)
    for offset in range(9):
        pixels[offset // 3 + 2 :: 8, offset % 3 + 2 :: 8] = 0
    labels, count = find_regions(to_drawing(pixels))
    assert count == 1
    assert (labels == 1).all()


def test_the_result_is_the_same_each_time():
    drawing = to_drawing(make_row(5, 0, 200).sketch)
    assert np.array_equal(find_regions(drawing).labels, find_regions(drawing).labels)


def test_single_pixels_change_little():
    sketch = make_row(5, 1, 256).sketch
    drawing = to_drawing(sketch)
    labels = find_regions(drawing).labels
    rng = np.random.default_rng(3)
    for y, x in rng.integers(0, 256, (12, 2)):
        changed = drawing.darkness.copy()
        changed[y, x] = 1 if changed[y, x] < 0.5 else 0
        assert agreement(labels, find_regions(drawing._replace(darkness=changed)).labels) > 0.99


def test_faces_are_divided_almost_as_they_were_drawn():
    for row in range(3):
        labels, count = find_regions(to_drawing(make_row(5, row, 384).sketch))
        truth, colors = make_regions(5, row, 384)[0]
        assert agreement(labels, truth) > 0.85
        assert 0.7 < count / len(colors) < 1.4


def test_distances_are_euclidean_up_to_the_reach():
    lines = np.random.default_rng(0).random((70, 90)) < 0.003
    exact = ndimage.distance_transform_edt(~lines)
    assert np.allclose(distances(lines, 9.5), np.minimum(exact, 9.5), atol=1e-5)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.4, 0.6, 1.0])
def test_components_are_those_of_scipy(share: float, diagonal: bool):
    mask = np.random.default_rng(1).random((60, 80)) < share
    labels, count = components(mask, diagonal=diagonal)
    exact, number = ndimage.label(mask, np.ones((3, 3)) if diagonal else None)
    assert count == number
    assert np.array_equal(labels > 0, mask)
    assert len(np.unique(labels.astype(np.int64) * (number + 1) + exact)) == len(np.unique(exact))


def test_a_faint_tone_does_not_count_as_ink():
    picture, pen = blank(400)
    pen.rectangle([0, 0, 400, 330], fill=222)
    pen.ellipse([100, 60, 300, 300], outline=60, width=3)
    drawing = to_drawing(picture)
    assert drawing.darkness[20, 20] < 0.3
    assert drawing.darkness[61, 200] > 0.7
    labels = find_regions(drawing).labels
    assert labels[20, 20] != labels[200, 200]
