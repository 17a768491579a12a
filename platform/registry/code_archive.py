"""The part of this package that colors a picture, as files that run without the rest of it.

An exported model and a registered version carry these modules along: those that serve/standalone.py imports, found by
reading import statements, so that the list cannot grow old. They need torch, safetensors, numpy and pillow. Nothing
is imported here.
"""

from __future__ import annotations

import ast
import importlib.metadata
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import animediffusion

ENTRY = "animediffusion.serve.standalone"
NEEDS = ("torch", "safetensors", "numpy", "pillow")
"""What the modules import besides the standard library, by the names of their distributions."""

_PACKAGE = Path(animediffusion.__file__).parent


def modules() -> dict[str, Path]:
    """Archive name ("animediffusion/models/diffusion/path.py") to file, of every module that `ENTRY` reaches."""
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
    """Write the modules under a folder, which put on sys.path makes `animediffusion` importable."""
    for name, path in modules().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(path.read_bytes())


def zip_modules(file: Path) -> None:
    """The same as one zip file, from which Python imports as well; equal modules make equal bytes."""
    with zipfile.ZipFile(file, "w") as archive:
        found = modules()
        # Folders without __init__.py are packages in a zip only where it names them.
        for folder in sorted({f"{parent}/" for name in found for parent in PurePosixPath(name).parents if parent.name}):
            archive.writestr(zipfile.ZipInfo(folder), b"")
        for name, path in found.items():
            archive.writestr(zipfile.ZipInfo(name), path.read_bytes(), zipfile.ZIP_DEFLATED)


def source(name: str) -> bytes:
    """The text of a file of this package, "serve/mlflow_model.py" for example."""
    return (_PACKAGE / name).read_bytes()


def requirements(*more: str) -> str:
    """A requirements.txt: the versions that are installed here, without local labels such as +cpu."""
    return "".join(f"{name}=={importlib.metadata.version(name).partition('+')[0]}\n" for name in (*more, *NEEDS))


def _file(module: str) -> Path | None:
    """Where a module of this package lies; None for others, and for names that are no module."""
    top, *parts = module.split(".")
    if top != "animediffusion" or not parts:
        return None
    path = _PACKAGE.joinpath(*parts).with_suffix(".py")
    return path if path.is_file() else None


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            # `from animediffusion.models import authors` names a module, too.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
