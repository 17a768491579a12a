"""Coloring of drawing files: the command `colorize`, with a bundle in this process or with a server.

    colorizer = RemoteColorizer(url) if url else LocalColorizer(settings, model)
    options = SamplerOptions(seed=7)
    for result in colorize_files(colorizer, [Path("drawings")], [Path("reference.png")], Path("out"), options):
        print(result.output or result.error)

Both colorizers make the same picture from the same sketch, reference, seed and version. Each file contains metadata
about its inputs and settings (file_metadata.py), so that an interrupted command resumes when it is run again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from animediffusion.models.sampler_options import SamplerOptions
from animediffusion.platform.errors import AnimeDiffusionError, ConfigError, DataError, ImageError, StorageError
from animediffusion.platform.images.picture_names import PICTURES, UPLOADED_SUFFIXES, is_junk
from animediffusion.platform.registry.downloads import STARTER
from animediffusion.platform.storage.storage import explained, write_bytes
from animediffusion.serve.client.file_metadata import read_metadata, with_metadata
from animediffusion.serve.rendering.render import DEFAULTS, Output, RenderOptions, read_picture

FileFormat = Literal["png", "ora", "psd"]

OUTPUTS: dict[FileFormat, Output] = {"png": "both", "ora": "ora", "psd": "psd"}
"""What is asked for to write files of a format."""
LAYER_SUFFIX = ".color.png"
MAX_NAME_BYTES = 255
"""Longest name of a file on the usual file systems."""
MAX_FILE_BYTES = 512 * 2**20
"""Size of the largest file to read: more than the pixels of any usable picture, and less than fills the memory."""


@dataclass(frozen=True)
class ColoredDrawing:
    """One colored drawing, as files."""

    picture: bytes
    """PNG, or the file with layers."""
    maker: str
    """The model's version, see maker_of()."""
    color_layer: bytes | None = None
    """PNG; None if the picture is a file with layers."""


class Colorizer(Protocol):
    """Interface that colors drawings, locally or on a server. Several threads call it at the same time."""

    max_concurrent: int
    """Number of drawings to color concurrently."""

    def colorize(
        self,
        sketch: bytes,
        references: Sequence[bytes],
        options: SamplerOptions,
        rendering: RenderOptions = ...,
        file_format: FileFormat = ...,
        *,
        name: str,
    ) -> ColoredDrawing:
        """Color one drawing.

        Args:
            sketch: bytes of the image file.
            references: bytes of one to MAX_REFERENCES image files; the first one counts most.
            options: sampler settings.
            rendering: settings of the finished picture.
            file_format: format of the picture.
            name: name of the sketch in error messages.

        Raises:
            AnimeDiffusionError: the drawing cannot be colored.
        """

    def versions(self) -> Collection[str]:
        """Return the model versions that may answer now, see maker_of()."""


@dataclass(frozen=True, kw_only=True)
class FileResult:
    """Result of one drawing: the written files, or an error."""

    sketch: Path
    output: Path | None = None
    seed: int = 0
    model_version: str = ""
    error: AnimeDiffusionError | None = None
    skipped: bool = False
    """Whether the files existed already, made from the same inputs with the same settings."""

    def summary(self) -> dict[str, Any]:
        """Return the entry that `colorize --json` prints."""
        return {
            "sketch": str(self.sketch),
            "output": str(self.output) if self.output else None,
            "seed": self.seed,
            "model_version": self.model_version,
            **({"error": str(self.error)} if self.error else {}),
            **({"skipped": True} if self.skipped else {}),
        }


def colorize_files(
    colorizer: Colorizer,
    sketches: Sequence[Path],
    references: Sequence[Path],
    out: Path,
    options: SamplerOptions,
    rendering: RenderOptions = DEFAULTS,
    file_format: FileFormat = "png",
) -> Iterator[FileResult]:
    """Write the files of every drawing; yield the results in the order of the drawings.

    The files are OUT/STEM.png and OUT/STEM.color.png, or OUT/STEM.ora, or OUT/STEM.psd.

    If a drawing cannot be colored or written, or two drawings would be written to the same file, their results contain
    an error, and the other drawings are colored. A drawing is skipped if its files exist already, made from the same
    inputs with the same settings by a version that still answers.

    Args:
        colorizer: a local or remote Colorizer.
        sketches: files, and folders of files.
        references: one to MAX_REFERENCES image files with the colors.
        out: output folder, which is created if it is missing.
        options: sampler settings for all drawings.
        rendering: settings of the finished pictures.
        file_format: format of the pictures.

    Raises:
        AnimeDiffusionError: there is nothing to color, a reference or `out` is not usable, or the colorizer does not
            work.
    """
    files = list_sketches(sketches)
    with explained(str(out)):
        targets, clashes = _targets(files, out, file_format)
        out.mkdir(parents=True, exist_ok=True)
    colors = [_read(reference) for reference in references]
    for data, reference in zip(colors, references, strict=True):
        read_picture(data, thing=str(reference))
    run = _Run(colorizer, colors, options, rendering, file_format)

    def color(sketch: Path, target: Path) -> FileResult:
        error = clashes.get(sketch)
        return run.color(sketch, target) if error is None else FileResult(sketch=sketch, seed=options.seed, error=error)

    with ThreadPoolExecutor(colorizer.max_concurrent) as pool:
        # If a drawing raises, or the caller closes the generator, map() cancels the drawings that have not started.
        yield from pool.map(color, files, targets)


