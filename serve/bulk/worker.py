"""The actor of a bulk coloring on CPUs: it holds the model, and colors batches of drawings from and to any store.

A picture is the one that the command `colorize` makes in one process, byte by byte: both call serve/client/local.py's
BundleColorizer, in which a drawing has the network for itself. Meanwhile, other threads read, decode, render and write
other drawings. serve/bulk/on_gpus.py is for clusters with GPUs.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from animediffusion.models.bundle import Bundle, load_bundle_files
from animediffusion.models.network.attention import Backend, use_attention
from animediffusion.models.sampler_options import SamplerOptions
from animediffusion.platform.errors import ConfigError, DataError, ImageError, StorageError, UnreachableError
from animediffusion.platform.storage import storage
from animediffusion.platform.storage.addresses import split_options
from animediffusion.serve.client.colorize_files import (
    LAYER_SUFFIX,
    MAX_FILE_BYTES,
    Colorizer,
    FileFormat,
    is_same,
    settings_metadata,
    sha256_of,
)
from animediffusion.serve.client.file_metadata import metadata_of, with_metadata
from animediffusion.serve.client.local import BundleColorizer
from animediffusion.serve.rendering.render import RenderOptions

THREADS = 3
"""Drawings that an actor handles at once: one in the network, one being read, one rendered and written."""
_CACHED_REFERENCES = 16

Made = TypeVar("Made")


@dataclass(frozen=True)
class BulkSettings:
    """What all drawings of a bulk coloring share."""

    options: SamplerOptions
    rendering: RenderOptions
    file_format: FileFormat
    version: str
    """Name of the model's version."""
    name: str | None
    """The model in error messages."""
    attention: Backend
    stores: tuple[str, ...]
    """Addresses of stores that have answered the driver."""


@dataclass(frozen=True)
class Outcome:
    """Result of one drawing; `error` is empty if its files exist now."""

    sketch: str
    output: str
    seed: int
    model_version: str
    error: str = ""
    skipped: bool = False
    """Whether the files existed already, made from the same inputs with the same settings."""
    actor: str = ""
    """Name of the actor that colored the drawing; empty without Ray."""
    is_store_lost: bool = False
    """Whether a store does not answer, so that other drawings would fail, too."""

    def summary(self) -> dict[str, Any]:
        """Return the entry that `colorize --json` prints."""
        done = {"sketch": self.sketch, "output": self.output or None, "seed": self.seed}
        failed = {"error": self.error} if self.error else {}
        return {**done, "model_version": self.model_version, **failed, **({"skipped": True} if self.skipped else {})}


class Files(NamedTuple):
    """The files of one drawing."""

    sketch: bytes
    references: list[bytes]
    metadata: dict[str, Any]
    """What the metadata of its picture says about the files and the settings."""


def load_model(
    files: ray.ObjectRef[Mapping[str, bytes]], settings: BulkSettings, device: str, threads: int | None
) -> Bundle:
    """Return the model of an actor, and prepare torch and the stores for it; arguments are those of ColorDrawings."""
    if threads is not None:
        torch.set_num_threads(threads)
    use_attention(settings.attention)
    storage.expect(*settings.stores)
    return load_bundle_files(ray.get(files), device, name=settings.name)


