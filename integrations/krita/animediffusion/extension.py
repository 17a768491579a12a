"""The menu entry `Color Line Art`: asks, sends the selected layer in a thread, and adds what comes back as layers."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from krita import Extension, InfoObject, Krita
from PyQt5.QtCore import QRect, QTimer
from PyQt5.QtGui import QIcon, QImage
from PyQt5.QtWidgets import (
    QComboBox,
    QDialog,
    QDialogButtonBox,
    QFileDialog,
    QFormLayout,
    QLabel,
    QLineEdit,
    QMessageBox,
    QPushButton,
    QSpinBox,
    QVBoxLayout,
    QWidget,
)

from . import service
from .service import Layers, Request, ServiceError

TITLE = "Color Line Art"
SETTINGS = "animediffusion"
"""Group of our settings in Krita's kritarc."""
KEY_VARIABLE = "ANIMEDIFFUSION_API_KEY"
HINTS = "hints"
"""Name of the layer whose strokes are hints."""
GROUP = "AnimeDiffusion"
BLENDING = {"flats": "normal", "shading": "multiply", "highlights": "screen"}
"""Blending mode of each layer, from the lowest to the highest: Krita's names of what the server computed."""
POLL_MS = 100
MIN_FIELD_PX = 260
PICTURES = "Pictures (*.png *.jpg *.jpeg *.webp)"


class ColorLineArt(Extension):  # type: ignore[misc]
    """The extension, of which Krita has one."""

    def setup(self) -> None:
        """Krita calls this once, when it starts."""

    def createActions(self, window: Any) -> None:  # noqa: N802
        """Krita calls this for each window."""
        action = window.createAction("animediffusion_color_line_art", f"{TITLE}...", "tools/scripts")
        action.triggered.connect(self.start)

    def start(self) -> None:
        """Ask for references and settings, and color the selected layer."""
        document = Krita.instance().activeDocument()
        if document is None:
            _tell("Open a drawing first.")
            return
        if document.colorModel() != "RGBA":
            _tell("This image has no colors. Choose Image > Convert Image Color Space, model RGB/Alpha.")
            return
        layer = document.activeNode()
        dialog = _Dialog(layer.name())
        if not dialog.exec_():
            return
        try:
            asked = dialog.request(png_of(layer, document), hints_of(document))
        except (OSError, ServiceError) as error:
            _tell(str(error))
            return
        in_background(lambda: service.color(asked), lambda layers: add_layers(document, layer, layers))


def png_of(node: Any, document: Any) -> bytes:
    """Return a node's picture as a PNG of the document's size, in the document's colors."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.png"
        bounds = QRect(0, 0, document.width(), document.height())
        node.save(str(path), 72.0, 72.0, InfoObject(), bounds)
        if not path.exists():  # the result of save() is None in Krita 5.1
            raise ServiceError(f"Krita cannot save the layer {node.name()} as a PNG")
        return path.read_bytes()


def hints_of(document: Any) -> bytes | None:
    """Return the layer named `hints` as a PNG; None without such a layer, or if it is hidden."""
    node = document.nodeByName(HINTS)
    return png_of(node, document) if node is not None and node.visible() else None


def add_layers(document: Any, lines: Any, layers: Layers) -> Any:
    """Add a group of layers below the layer `lines`, and return the group.

    The layer `lines` gets the blending mode `multiply`, because its white paper would hide the colors.
    """
    group = document.createGroupLayer(GROUP)
    for name, mode in BLENDING.items():
        data = getattr(layers, name)
        if data is not None:
            node = document.createNode(name, "paintlayer")
            group.addChildNode(node, None)  # on top
            _fill(node, data)
            node.setBlendingMode(mode)
    parent = lines.parentNode()
    siblings = parent.childNodes()
    place = [node.uniqueId() for node in siblings].index(lines.uniqueId())
    if place:
        parent.addChildNode(group, siblings[place - 1])
    else:  # addChildNode() cannot put a node below the lowest, so the others are put on top of it, one by one
        parent.addChildNode(group, None)
        for sibling in siblings:
            sibling.remove()
            parent.addChildNode(sibling, None)
    lines.setBlendingMode("multiply")
    document.refreshProjection()
    return group


def _fill(node: Any, png: bytes) -> None:
    """Give a paint layer the pixels of a PNG. It gets 8-bit RGB, whatever the colors of its document are."""
    image = QImage.fromData(png, "PNG").convertToFormat(QImage.Format_ARGB32)
    node.setColorSpace("RGBA", "U8", "sRGB-elle-V2-srgbtrc.icc")
    pixels = image.constBits()
    pixels.setsize(image.sizeInBytes())
    # Both Qt and Krita keep a pixel as the bytes blue, green, red, alpha; rows of 4-byte pixels have no padding.
    node.setPixelData(bytes(pixels), 0, 0, image.width(), image.height())


def in_background(work: Callable[[], Layers], use: Callable[[Layers], Any]) -> None:
    """Call `work` in a thread, so that Krita stays usable, and then `use` with its result in Krita's own thread."""
    found: list[Layers] = []
    errors: list[str] = []

    def body() -> None:
        try:
            found.append(work())
        except ServiceError as error:
            errors.append(str(error))
        except Exception as error:  # otherwise the user would wait forever
            errors.append(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=body, daemon=True)
    timer = QTimer(Krita.instance())

    def look() -> None:
        if thread.is_alive():
            return
        timer.stop()
        timer.deleteLater()
        if errors:
            _tell(errors[0])
        else:
            use(found[0])

    timer.timeout.connect(look)
    thread.start()
    timer.start(POLL_MS)
    _float("The drawing is being colored.")


