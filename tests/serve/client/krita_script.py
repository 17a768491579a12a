"""Runs inside a real Krita: opens a drawing, colors it with the plug-in, saves the picture, and writes what it found.

    PYTHONPATH=tests/serve/client kritarunner -s krita_script -f main

It reads its arguments from the environment, because kritarunner passes none on.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType


def main(_arguments):
    folder = Path(os.environ["KRITA_FOLDER"])
    try:
        found = run(folder)
    except Exception:
        found = {"error": traceback.format_exc()}
    (folder / "found.json").write_text(json.dumps(found))


def run(folder):
    from krita import InfoObject, Krita

    plugin = ModuleType("animediffusion")  # without its __init__.py, which adds the menu entry
    plugin.__path__ = [os.environ["KRITA_PLUGIN"]]
    sys.modules["animediffusion"] = plugin
    from animediffusion import extension, service

    Krita.instance().setBatchmode(True)  # otherwise it may ask, and nobody answers
    document = Krita.instance().openDocument(str(folder / "sketch.png"))
    document.setBatchmode(True)
    [lines] = document.rootNode().childNodes()
    for name in ("hints", "notes"):
        document.rootNode().addChildNode(document.createNode(name, "paintlayer"), None)
    blue, side = bytes([255, 0, 0, 255]), 6
    x, y = json.loads(os.environ["KRITA_HINT"])
    document.nodeByName("hints").setPixelData(blue * side**2, x, y, side, side)
    document.refreshProjection()
    document.waitForDone()
    asked = service.Request(
        os.environ["KRITA_URL"],
        "",
        extension.png_of(lines, document),
        [(folder / "reference.png").read_bytes()],
        extension.hints_of(document),
        seed=1,
    )
    group = extension.add_layers(document, lines, service.color(asked))
    document.nodeByName("hints").setVisible(False)
    document.refreshProjection()
    document.waitForDone()
    document.exportImage(str(folder / "colored.png"), InfoObject())
    return {
        "nodes": [node.name() for node in document.rootNode().childNodes()],
        "group": [[node.name(), node.blendingMode()] for node in group.childNodes()],
        "lines": lines.blendingMode(),
    }
