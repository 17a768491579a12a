"""Collect the modules that color a picture, as files that run without the rest of this package.

An exported model and a registered version contain these modules. The list is found by reading the import statements of
serve/standalone.py and of the modules that it imports, so it is always up to date. The modules need torch, safetensors,
numpy and pillow; collecting them imports none of them.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import animediffusion

ENTRY = "animediffusion.serve.standalone"
"""The module that colors a picture; its name is text, because this folder does not import serve."""
NEEDS = ("torch", "safetensors", "numpy", "pillow")
"""Distributions that the modules import in addition to the standard library."""

_PACKAGE = Path(animediffusion.__file__).parent


def modules() -> dict[str, Path]:
    """Return the file of each module that `ENTRY` imports, by archive name ("animediffusion/models/bundle.py")."""
    found: dict[str, Path] = {"animediffusion/__init__.py": _PACKAGE / "__init__.py"}
    waiting = [ENTRY]
    while waiting:
        path = _file(waiting.pop())
        if path is None:
            continue
        name = f"animediffusion/{path.relative_to(_PACKAGE)}"
        if name not in found:
            found[name] = path
            waiting += _imports(path)
    return dict(sorted(found.items()))


def copy_modules(folder: Path) -> None:
    """Copy the modules into a folder; with this folder on sys.path, `animediffusion` can be imported."""
    for name, path in modules().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(path.read_bytes())


def zip_modules(file: Path) -> None:
    """Write the modules to one zip file that Python can import from; equal modules give equal bytes."""
    with zipfile.ZipFile(file, "w") as archive:
        found = modules()
        # zipimport finds a folder without __init__.py only if the archive has an entry for it.
        for folder in sorted({f"{parent}/" for name in found for parent in PurePosixPath(name).parents if parent.name}):
            archive.writestr(zipfile.ZipInfo(folder), b"")
        for name, path in found.items():
            archive.writestr(zipfile.ZipInfo(name), path.read_bytes(), zipfile.ZIP_DEFLATED)


def source(name: str) -> bytes:
    """Return the content of a file of this package, for example "serve/mlflow_model.py"."""
    return (_PACKAGE / name).read_bytes()


def requirements(*more: str) -> str:
    """Return a requirements.txt with the installed versions, without local labels such as +cpu."""
    return "".join(f"{name}=={importlib.metadata.version(name).partition('+')[0]}\n" for name in (*more, *NEEDS))


def _file(module: str) -> Path | None:
    """Return the file of a module of this package; None for other packages and for names that are not modules."""
    top, *parts = module.split(".")
    if top != "animediffusion" or not parts:
        return None
    path = _PACKAGE.joinpath(*parts).with_suffix(".py")
    return path if path.is_file() else None


@functools.cache
def _imports(path: Path) -> tuple[str, ...]:
    """Return the names that a module imports, read once per process: parsing all modules takes half a second."""
    return tuple(_names(path))


def _names(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            # In `from animediffusion.models import bundle`, the imported name is a module, too.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
