"""The page in headless Chromium against the real server and engine."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from animediffusion.platform.images import encode_png

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, url):
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: request.url.startswith((url, "data:", "blob:")) or errors.append(request.url))
    page.on(
        "filechooser", lambda _: None
    )  # keeps them intercepted: turning that on for each one comes too late at times
    page.goto(url)
    expect(page.locator("#reference-examples img").nth(3)).to_be_visible()
    yield page
    context.close()
    assert errors == []


def choose(page: Page, kind: str, path: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.click(f"#{kind}")
    chooser.value.set_files(path)


def test_examples_are_colored_compared_and_saved(page: Page, url: str, tmp_path: Path):
    expect(page.locator("#status")).to_have_text("model 3")
    expect(page.locator("#go")).to_be_disabled()
    page.click("#sketch-examples button >> nth=0")
    page.click("#reference-examples button >> nth=1")
    page.click("#go")
    expect(page.locator("#after")).to_be_visible()
    expect(page.locator("#note")).to_contain_text("model version 3")
    page.locator("#compare").fill("40")
    expect(page.locator("#tag-before")).to_be_visible()

    def saved(button: str) -> np.ndarray:
        with page.expect_download() as download:
            page.click(button)
        download.value.save_as(tmp_path / "saved.png")
        return np.array(Image.open(tmp_path / "saved.png"))

    picture, layer = saved("#save"), saved("#save-layer")
    assert layer.shape == (*picture.shape[:2], 4)
    sketch = np.array(Image.open(io.BytesIO(page.request.get(f"{url}/examples/sketch_1.png").body())).convert("RGB"))
    white = Image.new("RGBA", layer.shape[1::-1], "white")
    product = np.asarray(Image.alpha_composite(white, Image.fromarray(layer)).convert("RGB")) / 255 * sketch
    assert np.abs(product - picture).max() <= 2


def test_ones_own_files_work_with_the_keyboard_alone(page: Page, tmp_path: Path, sketch, reference):
    for kind, pixels in (("sketch", sketch), ("reference", reference)):
        (tmp_path / f"{kind}.png").write_bytes(encode_png(pixels))
        page.locator(f"#{kind}").focus()
        with page.expect_file_chooser() as chooser:
            page.keyboard.press("Enter")
        chooser.value.set_files(tmp_path / f"{kind}.png")
    page.locator("#go").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#note")).to_contain_text("120 x 90 px")


def test_a_server_with_keys_is_used_once_the_key_is_given(browser, closed_url: str, key: str):
    page = browser.new_context().new_page()
    page.goto(closed_url)
    expect(page.locator("#status")).to_have_text("key needed")
    field = page.get_by_label("asks for a key")
    field.fill("ad_wrong")
    field.press("Enter")
    expect(page.locator("#key-form")).to_contain_text("does not know that key")
    page.locator("#key").fill(key)
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("model 3")
    expect(page.locator("#key-form")).to_be_hidden()
    page.click("#sketch-examples button >> nth=0")
    page.click("#reference-examples button >> nth=1")
    page.click("#go")
    expect(page.locator("#note")).to_contain_text("model version 3")
    with page.expect_download():
        page.click("#save-layer")
    page.reload()
    expect(page.locator("#status")).to_have_text("model 3")
    assert key not in page.content()
    assert page.evaluate("localStorage.length") == 0
    page.context.close()


def test_a_server_without_keys_asks_for_none(page: Page):
    expect(page.locator("#status")).to_have_text("model 3")
    expect(page.locator("#key-form")).to_be_hidden()


def test_what_is_wrong_is_said_in_words(page: Page, tmp_path: Path):
    (tmp_path / "text.txt").write_text("hello")
    choose(page, "sketch", tmp_path / "text.txt")
    expect(page.get_by_role("alert")).to_contain_text("not a PNG, JPEG or WebP")
    (tmp_path / "fake.png").write_text("hello")
    choose(page, "sketch", tmp_path / "fake.png")
    expect(page.get_by_role("alert")).to_be_hidden()
    page.click("#reference-examples button >> nth=0")
    page.click("#go")
    expect(page.get_by_role("alert")).to_contain_text("not an image")
    page.click("#sketch-examples button >> nth=0")
    page.click("summary")
    page.fill("#num_inference_steps", "500")
    page.click("#go")
    expect(page.get_by_role("alert")).to_contain_text("from 1 to 100")


def test_a_long_request_can_be_stopped(page: Page):
    page.click("#sketch-examples button >> nth=0")
    page.click("#reference-examples button >> nth=0")
    page.click("summary")
    page.fill("#num_inference_steps", "100")
    page.select_option("#sampler", "heun")
    page.click("#go")
    expect(page.locator("#go")).to_have_text("Stop")
    page.click("#go")
    expect(page.locator("#note")).to_have_text("Stopped.")
    expect(page.locator("#go")).to_have_text("Color it")


@pytest.mark.parametrize("width", [360, 768, 1400])
def test_nothing_is_wider_than_the_window(page: Page, width: int):
    page.set_viewport_size({"width": width, "height": 800})
    page.click("summary")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_description_of_the_api_is_shown(page: Page, url: str):
    page.goto(f"{url}/docs")
    expect(page.locator("section").first).to_contain_text("num_inference_steps")
