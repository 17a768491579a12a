"""The page in headless Chromium against the real server and engine."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from animediffusion.platform.errors import BusyError
from animediffusion.platform.images.codec import encode_png
from animediffusion.serve.api.app import create_app
from animediffusion.serve.replica.replica import Replica

pytestmark = pytest.mark.browser


def choose(page: Page, kind: str, path: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.click(f"#{kind}")
    chooser.value.set_files(path)


def choose_examples(page: Page) -> None:
    page.click("#sketch-examples button >> nth=0")
    page.click("#reference-examples button >> nth=1")
    expect(page.locator("#go")).to_be_enabled()


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
    field = page.get_by_label("requires a key")
    field.fill("ad_wrong")
    field.press("Enter")
    expect(page.locator("#key-form")).to_contain_text("does not accept that key")
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


def test_the_field_that_is_wrong_is_marked(page: Page, tmp_path: Path, sketch):
    choose_examples(page)
    page.click("summary")
    page.fill("#seed", "5000000000")
    page.click("summary")
    page.click("#go")
    expect(page.get_by_role("alert")).to_contain_text("Seed: 5000000000 is not allowed")
    expect(page.locator("#seed")).to_be_visible()
    expect(page.locator("#seed")).to_have_attribute("aria-invalid", "true")
    page.fill("#seed", "5")
    page.click("#go")
    expect(page.locator("#note")).to_contain_text("seed 5")
    expect(page.locator("[aria-invalid]")).to_have_count(0)


def test_an_inverted_drawing_is_turned_with_one_click(page: Page, tmp_path: Path, sketch):
    (tmp_path / "night.png").write_bytes(encode_png(255 - sketch))
    choose(page, "sketch", tmp_path / "night.png")
    page.click("#reference-examples button >> nth=0")
    page.click("#go")
    expect(page.get_by_role("alert")).to_contain_text("Line art is mostly black")
    page.get_by_role("button", name="Invert it for me").click()
    expect(page.get_by_role("alert")).to_be_hidden()
    page.click("#go")
    expect(page.locator("#note")).to_contain_text("120 x 90 px")


@pytest.mark.parametrize("way", ["paste", "drop"])
def test_pictures_come_by_pasting_and_dropping(page: Page, way: str, sketch, reference):
    script = """([way, pictures]) => {
        const data = new DataTransfer();
        for (const [name, base64] of pictures)
            data.items.add(new File([Uint8Array.from(atob(base64), c => c.charCodeAt(0))], name, {type: "image/png"}));
        const event = way === "paste" ? new ClipboardEvent("paste", {clipboardData: data, bubbles: true})
            : new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true});
        document.body.dispatchEvent(event);
    }"""
    pictures = [("a.png", sketch), ("b.png", reference)]
    sent = [(name, base64.b64encode(encode_png(pixels)).decode()) for name, pixels in pictures]
    if way == "paste":  # one after the other, as a clipboard does
        page.evaluate(script, [way, sent[:1]])
        expect(page.locator("#sketch img")).to_have_attribute("alt", "Chosen: a.png")
        page.evaluate(script, [way, sent[1:]])
    else:
        page.evaluate(script, [way, sent])
    expect(page.locator("#sketch img")).to_have_attribute("alt", "Chosen: a.png")
    expect(page.locator("#reference img")).to_have_attribute("alt", "Chosen: b.png")
    expect(page.locator("#go")).to_be_enabled()


def test_another_try_is_kept_next_to_the_first(page: Page):
    choose_examples(page)
    page.click("summary")
    page.fill("#seed", "5")
    page.click("#go")
    expect(page.locator("#note")).to_contain_text("seed 5")
    page.click("#again")
    expect(page.locator("#tries button")).to_have_count(2)
    expect(page.locator("#note")).not_to_contain_text("seed 5,")
    page.click("#tries button >> nth=0")
    expect(page.locator("#note")).to_contain_text("seed 5,")
    page.fill("#seed", "")
    page.click("#keep-seed")
    expect(page.locator("#seed")).to_have_value("5")


def test_a_model_that_is_not_ready_is_waited_for(opened, serving, bundle_folder):
    replica = Replica()
    with serving(create_app(replica)) as url:
        page = opened(url)
        expect(page.locator("#status")).to_have_text("no model yet")
        choose_examples(page)
        page.click("#go")
        expect(page.locator("#wait")).to_contain_text("no model ready yet. Trying again in")
        replica.load("4", bundle_folder)
        expect(page.locator("#note")).to_contain_text("model version 4")
        expect(page.locator("#wait")).to_be_hidden()


def test_a_busy_server_is_asked_again(opened, serving, bundle_folder):
    class BusyOnce(Replica):
        asked = 0

        def stream(self, job):
            self.asked += 1
            return self.refuse() if self.asked == 1 else super().stream(job)

        async def refuse(self):
            raise BusyError("full")
            yield

    replica = BusyOnce()
    replica.load("3", bundle_folder)
    with serving(create_app(replica)) as url:
        page = opened(url)
        choose_examples(page)
        page.click("#go")
        expect(page.locator("#wait")).to_contain_text(re.compile(r"busy. Trying again in \d+ s"))
        expect(page.locator("#note")).to_contain_text("model version 3")
        assert replica.asked == 2


def test_a_server_that_is_gone_is_said_and_the_pictures_stay(opened, serving, bundle_folder):
    replica = Replica()
    replica.load("3", bundle_folder)
    with serving(create_app(replica)) as url:
        page = opened(url)
        choose_examples(page)
        page.click("#go")
        expect(page.locator("#after")).to_be_visible()
    page.click("#again")
    expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
    expect(page.locator("#after")).to_be_visible()
    expect(page.locator("#go")).to_be_enabled()


def test_everything_has_a_name_for_those_who_cannot_see_it(page: Page):
    choose_examples(page)
    page.click("summary")
    page.click("#go")
    expect(page.locator("#after")).to_be_visible()
    nameless = page.evaluate("""() => [...document.querySelectorAll("button, input:not([hidden]), select, a, img")]
        .filter(one => one.checkVisibility())
        .filter(one => !(one.getAttribute("aria-label") || one.alt || one.labels?.length || one.textContent.trim()
            || one.querySelector("img[alt]:not([alt=''])")) && one.id !== "before")
        .map(one => one.outerHTML)""")
    assert nameless == []
    expect(page.locator("#said")).to_contain_text("Done. 320 x 320 px")
    page.locator("#compare").focus()
    page.keyboard.press("End")
    expect(page.locator("#compare")).to_have_attribute("aria-valuetext", "100 percent line art")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_from_their_ground(opened, url: str, scheme: str):
    page = opened(url, color_scheme=scheme)
    faint = page.evaluate("""() => {
        const rgb = text => text.match(/[\\d.]+/g).map(Number);
        const light = color => color.slice(0, 3).map(v => v / 255)
            .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
        const ground = one => {
            for (; one; one = one.parentElement) {
                const color = rgb(getComputedStyle(one).backgroundColor);
                if (color.length === 3 || color[3] === 1) return color;
            }
        };
        document.querySelector("#go").disabled = false;
        return [...document.querySelectorAll("h1, h2, h3, p, label, summary, .pill, .drop span, .button, footer, a")]
            .filter(one => one.checkVisibility()).map(one => {
                const [a, b] = [light(rgb(getComputedStyle(one).color)), light(ground(one))].sort((x, y) => y - x);
                return [one.textContent.trim().slice(0, 30), (a + .05) / (b + .05)];
            }).filter(([, ratio]) => ratio < 4.5);
    }""")
    assert faint == []  # WCAG 2.2, 1.4.3


def test_a_long_request_can_be_stopped(page: Page):
    page.click("#sketch-examples button >> nth=0")
    page.click("#reference-examples button >> nth=0")
    page.click("summary")
    page.fill("#num_inference_steps", "100")
    page.select_option("#sampler", "heun")
    page.click("#go")
    expect(page.locator("#go")).to_have_text("Stop")
    expect(page.locator("#preview")).to_have_attribute("src", re.compile("^data:image/png"))
    expect(page.locator("#note")).to_have_text(re.compile("^Step .* of 100"))
    page.keyboard.press("Escape")
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