def _float(text: str) -> None:
    """Show a message for some seconds on the canvas."""
    window = Krita.instance().activeWindow()
    if window is not None and window.activeView() is not None:
        window.activeView().showFloatingMessage(text, QIcon(), 4000, 1)


def _tell(text: str) -> None:
    QMessageBox.information(None, TITLE, text)


class _Dialog(QDialog):  # type: ignore[misc]
    """Address, key, references, style and seed. Krita keeps address, references and style for the next time."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.setWindowTitle(TITLE)
        self.url = QLineEdit(_setting("url", "http://127.0.0.1:8000"))
        self.key = QLineEdit(os.environ.get(KEY_VARIABLE, ""))
        self.key.setEchoMode(QLineEdit.Password)
        self.key.setPlaceholderText("if the server requires one")
        self.url.setMinimumWidth(MIN_FIELD_PX)
        self.references = [one for one in _setting("references", "").split("\n") if one]
        self.shown, choose = QLabel(), QPushButton("Choose...")
        choose.clicked.connect(self._choose)
        self.style_box = QComboBox()
        self.style_box.addItems(["flat", "shaded"])
        self.style_box.setCurrentText(_setting("style", "flat"))
        self.seed = QSpinBox()
        self.seed.setMaximum(2**31 - 1)
        rows = QFormLayout()
        for label, widget in (
            ("Layer of lines", QLabel(layer)),
            ("References", _column(self.shown, choose)),
            ("Style", self.style_box),
            ("Seed", self.seed),
            ("Server", self.url),
            ("API key", self.key),
        ):
            rows.addRow(label, widget)
        self.buttons = QDialogButtonBox(QDialogButtonBox.Ok | QDialogButtonBox.Cancel)
        self.buttons.accepted.connect(self.accept)
        self.buttons.rejected.connect(self.reject)
        layout = QVBoxLayout(self)
        layout.addLayout(rows)
        layout.addWidget(self.buttons)
        self._show()

    def request(self, lines: bytes, hints: bytes | None) -> Request:
        """Return what was entered, and keep it; raise OSError if a reference cannot be read."""
        url, style = self.url.text().strip(), self.style_box.currentText()
        for name, value in (("url", url), ("references", "\n".join(self.references)), ("style", style)):
            Krita.instance().writeSetting(SETTINGS, name, value)
        references = [Path(one).read_bytes() for one in self.references]
        return Request(url, self.key.text().strip(), lines, references, hints, style, self.seed.value())

    def _choose(self) -> None:
        paths, _ = QFileDialog.getOpenFileNames(self, f"1 to {service.MOST_REFERENCES} references", "", PICTURES)
        if paths:
            self.references = paths
            self._show()

    def _show(self) -> None:
        count = len(self.references)
        self.shown.setText("\n".join(Path(one).name for one in self.references) or "none")
        self.buttons.button(QDialogButtonBox.Ok).setEnabled(1 <= count <= service.MOST_REFERENCES)


def _column(*widgets: QWidget) -> QWidget:
    """Return the widgets one below the other."""
    column = QWidget()
    layout = QVBoxLayout(column)
    layout.setContentsMargins(0, 0, 0, 0)
    for widget in widgets:
        layout.addWidget(widget)
    return column


def _setting(name: str, otherwise: str) -> str:
    return str(Krita.instance().readSetting(SETTINGS, name, otherwise))
