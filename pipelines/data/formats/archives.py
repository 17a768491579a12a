"""List and read the members of ZIP and tar archives in place; nothing is unpacked to disk.

    members, rejects = index_archive("s3://bucket/faces-00000.tar", "faces-00000.tar")
    data = read_member(members[0])

A listing reads headers only: the directory at the end of a ZIP archive, and one header of 512 bytes per member of a tar
archive. A member is read later, by its place, with one request. Archives are not trusted: names that lead out of the
archive, links, encrypted and oversized members are rejects, and an archive with too many members or an implausible
compression is a DataError. pipelines/data/formats/catalog.py puts all files of a source together.
"""

from __future__ import annotations

import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from pyarrow import fs

from animediffusion.pipelines.data.ingest_plan import Reject
from animediffusion.platform.errors import AnimeDiffusionError, DataError, ImageError
from animediffusion.platform.images.picture_names import PICTURES, is_junk
from animediffusion.platform.storage import storage

MAX_MEMBERS = 300_000
"""Most members of an archive; their names must fit into memory, and an archive of a few MB may list a million."""
MAX_DIRECTORY_BYTES = 32 * 2**20
MAX_MEMBER_BYTES = 512 * 2**20
"""Size of the largest decodable picture without compression."""
MAX_EXPANSION = 200
"""How many times larger than the archive all its pictures may be; pictures are compressed already."""
_ALWAYS_ALLOWED_BYTES = 256 * 2**20
_MAX_HEADER_BYTES = 2**20
"""Largest extended header of a tar archive: long names need some kilobytes."""
_LOCAL_WINDOW, _REMOTE_WINDOW = 4096, 2**21
"""Bytes that are read at once from a tar archive while its headers are listed."""
_STORED, _DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_USUAL_NAME_BYTES = 4096
_END_OF_DIRECTORY = b"PK\5\6"
_END_BYTES = 65_557
"""Length of a ZIP archive's last record with the longest comment."""
_ZIP64_LOCATOR, _ZIP64_END = struct.Struct("<4sIQI"), struct.Struct("<4sQ2H2I4Q")


class Place(NamedTuple):
    """Where the bytes of a picture are."""

    uri: str
    """The archive or table."""
    kind: str
    """`zip`, `tar` or `table`."""
    position: int
    """Byte at which the data of a tar member or the local header of a ZIP member starts; row of a table."""
    length: int
    """Bytes of the member in the archive; 0 for a table."""


class ArchiveMember(NamedTuple):
    """A picture in an archive."""

    name: str
    """Normalized path inside the archive."""
    place: Place
    num_bytes: int
    """Size when it is unpacked."""


def index_archive(uri: str, path: str) -> tuple[list[ArchiveMember], list[Reject]]:
    """Return the pictures in an archive, and the members that cannot be used; other files are left out.

    Args:
        uri: the archive, a .tar or .zip file.
        path: the archive's path in rejects.

    Raises:
        DataError: if the archive as a whole cannot be used.
        StorageError: if it cannot be read.
    """
    scan = _scan_zip if path.lower().endswith(".zip") else _scan_tar

    def work(files: fs.FileSystem, inner: str) -> tuple[list[ArchiveMember], list[Reject]]:
        with files.open_input_file(inner) as source:
            found = _Found(path)
            try:
                scan(uri, path, source, found)
            except (AnimeDiffusionError, OSError):
                raise
            except Exception as error:  # zipfile and tarfile do not document what they raise for damaged archives
                raise DataError(path, f"is damaged ({error})", "copy or download it again") from error
            return found.members, found.rejects

    return storage.patiently(uri, work)


def read_member(place: Place, thing: str) -> bytes:
    """Return the unpacked bytes of a member.

    Raises:
        ImageError: if the member is damaged.
        StorageError: if the archive cannot be read.
    """
    if place.kind == "tar":
        data = storage.read_range(place.uri, place.position, place.length)
        if len(data) < place.length:
            raise ImageError(thing, "is cut off before its end", "give the whole archive", reason="truncated")
        return data
    return _unzip(place, thing)


