"""Corrections sent from the page, in headless Chromium against the real server."""

import io
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect
from webpage import click, color, give_hex, pixels, saved

from animediffusion.platform.corrections.store import Corrections
from animediffusion.serve.api.app import create_app

pytestmark = pytest.mark.browser

EYE, FACE = (48, 40), (60, 60)
"""Places in the fixture `sketch`."""


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Corrections:
    return Corrections(str(tmp_path_factory.mktemp("corrections") / "store"))


@pytest.fixture(scope="module")
def learning_url(replica, store, serving):
    """Address of a server that takes corrections."""
    with serving(create_app(replica, corrections=store.uri)) as url:
        yield url


@pytest.fixture
def colored_here(opened, learning_url, drawing, colors) -> Page:
    page = opened(learning_url, reduced_motion="reduce")
    color(page, colors, drawing)
    return page


def record_of(store: Corrections) -> tuple[dict, np.ndarray]:
    """The only correction, and its picture."""
    [entry] = store.entries()
    with zipfile.ZipFile(Path(store.uri) / entry.path) as archive:
        record, picture = json.loads(archive.read("record.json")), archive.read("corrected.png")
    return record, np.asarray(Image.open(io.BytesIO(picture))).astype(int)


def test_a_repainted_picture_is_sent_after_one_question_and_again_without(colored_here: Page, store: Corrections):
    page, offer, note = colored_here, colored_here.locator("#send-correction"), colored_here.locator("#correction-note")
    expect(offer).to_be_hidden()  # Nothing is repainted yet.
    click(page, EYE)
    give_hex(page, "#3264c8")
    expect(note).to_contain_text("The server stores your drawing")
    offer.click()
    page.click("#disagree")
    assert store.entries() == []
    offer.click()
    expect(page.locator("#agree")).to_be_focused()
    page.keyboard.press("Enter")
    expect(note).to_contain_text("Thank you")
    expect(offer).to_be_hidden()
    record, picture = record_of(store)
    assert (picture == pixels(saved(page, "#save")[1])).all()
    assert record["hints"] == [{"x": 48, "y": 40, "color": "#3264c8", "scope": "whole", "learned": False}]

    click(page, FACE)
    give_hex(page, "#e0b080")
    offer.click()  # Without a question.
    expect(note).to_contain_text("Thank you")
    record, picture = record_of(store)
    assert len(record["hints"]) == 2
    assert (picture == pixels(saved(page, "#save")[1])).all()
    page.click("#undo")
    expect(offer).to_be_visible()


def test_a_correction_that_the_server_cannot_take_says_so_and_can_be_sent_again(colored_here: Page, store: Corrections):
    page = colored_here
    click(page, EYE)
    give_hex(page, "#3264c8")
    page.route("**/v1/corrections", lambda route: route.fulfill(status=503, body="{}"))
    page.click("#send-correction")
    page.click("#agree")
    expect(page.locator("#correction-note")).not_to_have_text(re.compile("Sending|Thank you|stores your drawing"))
    page.unroute("**/v1/corrections")
    before = len(store.entries())
    page.click("#send-correction")
    expect(page.locator("#correction-note")).to_contain_text("Thank you")
    assert len(store.entries()) == before + 1


def test_a_server_without_corrections_offers_nothing(colored: Page):
    click(colored, EYE)
    give_hex(colored, "#3264c8")
    expect(colored.locator("#correction")).to_be_hidden()
