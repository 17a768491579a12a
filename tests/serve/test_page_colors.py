"""What artists do with a result on the page, in headless Chromium against the real server: exact colors and files."""

import io
import zipfile

import numpy as np
import pytest
from playwright.sync_api import Page, expect
from webpage import choose, click, color, give_hex, pixels, position, saved, shown

from animediffusion.platform.images.codec import encode_png

pytestmark = pytest.mark.browser

FACE, OUTSIDE = (60, 50), (3, 3)
"""Places in the drawing of the fixture `sketch`."""
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}


def test_a_clicked_region_gets_an_exact_color_at_once_and_every_file_has_it(opened, url, drawing, colors):
    page = opened(url, reduced_motion="reduce")
    page.select_option("#style", "flat")
    sent: list[str] = []
    page.on("request", lambda request: "/v1/colorize" in request.url and sent.append(request.url))
    color(page, colors, drawing)
    before = shown(page, OUTSIDE)
    click(page, FACE)
    expect(page.locator(".dot")).to_have_count(1)
    expect(page.locator("#colors-note")).to_contain_text("Pick another color")
    give_hex(page, "3af")
    assert (shown(page, FACE), shown(page, OUTSIDE)) == ("#33aaff", before)
    expect(page.locator("#note")).to_contain_text("1 color by hand")
    assert len(sent) == 1

    name, data = saved(page, "#save")
    picture = pixels(data)
    assert name == "face.colored.png"
    assert picture[FACE[1], FACE[0]].tolist() == [0x33, 0xAA, 0xFF]
    layer = pixels(saved(page, "#save-layer")[1], "RGBA")
    assert layer[FACE[1], FACE[0]].tolist() == [0x33, 0xAA, 0xFF, 255]
    assert len(sent) == 1

    name, data = saved(page, "#save-ora")
    assert name == "face.ora"
    with zipfile.ZipFile(io.BytesIO(data)) as ora, ora.open("mergedimage.png") as merged:
        assert np.abs(pixels(merged) - picture).max() <= 1
    name, data = saved(page, "#save-psd")
    assert name == "face.psd"
    assert np.abs(pixels(data) - picture).max() <= 1


