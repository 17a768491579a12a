"""What people do with the web page in a browser, for the tests of the page."""

import io
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Page, expect

WIDTH, HEIGHT = 120, 90
"""Size of the drawing of the fixture `sketch`."""


def choose(page: Page, kind: str, *paths: Path) -> None:
    """Choose files through the button with this id."""
    with page.expect_file_chooser() as chooser:
        page.click(f"#{kind}")
    chooser.value.set_files(paths)


def finished(page: Page) -> None:
    """Wait for the results."""
    expect(page.locator("#colors")).to_be_visible()
    expect(page.locator("#go")).not_to_have_text("Stop")


def color(page: Page, colors: Path, *drawings: Path) -> None:
    """Color the drawings and wait for the results."""
    choose(page, "sketch", *drawings)
    choose(page, "reference", colors)
    page.click("#go")
    finished(page)


def position(page: Page, place: tuple[int, int], box=None) -> dict[str, float]:
    """Where a pixel of the drawing is in the stage."""
    box = box or page.locator("#after").bounding_box()
    return {"x": (place[0] + 0.5) * box["width"] / WIDTH, "y": (place[1] + 0.5) * box["height"] / HEIGHT}


def click(page: Page, place: tuple[int, int], **options) -> None:
    """Click a pixel of the picture."""
    page.locator("#after").click(position=position(page, place), **options)


def give_hex(page: Page, text: str) -> None:
    """Type the color of the chosen region."""
    page.fill("#hex", text)
    page.press("#hex", "Enter")


def shown(page: Page, place: tuple[int, int], canvas: str = "after") -> str:
    """The color of a pixel of a canvas on the page."""
    level = page.evaluate(
        "([id, x, y]) => [...document.getElementById(id).getContext('2d').getImageData(x, y, 1, 1).data]",
        [canvas, *place],
    )
    return "#{:02x}{:02x}{:02x}".format(*level[:3])


def saved(page: Page, button: str) -> tuple[str, bytes]:
    """Name and content of the file that a button saves."""
    with page.expect_download() as download:
        page.click(button)
    return download.value.suggested_filename, Path(download.value.path()).read_bytes()


def pixels(data: bytes | io.BufferedIOBase, mode: str = "RGB") -> np.ndarray:
    """The levels of an image file."""
    image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
    return np.asarray(image.convert(mode)).astype(int)
