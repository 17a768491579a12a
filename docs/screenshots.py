"""Take the screenshots of the web page with a real server, a real browser and the page's example drawings.

    python docs/screenshots.py --model BUNDLE [--out docs/images]

The script needs Chromium. page.png shows a desktop window with the comparison slider in use and a color changed by
hand; page-phone.png shows a phone in dark mode.
"""

from __future__ import annotations

import argparse
import io
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import uvicorn
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from animediffusion.serve.api.app import create_app
from animediffusion.serve.replica.replica import Replica

LIMIT = 200_000
"""Largest file size of a screenshot in bytes; a larger screenshot is reduced to 256, 128 or 64 colors."""
TIMEOUT_MS = 120_000


class Shot(NamedTuple):
    """One screenshot: the window, and the inputs to use on the page."""

    name: str
    width: int
    height: int
    scale: float
    scheme: str
    sketch: int
    reference: int
    seeds: tuple[int, ...]
    compare: int
    dots: tuple[tuple[float, float, str], ...]
    """Places in the picture, as shares of its width and height, and the colors that their regions get."""


SHOTS = (
    Shot("page.png", 1180, 1210, 1.0, "light", 0, 2, seeds=(5, 6, 7), compare=30, dots=((0.76, 0.94, "#8a4a5e"),)),
    Shot("page-phone.png", 390, 844, 1.5, "dark", 2, 0, seeds=(7,), compare=24, dots=((0.72, 0.94, "#3f6f9f"),)),
)


@contextmanager
def server(model: Path) -> Iterator[str]:
    """Serve the page with this bundle as version 1, without Ray, and yield its URL."""
    replica = Replica()
    if not replica.load("1", model):
        raise SystemExit(f"error: {replica.error}")
    running = uvicorn.Server(uvicorn.Config(create_app(replica), port=0, log_level="error"))
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        while not running.started:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join()
        replica.close()


def take(browser: Browser, url: str, shot: Shot) -> bytes:
    """Take one screenshot and return it as PNG."""
    context = browser.new_context(
        viewport={"width": shot.width, "height": shot.height},
        device_scale_factor=shot.scale,
        color_scheme="dark" if shot.scheme == "dark" else "light",
        reduced_motion="reduce",
        has_touch=shot.width < 600,
        is_mobile=shot.width < 600,
    )
    context.set_default_timeout(TIMEOUT_MS)
    page = context.new_page()
    page.goto(url)
    color(page, shot)
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    if shot.width < 600:
        page.evaluate("document.querySelector('#go').scrollIntoView({block: 'start'}); scrollBy(0, -12)")
    page.wait_for_function("[...document.images].every(image => image.complete)")
    data = page.screenshot()
    context.close()
    return data


def color(page: Page, shot: Shot) -> None:
    """Color the examples of a shot once per seed, change colors by hand, and set the comparison slider."""
    page.locator("#sketch-examples button").nth(shot.sketch).click()
    page.locator("#reference-examples button").nth(shot.reference).click()
    page.click("summary")
    for seed in shot.seeds:
        page.fill("#seed", str(seed))
        page.fill("#num_inference_steps", "4")
        page.click("#go")
        expect(page.locator("#note")).to_contain_text(f"seed {seed},", timeout=TIMEOUT_MS)
        expect(page.locator("#go")).to_have_text("Color it", timeout=TIMEOUT_MS)
    page.click("summary")
    for x, y, color in shot.dots:
        box = page.locator("#after").bounding_box()
        assert box
        page.locator("#after").click(position={"x": x * box["width"], "y": y * box["height"]})
        page.fill("#hex", color)
        page.press("#hex", "Enter")
    page.locator("#compare").fill(str(shot.compare))


def small(png: bytes) -> bytes:
    """Return the screenshot in at most LIMIT bytes.

    Raises:
        ValueError: if it is too large even with 64 colors.
    """
    image = Image.open(io.BytesIO(png)).convert("RGB")
    for candidate in (image, *(image.quantize(colors, kmeans=3) for colors in (256, 128, 64))):
        buffer = io.BytesIO()
        candidate.save(buffer, "PNG", optimize=True)
        if buffer.tell() <= LIMIT:
            return buffer.getvalue()
    raise ValueError(f"the picture has {buffer.tell()} bytes, at most {LIMIT} are allowed")


def main() -> None:
    """Take and save all screenshots."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    arguments.add_argument("--model", type=Path, required=True, help="a bundle folder")
    arguments.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    options = arguments.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    options.out.mkdir(parents=True, exist_ok=True)
    with server(options.model) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for shot in SHOTS:
            data = small(take(browser, url, shot))
            (options.out / shot.name).write_bytes(data)
            print(f"{options.out / shot.name}: {len(data) // 1000} kB")
        browser.close()


if __name__ == "__main__":
    main()