class _Run:
    """State that all drawings of one command share."""

    def __init__(
        self,
        colorizer: Colorizer,
        references: Sequence[bytes],
        options: SamplerOptions,
        rendering: RenderOptions,
        file_format: FileFormat,
    ) -> None:
        self.colorizer = colorizer
        self.references = references
        self.options = options
        self.rendering = rendering
        self.file_format: FileFormat = file_format
        self.metadata = settings_metadata(references, options, rendering)

    def color(self, sketch: Path, target: Path) -> FileResult:
        """Color one file and write the layer before the picture, so that a picture always has its layer."""
        files, seed = _files_of(target), self.options.seed
        try:
            _check_length(sketch, files[-1])
            drawing = _read(sketch)
            metadata = {"sketch": sha256_of(drawing), **self.metadata}
            before = read_metadata(target)
            is_whole = all(read_metadata(file) == before for file in files[1:])
            if before is not None and is_same(before, metadata, self.colorizer.versions()) and is_whole:
                version = version_of(str(before["model_version"]))
                return FileResult(sketch=sketch, output=target, seed=seed, model_version=version, skipped=True)
            colored = self.colorizer.colorize(
                drawing, self.references, self.options, self.rendering, self.file_format, name=str(sketch)
            )
            metadata["model_version"] = colored.maker
            if colored.color_layer is not None:
                write_bytes(str(files[1]), with_metadata(colored.color_layer, metadata))
            write_bytes(str(target), with_metadata(colored.picture, metadata))
        except (ImageError, DataError, StorageError) as error:
            return FileResult(sketch=sketch, seed=seed, error=error)
        except ConfigError as error:
            if error.thing != "hints":
                raise
            wrong = DataError(str(sketch), f"the hints do not fit it ({error.found})", error.allowed)
            return FileResult(sketch=sketch, seed=seed, error=wrong)
        return FileResult(sketch=sketch, output=target, seed=seed, model_version=version_of(colored.maker))


def list_sketches(sketches: Sequence[Path]) -> list[Path]:
    """Return the given files and the images of the given folders, sorted by name within a folder, without duplicates.

    Raises:
        DataError: a path does not exist, or a folder has no image that can be colored.
        StorageError: a folder cannot be opened.
    """
    files: dict[Path, Path] = {}
    for path in sketches:
        with explained(str(path)):
            if not path.exists() and not path.is_symlink():
                raise DataError(str(path), "no such file or folder", "give sketches or folders of sketches")
            pictures = _pictures(path, UPLOADED_SUFFIXES) if path.is_dir() else [path]
            inside = [file for file in pictures if read_metadata(file) is None] if path.is_dir() else pictures
        if not inside:
            found = "has only images that colorize has made" if pictures else "has no images"
            found += " itself, its folders have" if list_inner_folders([path]) else ""
            raise DataError(str(path), found, f"give a folder of {', '.join(sorted(UPLOADED_SUFFIXES))} files")
        for file in inside:
            files.setdefault(_place(file), file)
    return list(files.values())


def list_unsupported(sketches: Sequence[Path]) -> list[Path]:
    """Return the pictures in the given folders whose formats are not supported, which list_sketches() leaves out.

    Files with layers that `colorize` has made are not among them.
    """
    return [
        file
        for path in sketches
        if path.is_dir()
        for file in _pictures(path, PICTURES - UPLOADED_SUFFIXES)
        if read_metadata(file) is None
    ]


def list_own_results(sketches: Sequence[Path], listed: Sequence[Path]) -> list[Path]:
    """Return the pictures that list_sketches() left out of `listed` because `colorize` has made them."""
    places = {_place(file) for file in listed}
    return [
        file
        for path in sketches
        if path.is_dir()
        for file in _pictures(path, UPLOADED_SUFFIXES)
        if _place(file) not in places
    ]


