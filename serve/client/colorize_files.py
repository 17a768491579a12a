"""Colors drawings from files: the command `colorize`, with a bundle in this process or a server elsewhere.

    painter = RemotePainter(url) if url else LocalPainter(settings, model)
    for done in colorize_files(painter, [Path("drawings")], Path("reference.png"), Path("out"), Options(seed=7)):
        print(done.output or done.error)

Both painters make the same picture of the same sketch, reference, seed and version. Pictures say of themselves how they
were made (stamp.py), so a command that was stopped goes on where it was when it is given again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from animediffusion.platform.errors import AnimeDiffusionError, ConfigError, DataError, ImageError, StorageError
from animediffusion.platform.images.picture_names import PICTURES, SENT, is_junk
from animediffusion.platform.storage.files import explained, write_bytes
from animediffusion.serve.client.png_metadata import read_stamp, stamped
from animediffusion.serve.rendering.render import Size, read_picture

LAYER_SUFFIX = ".color.png"
MAX_NAME_BYTES = 255
"""Of a file's name, on every usual file system."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to color; what is None is the model's own default."""

    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    size: Size = "native"


@dataclass(frozen=True)
class Painting:
    """One colored drawing, as PNGs."""

    picture: bytes
    color_layer: bytes
    model_version: str


class Painter(Protocol):
    """Where coloring happens; asked by several threads at a time."""

    num_at_once: int
    """Drawings that are worth having under way together."""

    def paint(self, sketch: bytes, reference: bytes, options: Options, *, thing: str) -> Painting:
        """Color one drawing; raises an AnimeDiffusionError that names `thing`."""

    def versions(self) -> Collection[str]:
        """The model versions that may answer now."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """What became of one drawing: files, or an error."""

    sketch: Path
    output: Path | None = None
    seed: int = 0
    model_version: str = ""
    error: AnimeDiffusionError | None = None
    skipped: bool = False
    """The files were there already, made of the same with the same settings."""

    def summary(self) -> dict[str, Any]:
        """The entry that `colorize --json` prints."""
        return {
            "sketch": str(self.sketch),
            "output": str(self.output) if self.output else None,
            "seed": self.seed,
            "model_version": self.model_version,
            **({"error": str(self.error)} if self.error else {}),
            **({"skipped": True} if self.skipped else {}),
        }


def colorize_files(
    painter: Painter, sketches: Sequence[Path], reference: Path, out: Path, options: Options
) -> Iterator[Done]:
    """Write OUT/STEM.png and OUT/STEM.color.png for every drawing; results come in the order of the drawings.

    A drawing that cannot be colored or written becomes a Done with its error, so do drawings that would become the same
    file; the others are colored. One that is done already, of the same files with the same settings by a version that
    still answers, is not done again.

    Args:
        painter: local or remote.
        sketches: files, and folders of files.
        reference: image file with the colors.
        out: folder, made if need be.
        options: for all of them.

    Raises:
        AnimeDiffusionError: nothing to color, an unusable reference or `out`, or nobody there to color.
    """
    files = list_sketches(sketches)
    with explained(str(out)):
        targets, clashes = _targets(files, out)
        out.mkdir(parents=True, exist_ok=True)
    colors = _read(reference)
    read_picture(colors, thing=str(reference))
    run = _Run(painter, colors, options)

    def color(sketch: Path, target: Path) -> Done:
        error = clashes.get(sketch)
        return run.color(sketch, target) if error is None else Done(sketch=sketch, seed=options.seed, error=error)

    with ThreadPoolExecutor(painter.num_at_once) as pool:
        yield from pool.map(color, files, targets)  # one that raises, or a caller that leaves, cancels the rest


class _Run:
    """What all drawings of one command share."""

    def __init__(self, painter: Painter, reference: bytes, options: Options) -> None:
        self.painter = painter
        self.reference = reference
        self.options = options
        self.facts = {"reference": _sha256(reference), **asdict(options)}

    def color(self, sketch: Path, target: Path) -> Done:
        """Color one file into two, the layer first: where there is a picture, there is its layer."""
        layer, seed = _layer_of(target), self.options.seed
        try:
            _check_length(sketch, layer)
            drawing = _read(sketch)
            facts = {"sketch": _sha256(drawing), **self.facts}
            before = read_stamp(target)
            if before is not None and self._is_done(before, facts) and read_stamp(layer) == before:
                version = str(before["model_version"])
                return Done(sketch=sketch, output=target, seed=seed, model_version=version, skipped=True)
            painting = self.painter.paint(drawing, self.reference, self.options, thing=str(sketch))
            facts["model_version"] = painting.model_version
            write_bytes(str(layer), stamped(painting.color_layer, facts))
            write_bytes(str(target), stamped(painting.picture, facts))
        except (ImageError, DataError, StorageError) as error:
            return Done(sketch=sketch, seed=seed, error=error)
        return Done(sketch=sketch, output=target, seed=seed, model_version=painting.model_version)

    def _is_done(self, before: dict[str, Any], facts: dict[str, Any]) -> bool:
        version = before.get("model_version")
        return before == {**facts, "model_version": version} and version in self.painter.versions()


def list_sketches(sketches: Sequence[Path]) -> list[Path]:
    """The files that are meant, each once by its own name, folders opened and sorted by name.

    Raises:
        DataError: one is missing, or a folder has no image that can be colored.
        StorageError: a folder cannot be opened.
    """
    files: dict[Path, Path] = {}
    for path in sketches:
        with explained(str(path)):
            if not path.exists() and not path.is_symlink():
                raise DataError(str(path), "no such file or folder", "give sketches or folders of sketches")
            inside = _pictures(path, SENT) if path.is_dir() else [path]
        if not inside:
            raise DataError(str(path), "has no images", f"give a folder of {', '.join(sorted(SENT))} files")
        for file in inside:
            files.setdefault(file.parent.resolve() / file.name, file)
    return list(files.values())


def list_left_out(sketches: Sequence[Path]) -> list[Path]:
    """Pictures in the folders that list_sketches() opens, of formats that are not colored."""
    return [file for path in sketches if path.is_dir() for file in _pictures(path, PICTURES - SENT)]


def _pictures(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """The files with these suffixes, links to nothing included; not the layers that an earlier run left there."""
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in suffixes
        and not file.name.endswith(LAYER_SUFFIX)
        and not is_junk(file.name)
        and (file.is_file() or not file.exists())
    )


def _targets(files: Sequence[Path], out: Path) -> tuple[list[Path], dict[Path, ConfigError]]:
    """OUT/STEM.png of every file, and the errors of those that would become the same file as others.

    Raises:
        ConfigError: a file that is read would be overwritten.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError("--out", f"{out} is a file", "give a folder")
    targets = [out / f"{file.stem}.png" for file in files]
    sources = {place for file in files for place in (file.resolve(), file.parent.resolve() / file.name)}
    makers: dict[Path, list[Path]] = {}
    for file, target in zip(files, targets, strict=True):
        for written in (target, _layer_of(target)):
            if written.resolve() in sources:
                raise ConfigError("--out", f"{written} is a sketch and would be overwritten", "choose another folder")
            makers.setdefault(written, []).append(file)
    return targets, {
        file: _clash(file, other, written)
        for written, same in makers.items()
        for file, other in zip(same, [*same[1:], same[0]], strict=True)
        if len(same) > 1
    }


def _clash(file: Path, other: Path, written: Path) -> ConfigError:
    found = f"has the same name as {other}: both would become {written}"
    return ConfigError(str(file), found, "color them into different folders")


def _check_length(sketch: Path, layer: Path) -> None:
    surplus = len(os.fsencode(layer.name)) - MAX_NAME_BYTES
    if surplus > 0:
        found = f"its name is {surplus} bytes too long for STEM{LAYER_SUFFIX}"
        raise DataError(str(sketch), found, "give it a shorter name")


def _layer_of(target: Path) -> Path:
    return target.with_name(target.stem + LAYER_SUFFIX)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(str(path), error.strerror or "cannot be read", "give an image file") from error
