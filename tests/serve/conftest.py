"""Fixtures: a small network with random weights, so that every condition, seed and setting changes its pictures."""

import json
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import uvicorn
from playwright.sync_api import Page, expect, sync_playwright
from ports import free_port
from programs import chromium
from ray import serve
from webpage import color

from animediffusion.models.bundle import Bundle, BundleConfig, SamplerDefaults, load_bundle, save_bundle
from animediffusion.models.network.unet import UNetConfig
from animediffusion.platform.api_keys import Keyring, Keys
from animediffusion.platform.images.codec import encode_png
from animediffusion.serve.api import access_log
from animediffusion.serve.api.app import create_app
from animediffusion.serve.replica.replica import Replica

SIZE = 32


def random_bundle(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    network = UNetConfig(
        base_channels=32,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        patch_size=2,
        head_channels=32,
        reference_channels=32,
        match_channels=32,
        detail_channels=4,
    )
    sampler = SamplerDefaults(name="dpmpp_2m", steps=3, guidance_scale=1.5)
    config = BundleConfig(network=network, image_size=SIZE, sampler=sampler)
    denoiser = config.build()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_bundle(folder, denoiser, config)
    return folder


@pytest.fixture(scope="session")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_bundle(tmp_path_factory.mktemp("serve") / "bundle")


@pytest.fixture(scope="session")
def bundle(bundle_folder: Path) -> Bundle:
    return load_bundle(bundle_folder)


@pytest.fixture(scope="session")
def sketch() -> np.ndarray:
    """A face of two closed curves, [90, 120, 3], black on white."""
    y, x = np.mgrid[:90, :120]
    radius = np.hypot((x - 60) / 45, (y - 45) / 36)
    gray = np.where(abs(radius - 0.9) < 0.05, 0, 255)
    gray[(abs(np.hypot(x - 48, y - 40) - 6) < 1.2) | (abs(np.hypot(x - 72, y - 40) - 6) < 1.2)] = 30
    return np.repeat(gray[..., None], 3, 2).astype(np.uint8)


@pytest.fixture(scope="session")
def reference() -> np.ndarray:
    """Four areas of strong color, [64, 64, 3]."""
    colors = np.array([[[220, 40, 60], [250, 210, 180]], [[40, 90, 200], [240, 240, 90]]], np.uint8)
    return colors.repeat(32, 0).repeat(32, 1)


@pytest.fixture(scope="session")
def files(sketch, reference):
    """The two files of a valid request."""
    return {"sketch": ("s.png", encode_png(sketch)), "reference": ("r.png", encode_png(reference))}


@pytest.fixture(scope="module")
def replica(bundle_folder):
    """A real replica with version 3, without Ray."""
    replica = Replica()
    assert replica.load("3", bundle_folder)
    yield replica
    replica.close()


@pytest.fixture(scope="session")
def serve_port(ray_cluster):
    """Port of the one Ray Serve of all tests, where applications come and go: its own processes take long to start."""
    yield free_port()
    serve.shutdown()


@contextmanager
def served(app, **options):
    """Serve an application on loopback and give its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", **options))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def serving():
    """A function that serves an application in a with block and gives its address."""
    return served


@pytest.fixture(scope="module")
def url(replica):
    """Address of the API without authentication."""
    with served(create_app(replica)) as url:
        yield url


@pytest.fixture(scope="module")
def key_file(tmp_path_factory):
    """The file of the closed server's API keys."""
    return Keys(str(tmp_path_factory.mktemp("keys") / "keys.json"))


@pytest.fixture(scope="module")
def key(key_file):
    """The key named studio."""
    return key_file.create("studio")


@pytest.fixture(scope="module")
def closed_app(replica, key, key_file):
    """The API with authentication, which takes corrections."""
    return create_app(replica, keyring=Keyring(key_file.uri), corrections=f"{key_file.uri}.corrections")


@pytest.fixture(scope="module")
def closed_url(closed_app):
    """Address of the API with authentication."""
    with served(closed_app) as url:
        yield url


@pytest.fixture
def lines(tmp_path):
    """A function that returns the lines of the access log since the test began."""
    file = tmp_path / "requests.jsonl"
    access_log.write_to(file)

    def read(count=1):
        """Wait for at least `count` lines, because a line is written just after its answer was sent."""
        end = time.monotonic() + 30
        while len(found := file.read_text().splitlines()) < count and time.monotonic() < end:
            time.sleep(0.01)
        return [json.loads(line) for line in found]

    yield read
    access_log.write_to(None)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """Opens a page at an address; it may not fail, nor ask for anything from elsewhere."""
    contexts, errors = [], []

    def open_page(url: str, **options) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "request", lambda request: request.url.startswith((url, "data:", "blob:")) or errors.append(request.url)
        )
        # Keeps file choosers intercepted: turning that on for each one comes too late at times.
        page.on("filechooser", lambda _: None)
        page.goto(url)
        expect(page.locator("#reference-examples img").nth(3)).to_be_visible()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []


@pytest.fixture(scope="session")
def drawing(tmp_path_factory, sketch) -> Path:
    """The file of the sketch."""
    path = tmp_path_factory.mktemp("drawings") / "face.png"
    path.write_bytes(encode_png(sketch))
    return path


@pytest.fixture(scope="session")
def colors(drawing, reference) -> Path:
    """The file of the reference."""
    path = drawing.with_name("colors.png")
    path.write_bytes(encode_png(reference))
    return path


@pytest.fixture
def colored(opened, url, drawing, colors) -> Page:
    """The page with a finished picture."""
    page = opened(url, reduced_motion="reduce")
    color(page, colors, drawing)
    return page


@pytest.fixture
def page(opened, url) -> Page:
    return opened(url)