def test_a_color_comes_from_the_reference_from_the_picture_and_from_recent_ones(colored: Page, reference):
    page = colored
    page.locator("#reference-colors").click(position={"x": 5, "y": 5})
    expect(page.locator("#colors-note")).to_have_text("First click a region of the picture.")
    click(page, FACE)
    box = page.locator("#reference-colors").bounding_box()
    page.locator("#reference-colors").click(position={"x": 0.25 * box["width"], "y": 0.75 * box["height"]})
    blue = "#{:02x}{:02x}{:02x}".format(*reference[48, 16])
    expect(page.locator("#hex")).to_have_value(blue)
    expect(page.locator("#recent button")).to_have_count(1)
    click(page, OUTSIDE)
    page.click("#recent button")
    assert page.locator(".dot").nth(1).get_attribute("aria-label").endswith(blue)
    page.fill("#hex", "#12345")
    page.press("#hex", "Enter")
    expect(page.locator("#hex")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#colors-note")).to_contain_text("six digits")
    swatch = page.locator("#picture-colors button").first
    swatch.click()
    expect(page.locator("#hex")).to_have_value(swatch.get_attribute("title"))


def test_undo_and_redo_with_the_keyboard_and_with_buttons(colored: Page):
    page, before = colored, shown(colored, FACE)
    click(page, FACE)
    give_hex(page, "#ff0000")
    red = shown(page, FACE)
    give_hex(page, "#0000ff")
    blue = shown(page, FACE)
    assert len({before, red, blue}) == 3
    page.locator("#undo").focus()
    page.keyboard.press("Control+z")
    assert shown(page, FACE) == red
    page.keyboard.press("Control+z")
    assert shown(page, FACE) == before
    expect(page.locator(".dot")).to_have_count(0)
    expect(page.locator("#undo")).to_be_disabled()
    page.keyboard.press("Control+Shift+z")
    page.click("#redo")
    assert shown(page, FACE) == blue
    expect(page.locator("#redo")).to_be_disabled()
    page.click("#undo")
    click(page, OUTSIDE)
    give_hex(page, "#00ff00")
    expect(page.locator("#redo")).to_be_disabled()


def test_a_dot_is_dragged_moved_with_arrows_and_removed(colored: Page):
    page = colored
    face, outside = shown(page, FACE), shown(page, OUTSIDE)
    click(page, FACE)
    give_hex(page, "#ff0000")
    red = shown(page, FACE)
    box, dot = page.locator("#after").bounding_box(), page.locator(".dot")
    start, end = (position(page, place, box) for place in (FACE, OUTSIDE))
    page.mouse.move(box["x"] + start["x"], box["y"] + start["y"])
    page.mouse.down()
    page.mouse.move(box["x"] + end["x"], box["y"] + end["y"], steps=4)
    page.mouse.up()
    assert shown(page, FACE) == face
    assert shown(page, OUTSIDE) != outside
    page.click("#undo")
    assert (shown(page, FACE), shown(page, OUTSIDE)) == (red, outside)
    dot.focus()
    before = dot.bounding_box()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+ArrowDown")
    after = dot.bounding_box()
    assert 0 < after["x"] - before["x"] < after["y"] - before["y"]
    expect(dot).to_be_focused()
    page.keyboard.press("Delete")
    expect(dot).to_have_count(0)
    assert shown(page, FACE) == face
    page.keyboard.press("Control+z")
    expect(dot).to_have_count(1)


def test_several_drawings_take_one_reference_and_are_saved_as_a_zip(opened, url, drawing, colors, tmp_path, sketch):
    page = opened(url, reduced_motion="reduce")
    for name, data in (("b.png", encode_png(sketch[:, ::-1])), ("empty.png", encode_png(np.full_like(sketch, 255)))):
        (tmp_path / name).write_bytes(data)
    choose(page, "sketch", drawing, tmp_path / "empty.png", tmp_path / "b.png")
    expect(page.locator("#sketch")).to_contain_text("3 drawings")
    choose(page, "reference", colors)
    page.get_by_role("button", name="Color 3 drawings").click()
    expect(page.get_by_role("alert")).to_contain_text("2 of 3 drawings are colored. empty.png: Line art has no lines")
    expect(page.locator("#tries button")).to_have_text(["face", "b"])
    click(page, FACE)
    give_hex(page, "#ff0000")
    red = shown(page, FACE)
    page.click("#tries button >> nth=1")
    expect(page.locator("#tries button >> nth=1")).to_have_attribute("aria-pressed", "true")
    expect(page.locator(".dot")).to_have_count(0)
    name, data = saved(page, "#save-all")
    assert name == "colored.zip"
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        kinds = ("colored", "color-layer")
        assert archive.namelist() == [f"{stem}.{kind}.png" for stem in ("face", "b") for kind in kinds]
        with archive.open("face.colored.png") as file:
            assert "#{:02x}{:02x}{:02x}".format(*pixels(file)[FACE[1], FACE[0]]) == red
    page.click("#tries button >> nth=0")
    expect(page.locator(".dot")).to_have_count(1)
    assert shown(page, FACE) == red


def test_a_phone_colors_a_region_with_taps(opened, url, drawing, colors):
    page = opened(url, reduced_motion="reduce", **PHONE)
    color(page, colors, drawing)
    page.locator("#after").tap(position=position(page, FACE))
    expect(page.locator(".dot")).to_have_count(1)
    page.locator("#picture-colors button").last.tap()
    expect(page.locator("#undo")).to_be_enabled()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    small = page.evaluate("""() => [...document.querySelectorAll("#colors button:not(.dot), #actions button")]
        .filter(one => one.checkVisibility() && Math.min(one.offsetWidth, one.offsetHeight) < 32)
        .map(one => one.outerHTML)""")
    assert small == []


def test_everything_is_done_with_the_keyboard_alone(colored: Page, reference):
    page = colored
    page.locator("#compare").focus()
    page.keyboard.press("Tab")  # No dot yet, so the buttons below the picture are next.
    expect(page.locator("#add-dot")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator(".dot")).to_be_focused()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    expect(page.locator("#hex")).to_be_focused()
    page.keyboard.press("Control+a")
    page.keyboard.type("#ff2060")
    page.keyboard.press("Enter")
    expect(page.locator("#note")).to_contain_text("1 color by hand")
    page.locator("#reference-colors").focus()
    for _ in range(3):
        page.keyboard.press("Shift+ArrowLeft")
        page.keyboard.press("Shift+ArrowUp")
    page.keyboard.press("Enter")
    expect(page.locator("#hex")).to_have_value("#{:02x}{:02x}{:02x}".format(*reference[12, 12]))
    reached = set()
    page.locator("#go").focus()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert {"compare", "undo", "add-dot", "remove-dot", "reference-colors", "any-color", "hex", "save-psd"} <= reached


def test_the_slider_still_compares_a_picture_whose_regions_can_be_clicked(colored: Page):
    page, box = colored, colored.locator("#after").bounding_box()
    page.mouse.move(box["x"] + 18, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()
    expect(page.locator("#tag-before")).to_be_visible()
    expect(page.locator(".dot")).to_have_count(0)
