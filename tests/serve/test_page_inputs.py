"""Several references, many drawings, further tries and failing servers, in headless Chromium and a real server."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, Route, expect
from webpage import choose, click, color, finished, give_hex, shown

from animediffusion.platform.images.codec import encode_png

pytestmark = pytest.mark.browser

FACE = (60, 50)
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}


@pytest.fixture
def references(tmp_path, reference) -> list[Path]:
    """Five color pictures, each in another order of channels."""
    paths = [tmp_path / f"colors_{number}.png" for number in range(5)]
    for number, path in enumerate(paths):
        path.write_bytes(encode_png(reference.take([number % 3, (number + 1) % 3, number // 3], 2)))
    return paths


def sent_fields(page: Page) -> list[str]:
    """A list that gets the body of each coloring request."""
    bodies: list[str] = []

    def keep(route: Route) -> None:
        bodies.append((route.request.post_data_buffer or b"").decode("latin-1"))
        route.continue_()

    page.route("**/v1/colorize/stream", keep)
    return bodies


def names(page: Page) -> list[str]:
    return page.eval_on_selector_all("#references > div", "all => all.map(one => one.title)")


def test_references_are_added_seen_removed_and_all_sent(page: Page, drawing, references):
    bodies = sent_fields(page)
    choose(page, "sketch", drawing)
    choose(page, "reference", references[0])
    choose(page, "add-reference", references[1], references[2])
    assert names(page) == ["colors_0.png", "colors_1.png", "colors_2.png"]
    page.get_by_role("button", name="Remove colors_1.png").click()
    assert names(page) == ["colors_0.png", "colors_2.png"]
    expect(page.get_by_role("button", name="Add a color picture")).to_be_focused()
    page.click("#reference-examples button >> nth=1")
    expect(page.locator("#references > div")).to_have_count(3)
    assert names(page) == ["colors_0.png", "colors_2.png", "reference_2.png"]
    page.click("#go")
    finished(page)
    assert bodies[0].count('name="reference"') == 3
    expect(page.locator("#reference-choice button")).to_have_count(3)
    for button in page.locator("#references .remove").all()[::-1]:
        button.click()
    expect(page.locator("#reference")).to_be_visible()
    expect(page.locator("#reference")).to_be_focused()
    expect(page.locator("#go")).to_be_disabled()


def test_a_fifth_reference_is_left_out_with_one_line(page: Page, references):
    choose(page, "reference", *references)
    assert names(page) == [path.name for path in references[:4]]
    expect(page.get_by_role("alert")).to_have_text("At most 4 color pictures are used: colors_4.png is left out.")
    expect(page.get_by_role("button", name="Add a color picture")).to_have_count(0)
    page.click("#reference-examples button >> nth=0")
    expect(page.get_by_role("alert")).to_contain_text("reference_1.png is left out")
    assert len(names(page)) == 4


def test_colors_are_picked_from_each_reference(page: Page, drawing, references, reference):
    choose(page, "sketch", drawing)
    choose(page, "reference", references[0], references[1])
    page.click("#go")
    finished(page)
    click(page, FACE)
    corner = {"position": {"x": 4, "y": 4}}
    page.locator("#reference-colors").click(**corner)
    first = page.locator("#hex").input_value()
    page.get_by_role("button", name="Color picture 2").click()
    expect(page.get_by_role("button", name="Color picture 2")).to_have_attribute("aria-pressed", "true")
    page.locator("#reference-colors").click(**corner)
    red, green, blue = reference[0, 0].tolist()
    assert first == f"#{red:02x}{green:02x}{red:02x}"
    assert page.locator("#hex").input_value() == f"#{green:02x}{blue:02x}{red:02x}"


def test_a_file_that_is_no_picture_changes_nothing(page: Page, references, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    choose(page, "reference", references[0], references[1])
    choose(page, "references .more", tmp_path / "notes.txt")
    expect(page.get_by_role("alert")).to_have_text("notes.txt is not a PNG, JPEG or WebP image.")
    assert names(page) == ["colors_0.png", "colors_1.png"]


def test_a_damaged_reference_is_named(page: Page, drawing, references):
    references[1].write_bytes(references[1].read_bytes()[:60])
    choose(page, "sketch", drawing)
    choose(page, "reference", references[0], references[1])
    page.click("#go")
    expect(page.get_by_role("alert")).to_contain_text("Color picture 2")


def test_a_server_that_is_gone_in_the_middle_loses_no_picture(opened, url, colors, tmp_path, sketch):
    page = opened(url, reduced_motion="reduce")
    paths = [tmp_path / f"drawing_{number}.png" for number in range(8)]
    for number, path in enumerate(paths):
        path.write_bytes(encode_png(sketch[: 60 + number]))
    asked = []

    def gone_after_two(route: Route) -> None:
        asked.append(route.request.url)
        if len(asked) == 3:
            route.abort("connectionrefused")
        else:
            route.continue_()

    page.route("**/v1/colorize/stream", gone_after_two)
    choose(page, "sketch", *paths)
    choose(page, "reference", colors)
    page.get_by_role("button", name="Color 8 drawings").click()
    expect(page.get_by_role("alert")).to_contain_text("2 of 8 drawings are done. The server cannot be reached.")
    expect(page.locator("#tries button")).to_have_count(2)
    page.get_by_role("button", name="Color the other 6").click()
    expect(page.locator("#tries button")).to_have_count(8, timeout=60_000)
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 1200


def test_another_try_changes_what_one_sees_and_keeps_the_dots(page: Page, drawing, colors):
    bodies = sent_fields(page)
    color(page, colors, drawing)
    click(page, FACE)
    give_hex(page, "#ff0000")
    for number in range(2):
        page.click("#again")
        expect(page.locator("#tries button")).to_have_count(number + 2)
    expect(page.locator("#note")).to_contain_text("strength 0.7, steps 1")
    expect(page.locator(".dot")).to_have_count(1)
    assert shown(page, FACE) == "#ff0000" or shown(page, FACE)[3:] < "10"
    sent = [re.search(r'guidance_scale"\r\n\r\n([\d.]+)', body) for body in bodies]
    assert [found and found[1] for found in sent] == [None, "1.5", "0.7"]
    page.click("#keep-seed")
    expect(page.locator("#guidance_scale")).to_have_value("0.7")
    page.click("#undo")
    expect(page.locator(".dot")).to_have_count(0)


def test_another_try_is_of_the_shown_drawing_alone(page: Page, drawing, colors, tmp_path, sketch):
    (tmp_path / "b.png").write_bytes(encode_png(sketch[:, ::-1]))
    color(page, colors, drawing, tmp_path / "b.png")
    page.click("#tries button >> nth=1")
    page.click("#again")
    expect(page.locator("#tries button")).to_have_text(["face", "b", "b"])


def test_a_phone_shows_four_references_and_removes_one(opened, url, references):
    page = opened(url, **PHONE)
    choose(page, "reference", *references[:4])
    small = page.evaluate("""() => [...document.querySelectorAll("#references button")]
        .filter(one => Math.min(one.offsetWidth, one.offsetHeight) < 24).length""")
    assert small == 0
    page.locator("#references .remove").first.tap()
    assert len(names(page)) == 3
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