class ColorDrawings:
    """Class for Ray Data's map_batches(): an instance per actor.

    Args:
        files: a reference to the files of the bundle in Ray's object store.
        settings: what all drawings share.
        threads: threads of torch; None is its default.
    """

    def __init__(
        self,
        files: ray.ObjectRef[Mapping[str, bytes]],
        settings: BulkSettings,
        threads: int | None = None,
    ) -> None:
        bundle = load_model(files, settings, "cpu", threads)
        self._actor = ray.get_runtime_context().get_actor_id() or ""
        self._pool = ThreadPoolExecutor(THREADS)
        self._color = DrawingColorizer(BundleColorizer(bundle, settings.version, THREADS), settings)

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Color the drawings of a block of bulk.py and return their outcomes."""
        made = list(self._pool.map(lambda row: self._color(*row), rows_of(batch)))
        return columns_of(replace(one, actor=self._actor) for one in made)


def rows_of(batch: dict[str, NDArray[Any]]) -> Iterator[tuple[str, list[str], str]]:
    """Yield sketch, references and output of each drawing of a block of bulk.py."""
    columns = (batch[name].tolist() for name in ("sketch", "references", "output"))
    return ((sketch, references.split("\n"), output) for sketch, references, output in zip(*columns, strict=True))


def columns_of(outcomes: Iterable[Outcome]) -> dict[str, NDArray[Any]]:
    """Return outcomes as a block."""
    made = list(outcomes)
    return {field.name: np.array([getattr(one, field.name) for one in made]) for field in fields(Outcome)}


class DrawingColorizer:
    """Colors one drawing of a store; several threads call it.

    Args:
        colorizer: makes the pictures.
        settings: what all drawings share.
    """

    def __init__(self, colorizer: Colorizer, settings: BulkSettings) -> None:
        self._colorizer, self._settings = colorizer, settings
        self._references: dict[str, bytes] = {}

    def __call__(self, sketch: str, references: Sequence[str], output: str) -> Outcome:
        """Color a drawing; errors are in the result.

        Args:
            sketch: URI of the drawing.
            references: URIs of the reference images.
            output: URI of the picture; its color layer is next to it.
        """
        return self.attempt(sketch, lambda: self._colored(sketch, references, output))

    def attempt(self, sketch: str, work: Callable[[], Made]) -> Made | Outcome:
        """Return what `work` makes of a drawing, or the outcome with its error."""
        try:
            return work()
        except UnreachableError as error:
            return replace(self._outcome(sketch, "", str(error)), is_store_lost=True)
        except ConfigError as error:
            return self._outcome(sketch, "", str(DataError(sketch, error.found, error.allowed)))
        except (ImageError, DataError, StorageError) as error:
            return self._outcome(sketch, "", str(error))

    def _colored(self, sketch: str, references: Sequence[str], output: str) -> Outcome:
        files = self.read(sketch, references)
        return self.done(files, sketch, output) or self._write(files, sketch, output)

    def read(self, sketch: str, references: Sequence[str]) -> Files:
        """Read the files of a drawing; errors are those of read_file()."""
        data, colors = read_file(sketch), [self._reference(uri) for uri in references]
        settings = settings_metadata(colors, self._settings.options, self._settings.rendering)
        return Files(data, colors, {"sketch": sha256_of(data), **settings})

    def done(self, files: Files, sketch: str, output: str) -> Outcome | None:
        """Return the outcome if the picture exists, made from the same files with the same settings."""
        # Ray repeats a batch whose actor has died, so that the question is asked for each drawing, not for all before.
        suffix = output.rpartition(".")[2].partition("?")[0]
        written = [output, layer_of(output)] if self._settings.file_format == "png" else [output]
        versions = self._colorizer.versions()
        is_done = all(is_same(_metadata(file, suffix), files.metadata, versions) for file in written)
        return self._outcome(sketch, output, skipped=True) if is_done else None

    def _write(self, files: Files, sketch: str, output: str) -> Outcome:
        settings = self._settings
        made = self._colorizer.colorize(
            files.sketch, files.references, settings.options, settings.rendering, settings.file_format, name=sketch
        )
        metadata = {**files.metadata, "model_version": made.maker}
        if made.color_layer is not None:  # before the picture, which then always has its layer
            storage.write_bytes(layer_of(output), with_metadata(made.color_layer, metadata))
        storage.write_bytes(output, with_metadata(made.picture, metadata))
        return self._outcome(sketch, output)

    def _outcome(self, sketch: str, output: str, error: str = "", skipped: bool = False) -> Outcome:
        version = "" if error else self._settings.version
        return Outcome(sketch, output, self._settings.options.seed, version, error, skipped)

    def _reference(self, uri: str) -> bytes:
        """Return a reference, from memory if it is one of the last; drawings of a scene share one."""
        data = self._references.get(uri)
        if data is None:
            data = read_file(uri)
            while len(self._references) >= _CACHED_REFERENCES:
                self._references.pop(next(iter(self._references)), None)
            self._references[uri] = data
        return data


def layer_of(output: str) -> str:
    """Return the address of the color layer next to a picture."""
    base, options = split_options(output)
    return base.removesuffix(".png") + LAYER_SUFFIX + options


def read_file(uri: str) -> bytes:
    """Read a drawing or a reference.

    Raises:
        ImageError: it is larger than any usable picture.
        StorageError: it cannot be read.
    """
    size = storage.file_size(uri)
    if size is not None and size > MAX_FILE_BYTES:
        raise ImageError(uri, f"is larger than {MAX_FILE_BYTES // 2**20} MiB", "give an image file")
    return storage.read_bytes(uri)


def _metadata(uri: str, suffix: str) -> dict[str, Any] | None:
    if storage.file_size(uri) is None:
        return None
    return metadata_of(io.BytesIO(storage.read_bytes(uri)), f".{suffix}")