class _Found:
    """Members and rejects of one archive, with a unique name each."""

    def __init__(self, path: str) -> None:
        self.members: list[ArchiveMember] = []
        self.rejects: list[Reject] = []
        self._path = path
        self._names: set[str] = set()
        self._count = 0

    def count(self) -> None:
        self._count += 1
        if self._count > MAX_MEMBERS:
            raise DataError(self._path, f"has more than {MAX_MEMBERS:,} members", "divide it into smaller archives")

    def add(self, name: str, place: Place, num_bytes: int, fault: tuple[str, str] | None) -> None:
        """Add a member with its name as the archive gives it; `fault` is the (reason, detail) of an unusable one."""
        path, escapes = _normalized(name)
        if not _may_be_picture(path) or (is_junk(path) and not escapes):
            return
        if escapes:
            fault = "unreadable", "its name leads out of the archive"
        elif path in self._names:
            fault = "duplicate", f"same name as another member of {self._path}"
        elif num_bytes > MAX_MEMBER_BYTES:
            fault = "too_large", f"has {num_bytes:,} bytes, at most {MAX_MEMBER_BYTES:,}"
        if fault is None:
            self._names.add(path)
            self.members.append(ArchiveMember(path, place, num_bytes))
        else:
            self.rejects.append(Reject(f"{self._path}/{path}", *fault))


def _normalized(name: str) -> tuple[str, bool]:
    """Return a path with / and without ., and whether it leads out of the archive or has control characters."""
    text = name.replace("\\", "/")
    parts = [part for part in text.split("/") if part not in ("", ".")]
    escapes = text.startswith("/") or ".." in parts or re.match(r"[A-Za-z]:", text) is not None
    return "/".join(parts), escapes or re.search("[\0-\x1f\x7f\ud800-\udfff]", text) is not None


def _may_be_picture(path: str) -> bool:
    """Whether a member is a picture by its name; metadata next to pictures (.json, .txt, .cls) is not an error."""
    dot = path.rfind(".", path.rfind("/") + 1)
    return dot > 0 and path[dot:].lower() in PICTURES


def _scan_zip(uri: str, path: str, source: Any, found: _Found) -> None:
    _check_directory(path, source)
    total = 0
    with zipfile.ZipFile(source) as archive:
        for info in archive.infolist():
            found.count()
            if info.is_dir():
                continue
            fault = None
            if info.flag_bits & 0x1:
                fault = "unreadable", "is encrypted"
            elif info.compress_type not in (_STORED, _DEFLATED):
                fault = "unreadable", f"is compressed with method {info.compress_type}, only deflate is read"
            else:
                total += info.file_size
            found.add(info.filename, Place(uri, "zip", info.header_offset, info.compress_size), info.file_size, fault)
    allowed = max(_ALWAYS_ALLOWED_BYTES, MAX_EXPANSION * source.size())
    if total > allowed:
        raise DataError(path, f"would unpack to {total:,} bytes", f"at most {allowed:,} for an archive of its size")
    encrypted = [one for one in found.rejects if one.detail == "is encrypted"]
    if encrypted and not found.members:
        raise DataError(path, "is encrypted", "unpack it with its password")


def _check_directory(path: str, source: Any) -> None:
    """Refuse a ZIP archive whose directory would not fit into memory, before zipfile reads it."""
    size = source.size()
    start = max(0, size - _END_BYTES)
    tail = source.read_at(size - start, start)
    at = tail.rfind(_END_OF_DIRECTORY)
    if at < 0 or len(tail) < at + 22:
        raise DataError(path, "has no directory: it is cut off, or is not a ZIP archive", "copy it again")
    count, num_bytes = struct.unpack_from("<H I", tail, at + 10)
    if at >= _ZIP64_LOCATOR.size:
        name, _, end, _ = _ZIP64_LOCATOR.unpack_from(tail, at - _ZIP64_LOCATOR.size)
        record = source.read_at(_ZIP64_END.size, min(end, size)) if name == b"PK\6\7" else b""
        if len(record) == _ZIP64_END.size:
            count, num_bytes = _ZIP64_END.unpack(record)[7:9]
    if count > MAX_MEMBERS:
        raise DataError(path, f"has {count:,} members", f"at most {MAX_MEMBERS:,}: divide it into smaller archives")
    if num_bytes > MAX_DIRECTORY_BYTES:
        allowed = f"at most {MAX_DIRECTORY_BYTES:,}: divide it into smaller archives"
        raise DataError(path, f"has a directory of {num_bytes:,} bytes", allowed)


