"""docs/batching.py draws what an engine did."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from animediffusion.platform.images.codec import decode_rgb

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def batching(monkeypatch):
    """The script as a module; it imports its neighbor."""
    monkeypatch.syspath_prepend(str(DOCS))
    spec = importlib.util.spec_from_file_location("batching", DOCS / "batching.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "batching", module)  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("pictures", None)


def test_the_picture_is_that_of_a_trace_and_shows_every_kind_of_request(batching, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["batching.py", "--out", str(tmp_path)])
    batching.main()
    pixels = decode_rgb((tmp_path / "batching.png").read_bytes())
    shown = {tuple(color) for color in np.unique(pixels.reshape(-1, 3), axis=0)}
    assert shown >= set(batching.KEYS.values()) | {batching.lighter(color) for color in batching.KEYS.values()}


def test_every_request_of_the_trace_ran_as_long_as_it_asked_for_unless_its_client_left(batching):
    asked = batching.pattern()
    steps = batching.trace(batching.small_bundle(), asked)
    ran = [one.ended - one.started + 1 for one in asked]
    expected = [batching.LEAVES_AFTER if one.left else one.steps for one in asked]
    assert ran == expected
    assert [one.left for one in asked].count(True) == 1
    assert any(one.guided for one in asked)
    assert any(step.waiting for step in steps)
    assert max(step.num_evaluated for step in steps) == batching.MAX_BATCH
