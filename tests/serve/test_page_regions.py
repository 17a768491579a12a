"""Regions in several pieces, and where the model guessed, in headless Chromium against the real server."""

import io
import re
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from playwright.sync_api import Page, expect
from webpage import click, color, finished, give_hex, pixels, saved, shown

from animediffusion.serve.rendering import render
from animediffusion.serve.rendering.coloring import Region, color_regions
from animediffusion.serve.rendering.hints import shaded_like

pytestmark = pytest.mark.browser

LIT, SHADED, EYE, OUTSIDE = (45, 65), (80, 65), (48, 40), (3, 3)
"""Places in the fixture `sketch`: the face is in two pieces, and an eye has the color of the left one."""
SKIN, SHADOW, WALL = (240, 200, 180), (192, 150, 130), (40, 60, 160)
BLUE = (0x32, 0x64, 0xC8)


def hex_of(color: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


@pytest.fixture
def face(opened, url, drawing, colors, monkeypatch) -> Page:
    """The page with a picture whose face has a shadow on the right, and eyes of the color of its left."""

    def in_pieces(painted, drawing, regions, **options):
        coloring = color_regions(painted, drawing, regions, **options)
        face, outside = (regions.labels[y, x] for x, y in (LIT, OUTSIDE))
        right = np.arange(regions.labels.shape[1])[None] >= 60
        labels = np.where(regions.labels == face, np.where(right, 2, 1), np.where(regions.labels == outside, 3, 4))
        boxes = {1: (0, 0, 60, 90), 2: (60, 0, 120, 90)}
        found = tuple(
            Region(n, f"region {n}", color, int((labels == n).sum()), boxes.get(n, (0, 0, 120, 90)))
            for n, color in enumerate((SKIN, SHADOW, WALL, SKIN), start=1)
        )
        return replace(coloring, labels=labels.astype(np.int32), regions=found, shading=None)

    monkeypatch.setattr(render, "color_regions", in_pieces)
    page = opened(url, reduced_motion="reduce")
    page.select_option("#style", "flat")
    color(page, colors, drawing)
    return page


def colors_at(page: Page) -> list[str]:
    return [shown(page, place) for place in (LIT, SHADED, EYE, OUTSIDE)]


def test_a_click_takes_the_whole_region_and_keeps_its_shadow_and_files_have_it(face: Page):
    click(face, LIT)
    expect(face.locator("#colors-note")).to_contain_text("Click again for one piece of it")
    give_hex(face, hex_of(BLUE))
    dark = hex_of(shaded_like(BLUE, SHADOW, SKIN))
    assert colors_at(face) == [hex_of(BLUE), dark, hex_of(SKIN), hex_of(WALL)]
    picture = pixels(saved(face, "#save")[1])
    with zipfile.ZipFile(io.BytesIO(saved(face, "#save-ora")[1])) as ora, ora.open("mergedimage.png") as merged:
        assert np.abs(pixels(merged) - picture).max() <= 1
    face.click("#undo")
    assert colors_at(face) == [hex_of(one) for one in (SKIN, SHADOW, SKIN, WALL)]


@pytest.mark.parametrize("way", ["second click", "click on the dot", "Alt", "control", "keyboard"])
def test_one_piece_is_taken_in_several_ways(face: Page, way: str):
    click(face, SHADED, modifiers=["Alt"] if way == "Alt" else [])
    if way == "second click":
        click(face, (SHADED[0] + 12, SHADED[1] - 12))
    elif way == "click on the dot":
        face.locator(".dot").click()
    elif way == "control":
        face.get_by_text("One piece", exact=True).click()
    elif way == "keyboard":
        face.locator("#scope input:checked").focus()
        face.keyboard.press("ArrowRight")
    expect(face.locator("#colors-note")).to_contain_text("This piece of region")
    expect(face.locator("#scope input[value=piece]")).to_be_checked()
    give_hex(face, hex_of(BLUE))
    assert colors_at(face) == [hex_of(SKIN), hex_of(BLUE), hex_of(SKIN), hex_of(WALL)]


def test_all_of_a_color_changes_with_its_shadows_and_the_choice_can_be_undone(face: Page):
    click(face, EYE)
    expect(face.locator("#scope input[value=piece]")).to_be_disabled()  # The region has one piece only.
    give_hex(face, hex_of(BLUE))
    assert colors_at(face) == [hex_of(SKIN), hex_of(SHADOW), hex_of(BLUE), hex_of(WALL)]
    face.get_by_text("All of this color").click()
    assert colors_at(face) == [hex_of(one) for one in (BLUE, shaded_like(BLUE, SHADOW, SKIN), BLUE, WALL)]
    face.keyboard.press("Control+z")
    assert colors_at(face) == [hex_of(SKIN), hex_of(SHADOW), hex_of(BLUE), hex_of(WALL)]


def test_a_piece_keeps_its_color_when_the_whole_region_changes_later(face: Page):
    click(face, SHADED, modifiers=["Alt"])
    give_hex(face, "#ff0000")
    click(face, LIT)
    give_hex(face, hex_of(BLUE))
    assert colors_at(face)[:2] == [hex_of(BLUE), "#ff0000"]
    _, data = saved(face, "#save-psd")
    assert np.abs(pixels(data) - pixels(saved(face, "#save")[1])).max() <= 1


def test_what_looks_alike_gets_the_color_of_a_dot_and_files_have_it(opened, url, drawing, colors):
    page = opened(url, reduced_motion="reduce")
    color(page, colors, drawing)
    page.click("#spread")
    expect(page.locator("#error")).to_contain_text("First click a region of the picture and give it a color")
    click(page, EYE)
    give_hex(page, hex_of(BLUE))
    before = pixels(saved(page, "#save")[1])
    with page.expect_request(lambda request: request.url.endswith("/v1/colorize/stream")):
        page.click("#spread")
    finished(page)
    expect(page.locator("#tries button")).to_have_count(2)
    picture = pixels(saved(page, "#save")[1])
    assert (np.abs(picture - before).max(axis=2) > 2).any(), "more than the region of the dot has changed"
    with zipfile.ZipFile(io.BytesIO(saved(page, "#save-ora")[1])) as ora, ora.open("mergedimage.png") as merged:
        assert np.abs(pixels(merged) - picture).max() <= 1


def test_the_map_of_guesses_is_off_until_it_is_asked_for_and_leaves_out_what_is_colored(face: Page, monkeypatch):
    monkeypatch.setattr(
        "animediffusion.serve.rendering.doubt.encode_png",
        lambda bright: render.encode_png(np.full_like(bright, 255)),
    )
    expect(face.locator("#doubt-map")).to_be_hidden()
    expect(face.locator("#doubt-note")).to_be_hidden()
    face.locator("#doubt").focus()
    face.keyboard.press("Enter")
    expect(face.locator("#doubt-note")).to_have_text(
        "Pink regions are those whose colors the model guessed: a color by hand helps most there. "
        "New dot goes to the next one."
    )
    assert shown(face, LIT, "doubt-map") == shown(face, EYE, "doubt-map") == "#e81e8c"
    click(face, EYE)
    give_hex(face, hex_of(BLUE))
    expect(face.locator("#doubt-map")).to_be_visible()
    assert shown(face, EYE, "doubt-map") == "#000000"
    assert shown(face, LIT, "doubt-map") == "#e81e8c"
    face.click("#add-dot")  # The outside is the largest region.
    expect(face.locator(".dot").nth(1)).to_have_attribute(
        "aria-label", re.compile("Dot 2: (Region .*|Background), no color yet")
    )
    expect(face.locator("#hex")).to_have_value(hex_of(WALL))
    face.click("#doubt")
    expect(face.locator("#doubt-map")).to_be_hidden()
    expect(face.locator("#doubt")).to_have_attribute("aria-pressed", "false")


def test_a_model_that_cannot_tell_its_guesses_says_so(face: Page, monkeypatch):
    monkeypatch.setattr("animediffusion.serve.engine.batch.doubt_map", lambda *_: None)
    face.click("#doubt")
    expect(face.get_by_role("alert")).to_have_text("This model cannot tell where it guessed.")
    expect(face.locator("#doubt")).to_have_attribute("aria-pressed", "false")
