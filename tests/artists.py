"""Simulated artists with a fixed taste, for tests of the loop that learns from corrections.

They draw anime faces with pale pencil lines, and they want the hair in one color, whatever the reference shows. A model
that has seen only dark lines gives the hair the color of the reference, so the artists repaint it.
"""

import hashlib
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.color import deltaE_ciede2000, rgb2lab

from animediffusion.models.bundle import Bundle, load_bundle
from animediffusion.models.colorize import colorize
from animediffusion.models.tensors import to_tensor, to_uint8
from animediffusion.pipelines.synthetic.faces import draw, random_character, random_geometry
from animediffusion.pipelines.synthetic.palette import Tone
from animediffusion.platform.config import Settings
from animediffusion.platform.corrections.counts import VersionCounts
from animediffusion.platform.corrections.store import FORMAT, Correction, Corrections, now
from animediffusion.platform.images.codec import encode_png
from animediffusion.platform.registry import traffic
from animediffusion.platform.registry.client import Registry

TEAL = Tone((38, 140, 140), (24, 112, 122), (14, 82, 98), (112, 190, 184))
"""The color that they want."""
RED = Tone((150, 30, 30), (150, 30, 30), (150, 30, 30), (150, 30, 30))
TOO_FAR = 15.0
"""Mean CIEDE2000 of the hair above which they repaint it."""

Pixels = NDArray[np.uint8]


class Request(NamedTuple):
    """A drawing with its reference, and the picture that the artist has in mind."""

    sketch: Pixels
    """[S, S], dark lines on white."""
    reference: Pixels
    """[S, S, 3]"""
    wanted: Pixels
    """[S, S, 3]"""
    hair: NDArray[np.bool_]
    """[S, S]"""


def draw_request(number: int, size: int) -> Request:
    """Draw the request of this number; each number is another character."""
    rng = np.random.default_rng([77, number])
    character, geometry = random_character(rng), random_geometry(rng)
    reference, _ = draw(character, random_geometry(rng), size)
    teal, red = (replace(character, palette=character.palette._replace(hair=tone)) for tone in (TEAL, RED))
    (wanted, lines), (other, _) = draw(teal, geometry, size), draw(red, geometry, size)
    pale = 255 - (255 - lines) // 2
    return Request(pale, reference, wanted, np.abs(other.astype(np.int16) - wanted).max(axis=2) > 48)


def draw_signed_request(number: int, size: int) -> Request:
    """Draw the request of this number with a black seal in a corner, so that a server leaves its lines pale.

    Without dark ink in a drawing, a server darkens its lines (serve/rendering/sketch.py). The network would then hardly
    see what distinguishes the drawings of these artists from others, and could learn their taste only for all drawings.
    """
    request = draw_request(number, size)
    sketch, wanted, hair = request.sketch.copy(), request.wanted.copy(), request.hair.copy()
    seal = (slice(-(size // 8), None), slice(-(size // 8), None))
    sketch[seal], wanted[seal], hair[seal] = 0, 0, False
    return Request(sketch, request.reference, wanted, hair)


def color(bundle: Bundle, requests: list[Request]) -> list[Pixels]:
    """Return the pictures that a model makes of the requests."""
    sketches = to_tensor(torch.from_numpy(np.stack([one.sketch for one in requests])))
    references = to_tensor(torch.from_numpy(np.stack([one.reference for one in requests])))
    return list(to_uint8(colorize(bundle, sketches, references, seeds=list(range(len(requests))))).numpy())


def distance(request: Request, picture: Pixels) -> float:
    """Return the mean CIEDE2000 between the hair of a picture and the hair that the artist wants."""
    difference = deltaE_ciede2000(rgb2lab(picture), rgb2lab(request.wanted))
    return float(difference[request.hair].mean())


class Studio:
    """Artists who color with the versions that get requests, and correct what is too far from what they want.

    Args:
        settings: names the registry and the corrections store.
        size: side of the drawings in pixels.
    """

    def __init__(self, settings: Settings, size: int) -> None:
        assert settings.corrections_uri is not None
        self.settings, self.size = settings, size
        self.store = Corrections(settings.corrections_uri)
        self.drawn = 0

    def work(self, count: int) -> dict[int, float]:
        """Color `count` new drawings with each version that gets requests; return the share that was corrected."""
        registry = Registry(self.settings)
        rates = {}
        for version in traffic.read(registry).shares:
            requests = [draw_request(self.drawn + number, self.size) for number in range(count)]
            pictures = color(load_bundle(registry.fetch(f"models:/{registry.name}/{version}")), requests)
            bad = [distance(request, picture) > TOO_FAR for request, picture in zip(requests, pictures, strict=True)]
            self.store.add_counts({(now()[:10], str(version)): VersionCounts(count, 0)})
            for number in np.flatnonzero(bad).tolist():
                correct(self.store, str(version), f"request-{self.drawn + number}", requests[number], pictures[number])
            self.drawn += count
            rates[version] = float(np.mean(bad))
        return rates


def correct(store: Corrections, version: str, request_id: str, request: Request, picture: Pixels) -> None:
    """Save a correction as a server does: the picture becomes what the artist wants."""
    pictures = {
        "sketch.png": request.sketch,
        "lines.png": request.sketch,
        "reference-1.png": request.reference,
        "result.png": picture,
        "corrected.png": request.wanted,
    }
    record = {
        "format": FORMAT,
        "request_id": request_id,
        "key": "studio",
        "model_version": version,
        "answered": now(),
        "time": now(),
        "sha256": {name: hashlib.sha256(pixels.tobytes()).hexdigest() for name, pixels in pictures.items()},
    }
    files = {name: encode_png(pixels) for name, pixels in pictures.items()}
    assert store.save(Correction(record=record, files=files)) == "stored"