def list_inner_folders(sketches: Sequence[Path]) -> list[Path]:
    """Return the folders inside the given folders that hold pictures to color, which list_sketches() does not enter."""
    given = {path.resolve() for path in sketches if path.is_dir()}
    return sorted(
        inner
        for folder in sketches
        if folder.is_dir()
        for inner in folder.iterdir()
        if not is_junk(inner.name) and inner.is_dir() and inner.resolve() not in given and _holds_pictures(inner)
    )


def _holds_pictures(folder: Path) -> bool:
    """Whether a folder, or one inside it, holds a picture that `colorize` has not made."""
    return any(
        Path(name).suffix.lower() in UPLOADED_SUFFIXES
        and not is_junk(name)
        and read_metadata(Path(place, name)) is None
        for place, _, names in os.walk(folder)
        for name in names
    )


def _place(file: Path) -> Path:
    """Return the path by which two names of one file in one folder are equal; a link to the file stays another."""
    return file.parent.resolve() / file.name


def _pictures(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """Return the files with these suffixes, including broken links."""
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in suffixes and not is_junk(file.name) and (file.is_file() or not file.exists())
    )


def _targets(files: Sequence[Path], out: Path, file_format: FileFormat) -> tuple[list[Path], dict[Path, ConfigError]]:
    """Return the picture of every file, and an error for each file whose output another file would write, too.

    Raises:
        ConfigError: `out` is a file, or a sketch would be overwritten.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError("--out", f"{out} is a file", "give a folder")
    targets = [out / f"{file.stem}.{file_format}" for file in files]
    # realpath() accepts links that lead to each other, for which resolve() raises a RuntimeError.
    sources = {place for file in files for place in (os.path.realpath(file), str(_place(file)))}
    makers: dict[Path, list[Path]] = {}
    for file, target in zip(files, targets, strict=True):
        for written in _files_of(target):
            if os.path.realpath(written) in sources:
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
    return ConfigError(str(file), found, "color them in two commands with different --out folders")


def _check_length(sketch: Path, written: Path) -> None:
    surplus = len(os.fsencode(written.name)) - MAX_NAME_BYTES
    if surplus > 0:
        suffix = LAYER_SUFFIX if written.suffix == ".png" else written.suffix
        found = f"its name is {surplus} bytes too long for STEM{suffix}"
        raise DataError(str(sketch), found, "give it a shorter name")


def _files_of(target: Path) -> list[Path]:
    """Return the files of one drawing: the picture, and for a PNG its color layer, which has the longest name."""
    return [target, target.with_name(target.stem + LAYER_SUFFIX)] if target.suffix == ".png" else [target]


def settings_metadata(references: Sequence[bytes], options: SamplerOptions, rendering: RenderOptions) -> dict[str, Any]:
    """Return what the metadata of a picture says about its references and settings."""
    return {"reference": " ".join(map(sha256_of, references)), **asdict(options), **_settings(rendering)}


def maker_of(version: str, sha256: str) -> str:
    """Return the name of a version in the metadata of its pictures.

    That of the starter model contains its hash, because an update of the package may bring another starter model.

    Args:
        version: a registry number, `sha256:` and 12 hex digits, or `starter`.
        sha256: hash of the bundle.
    """
    return f"{STARTER}:{sha256[:12]}" if version == STARTER else version


def version_of(maker: str) -> str:
    """Return the version of a name from maker_of()."""
    return STARTER if maker.startswith(f"{STARTER}:") else maker


def is_same(before: Mapping[str, Any] | None, metadata: Mapping[str, Any], versions: Collection[str]) -> bool:
    """Whether a file was made from the same inputs with the same settings, by a version that still answers.

    Args:
        before: metadata of the file, None if it has none.
        metadata: what it would be now, without the version.
        versions: the versions that may answer.
    """
    version = (before or {}).get("model_version")
    return before == {**metadata, "model_version": version} and version in versions


def _settings(rendering: RenderOptions) -> dict[str, Any]:
    """Return the settings of a picture for its metadata, without those that the style `painted` of PNGs never had."""
    palette, hints = rendering.palette, rendering.hints
    found = {
        "size": rendering.size,
        "style": None if rendering.usual_style == "painted" else rendering.usual_style,
        "background": rendering.background,
        "palette": sha256_of(palette) if isinstance(palette, bytes) else palette,
        "hints": None if hints is None else sha256_of(hints if isinstance(hints, bytes) else hints.encode()),
    }
    if found["palette"] == "reference":
        del found["palette"]
    return {name: value for name, value in found.items() if value is not None}


def sha256_of(data: bytes) -> str:
    """Return the hash of a file in the metadata."""
    return hashlib.sha256(data).hexdigest()


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise DataError(str(path), error.strerror or "cannot be read", "give an image file") from error
    if len(data) > MAX_FILE_BYTES:
        raise ImageError(str(path), f"is larger than {MAX_FILE_BYTES // 2**20} MiB", "give an image file")
    return data
