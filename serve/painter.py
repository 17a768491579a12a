"""Colors drawings from files: the command `colorize`, with a bundle in this process or a server elsewhere.

    painter = RemotePainter(url) if url else LocalPainter(settings, model)
    for done in colorize_files(painter, [Path("drawings")], Path("reference.png"), Path("out"), Options(seed=7)):
        print(done.output or done.error)

Both painters make the same picture of the same sketch, reference, seed and version.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from animediffusion.platform.errors import AnimeDiffusionError, ConfigError, DataError, ImageError
from animediffusion.serve.pictures import Size, read_picture

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LAYER_SUFFIX = ".color.png"


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
    """Where coloring happens."""

    def paint(self, sketch: bytes, reference: bytes, options: Options, *, thing: str) -> Painting:
        """Color one drawing; raises an AnimeDiffusionError that names `thing`."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """What became of one drawing: files, or an error."""

    sketch: Path
    output: Path | None = None
    seed: int = 0
    model_version: str = ""
    error: AnimeDiffusionError | None = None

    def summary(self) -> dict[str, Any]:
        """The entry that `colorize --json` prints."""
        return {
            "sketch": str(self.sketch),
            "output": str(self.output) if self.output else None,
            "seed": self.seed,
            "model_version": self.model_version,
            **({"error": str(self.error)} if self.error else {}),
        }


def colorize_files(
    painter: Painter, sketches: Sequence[Path], reference: Path, out: Path, options: Options
) -> Iterator[Done]:
    """Write OUT/STEM.png and OUT/STEM.color.png for every drawing, one after the other.

    A drawing that cannot be colored becomes a Done with its error, and the next one follows.

    Args:
        painter: local or remote.
        sketches: files, and folders of files.
        reference: image file with the colors.
        out: folder, made if need be.
        options: for all of them.

    Raises:
        AnimeDiffusionError: nothing to color, an unusable reference, or names that clash.
    """
    files = list_sketches(sketches)
    targets = _targets(files, out)
    colors = _read(reference)
    read_picture(colors, thing=str(reference))
    out.mkdir(parents=True, exist_ok=True)
    for sketch, target in zip(files, targets, strict=True):
        try:
            painting = painter.paint(_read(sketch), colors, options, thing=str(sketch))
        except (ImageError, DataError) as error:
            yield Done(sketch=sketch, seed=options.seed, error=error)
            continue
        target.write_bytes(painting.picture)
        target.with_name(target.stem + LAYER_SUFFIX).write_bytes(painting.color_layer)
        yield Done(sketch=sketch, output=target, seed=options.seed, model_version=painting.model_version)


def list_sketches(sketches: Sequence[Path]) -> list[Path]:
    """The files that are meant, folders opened and sorted by name.

    Raises:
        DataError: one is missing, or a folder has no image.
    """
    files: list[Path] = []
    for path in sketches:
        if not path.exists():
            raise DataError(str(path), "no such file or folder", "give sketches or folders of sketches")
        inside = sorted(file for file in path.iterdir() if _is_sketch(file)) if path.is_dir() else [path]
        if not inside:
            raise DataError(str(path), "has no images", f"give a folder of {', '.join(SUFFIXES)} files")
        files += inside
    return files


def _is_sketch(file: Path) -> bool:
    """True for images, but not for the layers that an earlier run left there."""
    return file.suffix.lower() in SUFFIXES and not file.name.endswith(LAYER_SUFFIX) and file.is_file()


def _targets(files: Sequence[Path], out: Path) -> list[Path]:
    targets = [out / f"{file.stem}.png" for file in files]
    seen: dict[Path, Path] = {}
    for file, target in zip(files, targets, strict=True):
        if target.resolve() == file.resolve():
            raise ConfigError("--out", f"{out} would overwrite {file}", "choose another folder")
        if target in seen:
            raise ConfigError(str(file), f"has the same name as {seen[target]}", "color them into different folders")
        seen[target] = file
    return targets


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(str(path), error.strerror or "cannot be read", "give an image file") from error