def _unzip(place: Place, thing: str) -> bytes:
    """Read a ZIP member with its local header, which repeats the name, and inflate it within MAX_MEMBER_BYTES."""
    data = storage.read_range(place.uri, place.position, _LOCAL_HEADER.size + _USUAL_NAME_BYTES + place.length)
    if len(data) < _LOCAL_HEADER.size or data[:4] != b"PK\3\4":
        raise ImageError(thing, "is not where the archive's directory says", "copy the archive again")
    _, _, flags, method, _, _, crc, _, _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack_from(data)
    start = _LOCAL_HEADER.size + name_bytes + extra_bytes
    if start + place.length > len(data) and name_bytes + extra_bytes > _USUAL_NAME_BYTES:
        data, start = storage.read_range(place.uri, place.position + start, place.length), 0
    packed = data[start : start + place.length]
    if len(packed) < place.length:
        raise ImageError(thing, "is cut off before its end", "give the whole archive", reason="truncated")
    if method == _STORED:
        plain = packed
    else:
        inflater = zlib.decompressobj(-15)
        try:
            plain = inflater.decompress(packed, MAX_MEMBER_BYTES)
        except zlib.error as error:
            raise ImageError(thing, f"is damaged ({error})", "copy the archive again") from error
        if inflater.unconsumed_tail:
            allowed = f"at most {MAX_MEMBER_BYTES:,}"
            raise ImageError(thing, "unpacks to more bytes than the archive says", allowed, reason="too_large")
    if not flags & 0x8 and zlib.crc32(plain) != crc:  # with this flag, the checksum follows the data
        raise ImageError(thing, "is damaged (wrong checksum)", "copy the archive again")
    return plain


def _scan_tar(uri: str, path: str, source: Any, found: _Found) -> None:
    size = source.size()
    head = source.read_at(min(6, size), 0)
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        raise DataError(path, "is compressed, so that its members cannot be read one by one", "decompress the archive")
    for member in _tar_members(source, _REMOTE_WINDOW if storage.is_remote(uri) else _LOCAL_WINDOW):
        found.count()
        if member is None:
            found.rejects.append(
                Reject(path, "truncated", "the archive is cut off or damaged; what precedes that is used")
            )
            return
        if member.isdir():
            continue
        fault = None
        if not member.isreg() or member.issparse():
            fault = "unreadable", "is a link, a device or a sparse file"
        elif member.offset_data + member.size > size:
            fault = "truncated", "the archive ends before the member"
        found.add(member.name, Place(uri, "tar", member.offset_data, member.size), member.size, fault)


def _tar_members(source: Any, window: int) -> Iterator[tarfile.TarInfo | None]:
    """Yield the members of an archive, and None where it is cut off."""
    reads: Any = _SmallReads(source, window)
    try:
        opened = tarfile.TarFile(fileobj=reads, mode="r", tarinfo=_TarInfo)
    except tarfile.ReadError as error:
        raise tarfile.ReadError(f"no tar archive starts so: {error}") from error
    with opened as archive:
        while True:
            try:
                member = archive.next()
            except tarfile.ReadError:
                yield None
                return
            if member is None:
                # tarfile takes damage for the end, which is a block of zeros.
                reads.seek(archive.offset)
                if reads.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    yield None
                return
            archive.members = []  # type: ignore[attr-defined]  # tarfile would keep all of them
            yield member


class _TarInfo(tarfile.TarInfo):
    """A member whose negative size, which a base-256 number may give, is an error instead of an endless loop."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> _TarInfo:  # type: ignore[override]
        member = super().frombuf(buf, encoding, errors)
        if member.size < 0:
            raise tarfile.ReadError("a member has a negative size")
        return member


class _SmallReads:
    """A file for tarfile, which reads as many bytes as an extended header says; more than 1 MB is an error.

    It reads ahead, because a request to a store takes as long as the transfer of a megabyte, and the next header is
    usually nearer than that.
    """

    def __init__(self, source: Any, window: int) -> None:
        self._source, self._window = source, window
        self._position, self._start, self._buffer = 0, 0, b""

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        self._position = position
        return position

    def read(self, size: int) -> bytes:
        if size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        at = self._position - self._start
        if at < 0 or at + size > len(self._buffer):
            total = self._source.size()
            self._start, at = min(self._position, total), 0
            self._buffer = self._source.read_at(min(self._window + size, total - self._start), self._start)
        data = self._buffer[at : at + size]
        self._position += len(data)
        return data
